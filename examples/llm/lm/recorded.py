"""The figures of finished runs in one small file, and the tables of the README that are made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

from . import comparisons, tables

_KEPT = ("settings", "label", "trained", *tables.COLUMNS, "each", "aspects", "versions", "hardware")


def compact(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What tables need of each run: its figures and those of each pair, not the text that it wrote."""
  runs = []
  for result in found:
    run = {name: result[name] for name in _KEPT if name in result}
    if "training" in result:
      run["training"] = {"seconds": [round(second, 2) for second in result["training"]["seconds"]]}
    runs.append(run)
  return {"runs": runs}


def write(path: Path, found: Sequence[dict[str, Any]]) -> None:
  """Writes what tables need of finished runs and of baselines."""
  harness.write(path, compact(found))


def quantised(results: dict[str, Any]) -> str:
  """LoRA on floats, on NF4 and on INT8 codes: scores and losses, then their differences with intervals."""
  found = [run for run in results["runs"] if run["settings"]["split"] == "test"]
  trained = [run for run in found if "training" in run]
  groups = comparisons.by_seed(trained, "test")
  less, rows = comparisons.differences(groups)
  first = trained[0]
  conditions = f"{len(first['aspects'])} test pairs; 95 % intervals. {harness.conditions(first)}."
  return "\n\n".join([conditions, harness.markdown(*tables.by_label(found)), harness.markdown(less, rows)])
