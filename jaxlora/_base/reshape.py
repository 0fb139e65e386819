"""Which axes a reshape joins and splits."""

from collections.abc import Sequence
from typing import Any


def reshape_groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
  """Splits a reshape into its smallest independent pieces: which old axes become which new ones."""
  groups: list[tuple[list[int], list[int]]] = []
  i = j = 0
  while i < len(old) or j < len(new):
    left: list[int] = []
    right: list[int] = []
    left_size = right_size = 1
    while True:
      if left_size == right_size and (left or right):
        break
      if _at_most(left_size, right_size) and i < len(old):
        left_size *= old[i]
        left.append(i)
        i += 1
      elif j < len(new):
        right_size *= new[j]
        right.append(j)
        j += 1
      else:
        left_size *= old[i]
        left.append(i)
        i += 1
    groups.append((left, right))
  return groups


def _at_most(left: Any, right: Any) -> bool:
  """Whether a size is at most another; where that cannot be known of symbolic ones, either answer ends in groups."""
  try:
    return bool(left <= right)
  except Exception:  # JAX's own, for a comparison without an answer
    return False
