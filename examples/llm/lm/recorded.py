"""The figures of finished runs in one small file, and the tables of the README that are made of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import harness

from . import comparisons, tables

_LOSSES = ("loss_sums", "loss_counts")
_KEPT = ("settings", "label", "trained", *tables.COLUMNS, "each", *_LOSSES, "aspects", "versions", "hardware")


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
  return _compared(results, ("LoRA r=8", "LoRA r=8, int8 base", "LoRA r=8, nf4 base"))


def scaling(results: dict[str, Any]) -> str:
  """Ranks 8 and 64 with alpha / rank, and 64 with rsLoRA's alpha / sqrt(rank)."""
  return _compared(results, ("LoRA r=64", "LoRA r=64, rslora", "LoRA r=8"))


def rates(results: dict[str, Any]) -> str:
  """What each method's rates gave on validation."""
  found = [run for run in results["runs"] if run["settings"]["split"] == "val"]
  return "\n\n".join([_conditions(found, "validation"), harness.markdown(*tables.by_label(found))])


def _compared(results: dict[str, Any], labels: Sequence[str]) -> str:
  """The test runs with these labels beside the baselines, then what they differ from the first by."""
  found = [run for run in results["runs"] if run["settings"]["split"] == "test"]
  shown = [run for run in found if "training" not in run or run["label"] in labels]
  trained = [run for run in shown if "training" in run]
  less, rows = comparisons.differences(comparisons.by_seed(trained, "test"), labels[0])
  parts = [_conditions(trained, "test"), harness.markdown(*tables.by_label(shown)), harness.markdown(less, rows)]
  return "\n\n".join(parts)


def _conditions(found: Sequence[dict[str, Any]], split: str) -> str:
  return f"{len(found[0]['aspects'])} {split} pairs; 95 % intervals. {harness.conditions(found[0])}."
