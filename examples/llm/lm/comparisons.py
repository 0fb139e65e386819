"""Tables of finished runs beside each other: differences with intervals, aspects, forgetting, and samples by a rule."""

from collections.abc import Sequence
from typing import Any

import harness
import numpy as np

from . import bootstrap
from .bootstrap import Interval
from .papers import QUESTIONS
from .tables import COLUMNS, Table, cell

BASE, REFERENCE, FULL = "base, instructed", "LoRA r=8", "full fine-tuning"  # the first two: what others are less
SAMPLED = ((FULL, REFERENCE), (REFERENCE, BASE))
SAMPLES = {"lowest": 0.05, "median": 0.5, "highest": 0.95}  # quantiles of the difference in ROUGE-L

Groups = dict[str, dict[int, dict[str, Any]]]


def by_seed(results: Sequence[dict[str, Any]], split: str) -> Groups:
  """Label -> seed -> the run on a split; of a label's rates, the one with the most seeds, then the lowest loss.

  Baselines and the base, which have no seed, have seed 0.
  """
  found: dict[str, dict[Any, dict[int, dict[str, Any]]]] = {}
  for result in results:
    if result["settings"]["split"] == split:
      schedule = result["settings"].get("schedule", {"rate": None, "seed": 0})
      found.setdefault(result["label"], {}).setdefault(schedule["rate"], {})[schedule["seed"]] = result
  loss = lambda runs: float(np.mean([run["loss"] or 0 for run in runs.values()]))
  return {label: min(rates.values(), key=lambda runs: (-len(runs), loss(runs))) for label, rates in found.items()}


def paired(groups: Groups, a: str, b: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
  """The runs of two labels with the same seeds; a label without seeds is compared with all of the other's."""
  one, other = groups[a], groups[b]
  fixed = [label for label in (a, b) if "training" not in next(iter(groups[label].values()))]
  if fixed:
    return list(one.values()), list(other.values())
  common = sorted(set(one) & set(other))
  return [one[seed] for seed in common], [other[seed] for seed in common]


def differences(groups: Groups, reference: str = REFERENCE) -> Table:
  """A row for each label: its measures less the reference's, with 95 % intervals."""
  rows = []
  for label in groups:
    runs, others = paired(groups, label, reference) if label != reference else ([], [])
    if runs and others and runs[0]["aspects"] == others[0]["aspects"]:
      cells = [_difference_cell(runs, others, name, 3 if name == "loss" else 1) for name in COLUMNS]
      rows.append([label, str(max(len(runs), len(others))), *cells])
  return (f"less {reference}", "seeds", *COLUMNS.values()), rows


def _difference_cell(runs: list[dict[str, Any]], others: list[dict[str, Any]], name: str, digits: int) -> str:
  a, b = (bootstrap.sums_of(group, name) for group in (runs, others))
  if a is None or b is None:
    return "-"
  found: Interval = bootstrap.difference(a, b)
  return f"{found.mean:+.{digits}f} ({found.low:+.{digits}f} to {found.high:+.{digits}f})"


def aspects(groups: Groups) -> str:
  """ROUGE-L of each aspect."""
  rows = []
  for label, runs in groups.items():
    cells = []
    for aspect in QUESTIONS:
      own = [
        [x for x, of in zip(run["each"]["rougeL"], run["aspects"], strict=True) if of == aspect]
        for run in runs.values()
      ]
      cells.append(cell([float(np.mean(values)) for values in own], 1) if all(own) else "-")
    rows.append([label, str(len(runs)), *cells])
  return harness.table(("ROUGE-L by aspect", "seeds", *QUESTIONS), rows)


def _of_aspect(run: dict[str, Any], aspect: str) -> float | None:
  values = [x for x, own in zip(run["each"]["rougeL"], run["aspects"], strict=True) if own == aspect]
  return float(np.mean(values)) if values else None


def forgetting(groups: Groups) -> str:
  """Perplexity of plain text, and how many times the base's it is; only where both saw the same text."""
  known = {label: [run["plain_text"] for run in runs.values() if "plain_text" in run] for label, runs in groups.items()}
  base = next((texts[0] for label, texts in known.items() if label.startswith("base") and texts), None)
  rows = []
  for label, texts in known.items():
    if base and texts and all(text["digest"] == base["digest"] for text in texts):
      perplexities = [float(np.exp(text["loss"])) for text in texts]
      ratios = [float(np.exp(text["loss"] - base["loss"])) for text in texts]
      rows.append([label, str(len(texts)), cell(perplexities, 2), cell(ratios, 3)])
  return harness.table(("plain text", "seeds", "perplexity", "over the base's"), rows) if rows else ""


def samples(groups: Groups, pairs: Sequence[dict[str, Any]], a: str, b: str) -> str:
  """What two methods write where their ROUGE-L differs least, most and as the median does: quantiles, not taste.

  The difference is the mean over their common seeds; what is shown is the first seed's.
  """
  if not {a, b} <= set(groups):
    return ""
  runs, others = paired(groups, a, b)
  if not runs or len(runs[0]["written"]) != len(pairs) or len(others[0]["written"]) != len(pairs):
    return ""
  mean = lambda group: np.mean([run["each"]["rougeL"] for run in group], 0)
  difference = mean(runs) - mean(others)
  order = np.argsort(difference, kind="stable")
  lines = [f"ROUGE-L of {a} less that of {b}, pair by pair:"]
  for name, quantile in SAMPLES.items():
    k = int(order[round(quantile * (len(order) - 1))])
    lines += [
      f"\n{name} ({quantile:.0%}): {difference[k]:+.1f}, {pairs[k]['paper']}, {pairs[k]['aspect']}",
      f"  by a person: {pairs[k]['summary']}",
      f"  {a}: {runs[0]['written'][k]}",
      f"  {b}: {others[0]['written'][k]}",
    ]
  return "\n".join(lines)
