"""Times of programs, compared within interleaved rounds.

In every round each entry has one turn, so that other load on the machine slows all of them alike and their ratio stays.
The order rotates and reverses from round to round: no entry is always first, or always after the same neighbour. An A/A
control, one entry taken twice, shows how far two equal programs lie apart on this machine.
"""

from collections.abc import Callable, Mapping, Sequence
import math
import statistics
import time
from typing import Any

import jax
import numpy as np

CONTROL = " (again)"


def with_control(runs: Mapping[str, Callable[[], Any]], name: str, again: Callable[[], Any]) -> dict[str, Any]:
  """Adds the A/A control: `again` runs the same program as the entry `name`."""
  return {**runs, name + CONTROL: again}


def calls_per_turn(runs: Mapping[str, Callable[[], Any]], seconds: float = 0.05) -> int:
  """How many calls make one turn, so that a turn of the fastest entry lasts at least `seconds`."""
  fastest = float("inf")
  for run in runs.values():
    jax.block_until_ready(run())
    begin = time.perf_counter()
    jax.block_until_ready(run())
    fastest = min(fastest, time.perf_counter() - begin)
  return max(1, math.ceil(seconds / fastest))


def interleave(
  runs: Mapping[str, Callable[[], Any]], rounds: int, calls: int, tick: Callable[[int], Any]
) -> dict[str, list[float]]:
  """Seconds per call of every entry, round by round.

  Args:
    runs: the entries.
    rounds: how many rounds are measured; one more comes first, to warm up.
    calls: calls per turn.
    tick: called after every turn, warm-up included, with the number of calls done.
  """
  names = list(runs)
  seconds: dict[str, list[float]] = {name: [] for name in names}
  for number in range(rounds + 1):
    order = np.roll(range(len(names)), number)
    for k in order[:: -1 if number % 2 else 1]:
      begin = time.perf_counter()
      for _ in range(calls):
        jax.block_until_ready(runs[names[k]]())
      elapsed = time.perf_counter() - begin
      tick(calls)
      if number:  # round 0 warms up
        seconds[names[k]].append(elapsed / calls)
  return seconds


def summarize(values: Sequence[float]) -> dict[str, Any]:
  """Median and range, with the values of all rounds."""
  return {"median": statistics.median(values), "min": min(values), "max": max(values), "rounds": list(values)}


def ratios(seconds: Mapping[str, Sequence[float]], over: str) -> dict[str, dict[str, Any]]:
  """Every entry's time over that of the entry `over` in the same round."""
  return {
    name: summarize([a / b for a, b in zip(values, seconds[over], strict=True)]) for name, values in seconds.items()
  }


def inverse(ratio: Mapping[str, Any]) -> dict[str, Any]:
  """The ratio of throughputs that belongs to a ratio of times."""
  return summarize([1 / value for value in ratio["rounds"]])
