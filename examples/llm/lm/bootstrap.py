"""Intervals of differences by the paired bootstrap, over papers and seeds at once.

A paper's three summaries depend on each other, so papers are drawn, not pairs; and methods are compared on the same
papers and seeds. With three seeds a bootstrap over them is too narrow: the tables say how many there were.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

DRAWS = 10_000


class Sums(NamedTuple):
  """Sums over each paper, of which the statistic is a ratio: (seeds, papers) each."""

  values: np.ndarray
  counts: np.ndarray


class Interval(NamedTuple):
  """An estimate, and where 95 % of the draws lie."""

  mean: float
  low: float
  high: float


def papers_of(aspects: Sequence[str]) -> np.ndarray:
  """The number of each pair's paper: all pairs of one are behind each other, and its first aspect comes again."""
  return np.cumsum([aspect == aspects[0] for aspect in aspects]) - 1


def sums_of(runs: Sequence[dict[str, Any]], name: str) -> Sums | None:
  """What a measure (`"loss"`, or a ROUGE) sums up to, of runs on the same pairs; `None` where they do not say it."""
  if any(("loss_sums" if name == "loss" else "each") not in run for run in runs):
    return None
  papers = papers_of(runs[0]["aspects"])
  by_paper = lambda values: np.bincount(papers, np.asarray(values, float))
  if name == "loss":
    return Sums(*(np.array([by_paper(run[part]) for run in runs]) for part in ("loss_sums", "loss_counts")))
  values = np.array([by_paper(run["each"][name]) for run in runs])
  return Sums(values, np.array([by_paper(np.ones(len(papers)))] * len(runs)))


def difference(a: Sums, b: Sums, draws: int = DRAWS, seed: int = 0) -> Interval:
  """The statistic of `a` less that of `b`; where one of them has a single seed, it is taken for all of the other's."""
  seeds = max(len(a.values), len(b.values))
  generator = np.random.default_rng(seed)
  of_seeds, of_papers = (
    generator.multinomial(count, [1 / count] * count, draws) for count in (seeds, a.values.shape[1])
  )

  def statistic(sums: Sums, by_seed: np.ndarray, by_paper: np.ndarray) -> np.ndarray:
    whole = (np.broadcast_to(part, (seeds, part.shape[1])) for part in sums)
    above, below = (np.einsum("ds,sp,dp->d", by_seed, part, by_paper, optimize=True) for part in whole)
    return above / below

  once = np.ones((1, seeds)), np.ones((1, a.values.shape[1]))
  (mean,) = statistic(a, *once) - statistic(b, *once)
  low, high = np.percentile(statistic(a, of_seeds, of_papers) - statistic(b, of_seeds, of_papers), [2.5, 97.5])
  return Interval(float(mean), float(low), float(high))
