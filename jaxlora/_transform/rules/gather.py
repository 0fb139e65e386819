"""Lookups."""

from collections.abc import Sequence
from typing import Any

from jax import lax

from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._transform.factored import Factored, Unfactorable
from jaxlora._transform.rule import Op, only_weight, rule
from jaxlora._transform.rules.dot import times
from jaxlora._transform.rules.layout import args_with
from jaxlora._weight.roles import RANK, factor_axes, laid_along


def _moving_axis(op: Op, shape: Sequence[int]) -> int | None:
  """The one axis that a slice of whole other axes moves along, where a gather is written so: `vmap` of `w[k]`."""
  numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
  moving = [d for d in numbers.start_index_map if sizes[d] != shape[d]]
  clipped = op.params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)
  written_so = len(numbers.start_index_map) > 1 and len(moving) == 1 and sizes[moving[0]] == 1
  return moving[0] if written_so and clipped else None


def _batched_slice(op: Op, w: Factored, indices: Any, axis: int) -> list[Any]:
  """That slice as a lookup along its axis; the axis of size 1 that it keeps is put back afterwards."""
  numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
  k = numbers.start_index_map.index(axis)
  gone = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  offsets = dict(zip((d for d in range(len(sizes)) if d not in gone), numbers.offset_dims, strict=True))
  place = offsets.get(axis)
  if set(numbers.collapsed_slice_dims) - {axis}:
    raise Unfactorable("a gather of more than whole slices along one axis")
  simple = {
    "dimension_numbers": numbers._replace(
      offset_dims=tuple(o - (place is not None and o > place) for o in numbers.offset_dims if o != place),
      collapsed_slice_dims=(axis,),
      start_index_map=(axis,),
    )
  }
  lookup = op._replace(params=op.params | simple, bind=lambda *args: op.bind(*args, **simple))
  (out,) = _gather(lookup, [w, lax.slice_in_dim(indices, k, k + 1, axis=-1)])
  if place is None:
    return [out]
  if not isinstance(out, Factored):
    return [lax.expand_dims(out, (place,))]
  base = lax.expand_dims(out.base, (place,))
  return [out.reshaped(base.shape, out.roles[:place] + "s" + out.roles[place:], base)]


@rule("gather")
def _gather(op: Op, args: Sequence[Any]) -> list[Any]:
  """A lookup along one axis: `take(W, ids) = take(base, ids) + take(A, ids) B` for an axis of role `i`."""
  w = only_weight(args)
  indices = args[1]
  if (moving := _moving_axis(op, w.shape)) is not None:
    return _batched_slice(op, w, indices, moving)
  numbers, sizes = op.params["dimension_numbers"], op.params["slice_sizes"]
  batching = tuple(numbers.operand_batching_dims)
  looked_up = tuple(numbers.start_index_map)
  if len(looked_up) != 1 or tuple(numbers.collapsed_slice_dims) != looked_up or sizes[looked_up[0]] != 1:
    raise Unfactorable("a gather of more than whole slices along one axis")
  axis = looked_up[0]
  whole = [d for d in range(len(w.roles)) if d != axis and d not in batching]
  if any(sizes[d] != w.shape[d] for d in whole):
    raise Unfactorable("a gather of parts of slices")
  if any(w.roles[d] != "s" for d in batching):
    raise Unfactorable("a gather batched over an axis that is not stacked")

  # Labels of the result: the gathered axes stand where offset_dims says, the index's own axes fill the rest in order.
  rank_of_result = len(numbers.offset_dims) + indices.ndim - 1
  offsets = dict(zip(numbers.offset_dims, whole, strict=True))
  index_labels: list[Any] = [("x", k) for k in range(indices.ndim - 1)]
  for d, k in zip(batching, numbers.start_indices_batching_dims, strict=True):
    index_labels[k] = d
  remaining = iter(index_labels)
  result_labels = [offsets[k] if k in offsets else next(remaining) for k in range(rank_of_result)]

  def looked_up_in(factor, own):
    """The factor's rows: index axes, then its own other axes; whole where it lacks the axis."""
    axes = factor_axes(w.roles, own)
    if axis not in axes:
      return Labelled(factor, axes)
    kept = [d for d in axes if d != axis and d not in batching]
    out = lax.gather(
      factor,
      indices,
      lax.GatherDimensionNumbers(
        offset_dims=tuple(range(len(index_labels), len(index_labels) + len(kept))),
        collapsed_slice_dims=(axes.index(axis),),
        start_index_map=(axes.index(axis),),
        operand_batching_dims=tuple(axes.index(d) for d in batching),
        start_indices_batching_dims=numbers.start_indices_batching_dims,
      ),
      slice_sizes=tuple(1 if d == axis or d in batching else factor.shape[k] for k, d in enumerate(axes)),
      mode=op.params["mode"],
      fill_value=0,  # out of bounds the base alone has the fill: the update is zero there, and so is its gradient
    )
    return Labelled(out, (*index_labels, *kept))

  base = op.bind(*args_with(args, w.base))[0]
  a, b = looked_up_in(w.a, "i"), looked_up_in(w.b, "o")
  if w.roles[axis] != "s":
    base = op.formed(base)
    delta = contract(a, b, [RANK], Result(base.dtype)).ordered(result_labels)
    result = op.policy.sum(base, delta, op.looping)
    if w.gain is None:
      return [result]
    gain = looked_up_in(w.gain, w.gained)  # along the index's own axes where those are stacked
    return [times(result, laid_along(gain.array, gain.labels, result_labels))]

  # Along a stacked axis the result is again a weight: which expert, which layer.
  roles = "".join("s" if isinstance(label, tuple) else w.roles[label] for label in result_labels)

  def laid_out(factor, own):
    return factor.ordered([d if d == RANK else result_labels[d] for d in factor_axes(roles, own)])

  gain = None if w.gain is None else laid_out(looked_up_in(w.gain, w.gained), w.gained)
  return [w.replace(base=base, a=laid_out(a, "i"), b=laid_out(b, "o"), gain=gain, roles=roles)]
