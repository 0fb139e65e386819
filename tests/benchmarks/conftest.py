"""A run of a script is made once for all the tests of a file: they go to one worker."""

from pathlib import Path

import pytest


def pytest_collection_modifyitems(items):
  for item in items:
    if Path(__file__).parent in item.path.parents:
      item.add_marker(pytest.mark.xdist_group(item.path.stem))
