"""Intervals over seeds."""

from collections.abc import Sequence
import statistics

import scipy.stats


def interval(values: Sequence[float]) -> dict[str, float | None]:
  """Mean and half of its 95 % t-interval, `t(0.975, n - 1) s / sqrt(n)`; no interval for a single value."""
  count = len(values)
  half = None
  if count > 1:
    half = float(scipy.stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / count**0.5
  return {"mean": statistics.fmean(values), "half": half}
