"""Results as tables."""

from collections.abc import Sequence
from typing import Any

import harness
import numpy as np

COLUMNS = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L", "loss": "loss"}


Table = tuple[Sequence[str], list[list[str]]]  # the head, then the rows


def by_label(results: Sequence[dict[str, Any]]) -> Table:
  """A row for each method and split, over its seeds: the mean, and half of the 95 % t-interval."""
  groups: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
  for result in results:
    settings = result["settings"]
    rate = "-" if settings["method"]["name"] == "base" else f"{settings['schedule']['rate']:g}"
    groups.setdefault((settings["split"], result["label"], rate), []).append(result)
  rows = []
  for (split, label, rate), runs in groups.items():
    cells = [cell([run[name] for run in runs], 3 if name == "loss" else 1) for name in COLUMNS]
    trained = f"{runs[0]['trained']:,}" if "trained" in runs[0] else "-"
    rows.append([label, split, rate, str(len(runs)), *cells, trained, seconds(runs)])
  return ("method", "split", "rate", "seeds", *COLUMNS.values(), "trained", "s / step"), rows


def text(table: Table) -> str:
  """A table for a terminal."""
  return harness.table(*table)


def cell(values: Sequence[Any], digits: int) -> str:
  """A mean, with half of its interval where there are several seeds."""
  if None in values:
    return "-"
  if len(values) == 1:
    return f"{values[0]:.{digits}f}"
  figure = harness.interval(values)
  return f"{figure['mean']:.{digits}f} ± {figure['half']:.{digits}f}"


def seconds(runs: Sequence[dict[str, Any]]) -> str:
  """The median time of a step, compiling left out."""
  times = [second for run in runs for second in run.get("training", {}).get("seconds", [])]
  return f"{np.median(times):.1f}" if times else "-"
