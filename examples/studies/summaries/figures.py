"""Figures over seeds: intervals, differences, and the least point of a curve."""

from collections.abc import Mapping, Sequence
import statistics
from typing import Any

import numpy as np
from scipy import stats

LOSSES = ("validation_loss", "pretraining_loss", "pretraining_loss_removed", "train_loss")


def interval(values: Sequence[float | None]) -> dict[str, Any] | None:
  """Mean and half of the 95 % t-interval over seeds; None if a seed has no value, no interval for a single seed."""
  known = [value for value in values if value is not None]
  if not known or len(known) < len(values):
    return None
  half = None
  if len(known) > 1:
    half = float(stats.t.ppf(0.975, len(known) - 1)) * statistics.stdev(known) / len(known) ** 0.5
  return {"mean": statistics.fmean(known), "half": half, "count": len(known)}


def figures(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
  """The intervals of all scores and losses of these runs, by name."""
  names = dict.fromkeys(name for run in runs for name in run if name.startswith("rouge") or name in LOSSES)
  return {name: interval([run.get(name) for run in runs]) for name in names}


def differences(row: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
  """Intervals of `row` minus `other`, paired by seed: both were trained on the same batches."""
  pairs = list(zip(row["seeds"], other["seeds"], strict=True))
  names = [name for name in row["figures"] if name in other["figures"]]
  return {name: interval([a[name] - b[name] for a, b in pairs]) for name in names}


def mean_loss(point: Mapping[str, Any]) -> float:
  """The mean validation loss of a point of a sweep; infinite if a seed diverged."""
  figure = point["figures"]["validation_loss"]
  return float("inf") if figure is None else figure["mean"]


def vertex(rates: Sequence[float], losses: Sequence[float]) -> float | None:
  """The rate at the minimum of a parabola, in log rate, through the best point and its neighbours; None at an end."""
  k = int(np.argmin(losses))
  if not 0 < k < len(rates) - 1 or not np.isfinite(losses[k - 1 : k + 2]).all():
    return None
  curve = np.polyfit(np.log(rates[k - 1 : k + 2]), losses[k - 1 : k + 2], 2)
  return float(np.exp(-curve[1] / (2 * curve[0])))
