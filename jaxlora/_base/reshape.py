"""Which axes a reshape joins and splits, and reshapes of arrays whose types carry shardings."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec


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


def reshape(x: Any, shape: Sequence[int], spec: PartitionSpec | None = None) -> Any:
  """The array in another shape; what is split stays so where it leads the axes that it is joined with.

  Args:
    x: the array, JAX's or NumPy's.
    shape: the new one.
    spec: how the result lies on a mesh of Explicit axes, where that is known.
  """
  if not isinstance(x, jax.Array):
    return x.reshape(shape)
  sharding = jax.typeof(x).sharding
  if all(name is None for name in sharding.spec):
    return lax.reshape(x, tuple(shape))
  spec = PartitionSpec(*_names_of_groups(x.shape, shape, sharding)) if spec is None else spec
  return lax.reshape(x, tuple(shape), out_sharding=NamedSharding(sharding.mesh, spec))


def _names_of_groups(old: Sequence[int], new: Sequence[int], sharding: NamedSharding) -> list[Any]:
  """For each new axis what the axes that it is made of are split over."""
  out: list[Any] = [None] * len(new)
  for left, right in reshape_groups(old, new):
    first, then = (next((d for d in own if sizes[d] != 1), None) for own, sizes in ((left, old), (right, new)))
    name = None if first is None else sharding.spec[first]
    if name is None or then is None:
      continue
    axes = name if isinstance(name, tuple) else (name,)
    if new[then] % math.prod(sharding.mesh.shape[axis] for axis in axes) == 0:
      out[then] = name
  return out
