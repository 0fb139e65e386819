"""Blocks: runs of elements that share a scale.

Scales have as many axes as what they scale, and each divides its own: the sizes of both say what the blocks are. So a
slice along an axis without blocks, such as a stack's, is a slice of every part.
"""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax import lax

from jaxlora._base.reshape import reshape_groups


def block_shape(shape: Sequence[int], axes: Sequence[int], size: int | None) -> tuple[int, ...]:
  """How many elements of each axis share a scale: about `size` of them together.

  The axes are filled one after the other: whole while they fit, then by the largest divisor that is no less than half
  of what is left, and nothing of the rest. A first axis without such a divisor has the next larger one: none is cut.

  Args:
    shape: of the array.
    axes: in the order in which they are filled.
    size: elements of a block; `None` for all of these axes.
  """
  block = [1] * len(shape)
  left = math.prod(shape[d] for d in axes) if size is None else size
  for d in axes:
    n = shape[d]
    if n <= left:
      block[d], left = n, left // n
      continue
    fitting = [k for k in range(left, (left + 1) // 2 - 1, -1) if k and n % k == 0]
    if fitting:
      block[d] = fitting[0]
    elif math.prod(block) * 8 < (size or 1):
      block[d] = next(k for k in range(left, n + 1) if n % k == 0)
    break
  return tuple(block)


def in_blocks(x: jax.Array, block: Sequence[int]) -> tuple[jax.Array, tuple[int, ...]]:
  """An array with every axis as two, which block and which element of it; and the axes of the elements."""
  sizes = [k for n, b in zip(x.shape, block, strict=True) for k in (n // b, b)]
  return x.reshape(sizes), tuple(range(1, 2 * x.ndim, 2))


def spread(part: jax.Array, shape: Sequence[int]) -> jax.Array:
  """A part with a number for each block as an array with a number for each element, or one that broadcasts to it."""
  sizes: list[int] = []
  places: list[int] = []
  out: list[int] = []
  for n, k in zip(shape, part.shape, strict=True):
    places.append(len(sizes))
    sizes += [k] if k in (1, n) else [k, n // k]
    out.append(k if k in (1, n) else n)
  if len(sizes) == part.ndim:
    return part
  return lax.reshape(lax.broadcast_in_dim(part, sizes, places), out)


def fits(part: Sequence[int], shape: Sequence[int]) -> bool:
  """Whether a part of these sizes has a number for each block of an array."""
  return len(part) == len(shape) and all(k == n or (k and n % k == 0) for n, k in zip(shape, part, strict=True))


def reshaped(part: Sequence[int], old: Sequence[int], new: Sequence[int]) -> tuple[int, ...] | None:
  """The sizes of a part when what it scales is reshaped; `None` where a block would no longer be one of a part."""
  out = [1] * len(new)
  for left, right in reshape_groups(old, new):
    run = _run([old[d] for d in left], [part[d] for d in left])
    if run is None:
      return None
    for d in reversed(right):
      n = new[d]
      if run % n == 0:
        run //= n
      elif n % run == 0:
        out[d], run = n // run, 1
      else:
        return None
    if run != 1:
      return None
  return tuple(out)


def _run(sizes: Sequence[int], part: Sequence[int]) -> int | None:
  """How many consecutive elements of some flattened axes share a number; `None` where those are not consecutive."""
  run, whole = 1, True
  for n, k in zip(reversed(sizes), reversed(part), strict=True):
    if n == 1:
      continue
    if k != n and not whole:
      return None
    run *= n // k
    whole = whole and k == 1
  return run


def cut(part: int, size: int, start: Any, stop: Any) -> tuple[Any, Any] | None:
  """The bounds of a part when an axis of what it scales is cut; `None` where they fall inside of a block."""
  if part == 1:
    return 0, 1
  block = size // part
  return None if start % block or stop % block else (start // block, stop // block)
