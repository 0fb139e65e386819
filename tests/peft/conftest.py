"""PEFT folders are safetensors: without the extra jaxlora[peft] there is nothing here to collect."""

import importlib.util

collect_ignore_glob = [] if importlib.util.find_spec("safetensors") else ["test_*"]


def pytest_report_header():
  return "tests/peft: left out, as jaxlora[peft] is not installed" if collect_ignore_glob else None
