"""Two profiles of the suite: the default run, and the nightly one with full products and larger counts.

A product is thinned evenly for the default run, so that each of its factors is still met in full: every wrapper meets
every family of builders, and every builder meets several wrappers.
"""

from collections.abc import Callable, Iterable, Sequence
import math
import os
from typing import Any

import pytest

from tests.helpers.builders import BUILDERS, FAMILIES

VARIABLE = "JAXLORA_TESTS"
EACH = 3  # wrappers for each builder
STRIDE = 4  # wrappers that are listed side by side are alike


def is_nightly() -> bool:
  return os.environ.get(VARIABLE) == "nightly"


def count(by_default: int, nightly: int) -> int:
  """How often to do something: of kills, say, or of damaged files."""
  return nightly if is_nightly() else by_default


def product(wrappers: Iterable[str], legal: Callable[[str, str], bool]) -> list[Any]:
  """Every legal pair of a builder and a wrapper; those that the default run leaves out are marked."""
  wrappers = list(wrappers)
  kept = thinned(wrappers, legal)
  return [_param((build, wrap) in kept, build, wrap) for build in BUILDERS for wrap in wrappers if legal(build, wrap)]


def thinned(wrappers: Sequence[str], legal: Callable[[str, str], bool]) -> set[tuple[str, str]]:
  """Diagonals of each family's product: `EACH` or more wrappers for a builder, as many builders for each wrapper."""
  kept = set()
  for builds in FAMILIES.values():
    for j, wrap in enumerate(wrappers):
      fitting = [build for build in builds if legal(build, wrap)]
      share = math.ceil(EACH * len(fitting) / len(wrappers))
      kept |= {(fitting[(j + STRIDE * k) % len(fitting)], wrap) for k in range(share)}
  return kept


def alternating(cases: Iterable[Any], ways: Sequence[Any], each: int = 1) -> list[Any]:
  """Every pair of a case and a way to run it; by default the ways take turns, one for each case, or so many."""
  turns = lambda k, j: (j - each * k) % len(ways) < each
  return [_param(turns(k, j), case, way) for k, case in enumerate(cases) for j, way in enumerate(ways)]


def halved(cases: Iterable[Any]) -> list[Any]:
  """All cases; the default run takes every second."""
  return [_param(k % 2 == 0, case) for k, case in enumerate(cases)]


def some(cases: Iterable[Any], *kept: Any) -> list[Any]:
  """All cases; the default run takes those that are named."""
  return [_param(case in kept, case) for case in cases]


def in_turn(k: int, ways: Sequence[str], count: int) -> list[str]:
  """Of the ways to run case number `k`: all at night; by default so many, the next case begins where these end."""
  return list(ways) if is_nightly() else [ways[(count * k + j) % len(ways)] for j in range(count)]


def every_other(builds: Iterable[str] = BUILDERS, *before: Any) -> list[Any]:
  """Builders, after other arguments; the default run takes every second of each family."""
  kept = {build for family in FAMILIES.values() for build in family[::2]}
  return [_param(build in kept, *before, build) for build in builds]


def _param(kept: bool, *values: Any) -> Any:
  return pytest.param(*values, marks=() if kept else pytest.mark.nightly)
