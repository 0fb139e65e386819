"""Rearranging a quantised array by its parts: each is rearranged as the array is, with its own sizes.

A move says what happens to an array of some sizes, and what the same is for a part that has a number for each block of
it; `None` where that falls inside of a block.

Reading order: the moves -> an equation as one.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.primitives import REVERSALS
from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.blocks import cut, reshaped

Sizes = Sequence[int]


class Move(NamedTuple):
  """A rearrangement.

  Attributes:
    apply: of an array.
    of_part: from the sizes of the array and of a part to the move of that part.
  """

  apply: Callable[[Any], Any]
  of_part: Callable[[Sizes, Sizes], "Move | None"]


def moved(node: QuantizedArray, move: Move) -> QuantizedArray | None:
  """The array rearranged; `None` where its parts do not follow."""
  parts: dict[str, Any] = {"codes": move.apply(node.codes)}
  for name, part in node.parts().items():
    if name != "codes":
      of_part = move.of_part(node.shape, tuple(part.shape))
      new = (
        None if of_part is None else moved(part, of_part) if isinstance(part, QuantizedArray) else of_part.apply(part)
      )
      if new is None:
        return None
      parts[name] = new
  return node.with_parts(parts)


# ----------------------------------------------------------------------------------------------------------------------
# The moves.


def _alike(apply: Callable[[Any], Any]) -> Move:
  """What is said of axes alone, and so holds of every part."""
  return Move(apply, lambda shape, part: _alike(apply))


def _reshape(new: Sizes) -> Move:
  def of_part(shape: Sizes, part: Sizes) -> Move | None:
    sizes = reshaped(part, shape, new)
    return None if sizes is None else _reshape(sizes)

  return Move(lambda x: lax.reshape(x, new), of_part)


def _slice(start: Sizes, stop: Sizes, strides: Sizes) -> Move:
  def of_part(shape: Sizes, part: Sizes) -> Move | None:
    bounds = []
    for n, k, first, last, step in zip(shape, part, start, stop, strides, strict=True):
      bound = (first, last) if k == n else cut(k, n, first, last)
      if bound is None or (step != 1 and k not in (1, n)):
        return None
      bounds.append((*bound, step if k == n else 1))
    return _slice(*zip(*bounds, strict=True))

  return Move(lambda x: lax.slice(x, start, stop, strides), of_part)


def _dynamic_slice(starts: Sequence[Any], sizes: Sizes) -> Move:
  def of_part(shape: Sizes, part: Sizes) -> Move | None:
    zero = jnp.zeros((), jnp.asarray(starts[0]).dtype)
    axes = []
    for n, k, first, size in zip(shape, part, starts, sizes, strict=True):
      if k not in (1, n) and size != n:
        return None
      axes.append((first, size) if k == n else (zero, k))
    return _dynamic_slice(*zip(*axes, strict=True))

  return Move(lambda x: lax.dynamic_slice(x, starts, sizes, allow_negative_indices=False), of_part)


def _expand(shape: Sizes, places: Sizes) -> Move:
  def of_part(old: Sizes, part: Sizes) -> Move:
    del old
    return _expand([part[places.index(d)] if d in places else 1 for d in range(len(shape))], places)

  return Move(lambda x: lax.broadcast_in_dim(x, shape, places), of_part)


def lookup(indices: jax.Array, axis: int, numbers: Any, sizes: Sizes, mode: Any) -> Move:
  """Slices along one axis. What is out of bounds is NaN, where the mode says so, by its scale."""

  def apply(x: Any) -> Any:
    of_codes = not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype.itemsize == 1
    return lax.gather(x, indices, numbers, tuple(sizes), mode=lax.GatherScatterMode.CLIP if of_codes else mode)

  def of_part(shape: Sizes, part: Sizes) -> Move:
    block = shape[axis] // part[axis]
    return lookup(indices // block, axis, numbers, [1 if d == axis else k for d, k in enumerate(part)], mode)

  return Move(apply, of_part)


# ----------------------------------------------------------------------------------------------------------------------
# An equation as one.


def moves_of(name: str, params: Mapping[str, Any], args: Sequence[Any], shape: Sizes) -> list[Move] | None:
  """The moves that an equation amounts to, one for each of its results; `None` where it is none.

  Args:
    name: of the primitive.
    params: its parameters.
    args: its operands, of which the first is the array.
    shape: of the array.
  """
  if name == "transpose":
    return [_alike(lambda x: lax.transpose(x, params["permutation"]))]
  if name == "squeeze":
    return [_alike(lambda x: lax.squeeze(x, params["dimensions"]))]
  if name in REVERSALS:
    return [_alike(lambda x: lax.rev(x, params["dimensions"]))]
  if name == "reshape" and params.get("dimensions") is None and 0 not in shape:
    return [_reshape(tuple(params["new_sizes"]))]
  if name == "broadcast_in_dim":
    places, sizes = tuple(params["broadcast_dimensions"]), tuple(params["shape"])
    expands = all(sizes[d] == 1 for d in range(len(sizes)) if d not in places)
    return [_expand(sizes, places)] if expands and tuple(sizes[d] for d in places) == tuple(shape) else None
  if name == "slice":
    ones = (1,) * len(shape)
    return [_slice(params["start_indices"], params["limit_indices"], params["strides"] or ones)]
  if name == "dynamic_slice" and len(args) == 1 + len(shape):
    return [_dynamic_slice(args[1:], tuple(params["slice_sizes"]))]
  return _pieces(params, shape) if name == "split" else None


def _pieces(params: Mapping[str, Any], shape: Sizes) -> list[Move]:
  axis, first, pieces = int(params["axis"]), 0, []
  for size in params["sizes"]:
    start, stop = [0] * len(shape), list(shape)
    start[axis], stop[axis] = first, first + int(size)
    pieces.append(_slice(tuple(start), tuple(stop), (1,) * len(shape)))
    first += int(size)
  return pieces


def lookup_of(params: Mapping[str, Any], indices: jax.Array, shape: Sizes) -> Move | None:
  """The move that a gather amounts to: of whole slices along one axis; `None` where it is another one."""
  numbers, sizes = params["dimension_numbers"], params["slice_sizes"]
  axes = tuple(numbers.start_index_map)
  if len(axes) != 1 or tuple(numbers.collapsed_slice_dims) != axes or numbers.operand_batching_dims:
    return None
  whole = all(size == (1 if d == axes[0] else n) for d, (n, size) in enumerate(zip(shape, sizes, strict=True)))
  fill = params["fill_value"]
  filled = fill is None or (isinstance(fill, float) and math.isnan(fill))  # any other is no scale's doing
  return lookup(indices, axes[0], numbers, sizes, params["mode"]) if whole and filled else None
