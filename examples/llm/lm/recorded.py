"""The figures of finished runs in one small file, and the tables of the README that are made of it."""

from collections.abc import Sequence
import json
from pathlib import Path
from typing import Any

import harness

from . import comparisons, tables

_LOSSES = ("loss_sums", "loss_counts")
_FIGURES = (*tables.COLUMNS, "each", *_LOSSES, "aspects", "plain_text")
_KEPT = ("settings", "label", "trained", *_FIGURES, "versions", "hardware")


def compact(found: Sequence[dict[str, Any]]) -> dict[str, Any]:
  """What tables need of each run: its figures and those of each pair, not the text that it wrote."""
  runs = []
  for result in found:
    run = {name: result[name] for name in _KEPT if name in result}
    if "training" in result:
      run["training"] = {"seconds": [round(second, 2) for second in result["training"]["seconds"]]}
    runs.append(run)
  return {"runs": runs}


def read(path: Path) -> list[dict[str, Any]]:
  """The runs that are recorded; none where nothing is."""
  return json.loads(path.read_text())["runs"] if path.exists() else []


def merged(known: Sequence[dict[str, Any]], found: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
  """The runs of both; of one that is in both, the latter."""
  key = lambda run: json.dumps([run["label"], run["settings"]], sort_keys=True)
  return list({key(run): run for run in (*known, *found)}.values())


def write(path: Path, found: Sequence[dict[str, Any]]) -> None:
  """Writes what tables need of finished runs and of baselines."""
  harness.write(path, compact(found))


def quantised(results: dict[str, Any]) -> str:
  """LoRA on floats, on NF4 and on INT8 codes: scores and losses, then their differences with intervals."""
  return _compared(results, ("LoRA r=8", "LoRA r=8, int8 base", "LoRA r=8, nf4 base"), "LoRA r=8")


def methods(results: dict[str, Any]) -> str:
  """The base, LoRA and full fine-tuning."""
  return _compared(results, (comparisons.BASE, comparisons.REFERENCE, comparisons.FULL), comparisons.REFERENCE)


def brief(results: dict[str, Any]) -> str:
  """The same in a few words: the best baseline, the base, LoRA and full fine-tuning."""
  labels = ("sentence by aspect", comparisons.BASE, comparisons.REFERENCE, comparisons.FULL)
  tests = [run for run in results["runs"] if run["settings"]["split"] == "test"]
  names, rows = tables.by_label([run for label in labels for run in tests if run["label"] == label])
  shown = [names.index(name) for name in ("method", "seeds", *tables.COLUMNS.values(), "trained")]
  pick = lambda row: [row[k] for k in shown]
  return harness.markdown(pick(names), [pick(row) for row in rows])


def ranks(results: dict[str, Any]) -> str:
  """LoRA of several ranks at one rate."""
  return _compared(results, [f"LoRA r={rank}" for rank in (1, 4, 8, 16, 32, 64)], "LoRA r=8")


def scaling(results: dict[str, Any]) -> str:
  """Ranks 8 and 64 with alpha / rank, and 64 with rsLoRA's alpha / sqrt(rank)."""
  return _compared(results, ("LoRA r=64, rslora", "LoRA r=64", "LoRA r=8"), "LoRA r=64")


def rates(results: dict[str, Any]) -> str:
  """What each method's rates gave on validation."""
  found = [run for run in results["runs"] if run["settings"]["split"] == "val"]
  return "\n\n".join([_conditions(found, "validation"), harness.markdown(*tables.by_label(found))])


def _compared(results: dict[str, Any], labels: Sequence[str], reference: str) -> str:
  """The test runs with these labels below the baselines, then what they differ from the reference by."""
  found = [run for run in results["runs"] if run["settings"]["split"] == "test"]
  baselines = [run for run in found if "schedule" not in run["settings"]]
  shown = [run for label in labels for run in found if run["label"] == label]
  less, rows = comparisons.differences(comparisons.by_seed(shown, "test"), reference)
  table = tables.by_label([*baselines, *shown])
  return "\n\n".join([_conditions(shown, "test"), harness.markdown(*table), harness.markdown(less, rows)])


def _conditions(found: Sequence[dict[str, Any]], split: str) -> str:
  machines = "; ".join(dict.fromkeys(map(harness.conditions, found)))
  return f"{len(found[0]['aspects'])} {split} pairs; 95 % intervals. {machines}."
