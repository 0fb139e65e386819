"""Layout: the axes of the weight move, and each factor follows with the axes it holds."""

from collections.abc import Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled
from jaxlora._base.reshape import reshape_groups
from jaxlora._jax.jaxpr import varying_axes
from jaxlora._jax.primitives import BARRIERS, IDENTITIES, REVERSALS, VARYING
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, rank_of
from jaxlora._transform.rule import Op, only_weight, rule
from jaxlora._weight.roles import RANK, factor_axes


def restricted(w: Factored, own: str, per_axis: Sequence[Any], rank_entry: Any) -> list[Any]:
  """A per-axis parameter of the weight, cut down to the axes that a factor holds."""
  return [rank_entry if d == RANK else per_axis[d] for d in factor_axes(w.roles, own)]


@rule("transpose")
def _transpose(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  permutation = tuple(int(d) for d in op.params["permutation"])
  return [permuted(w, permutation, op.bind(w.base)[0])]


def permuted(w: Factored, permutation: Sequence[int], base: Any) -> Factored:
  """`w` with its axes in a new order; `base` is the base already in that order."""
  roles = "".join(w.roles[d] for d in permutation)

  def moved(factor, own):
    wanted = [d if d == RANK else permutation[d] for d in factor_axes(roles, own)]
    return Labelled(factor, factor_axes(w.roles, own)).ordered(wanted)

  return w.mapped(moved, base=base, roles=roles)


def regrouped_roles(roles: str, old: Sequence[int], new: Sequence[int]) -> str | None:
  """The roles after a reshape; `None` where it merges axes of different roles. Axes of size 1 fit any group."""
  out = ["o"] * len(new)
  for left, right in reshape_groups(old, new):
    real = {roles[d] for d in left if old[d] != 1}
    if len(real) > 1:
      return None
    role = real.pop() if real else (roles[left[0]] if left else "o")
    for d in right:
      out[d] = role
  return "".join(out)


@rule("reshape")
def reshape(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  new = tuple(op.params["new_sizes"])
  given = w.base
  if op.params.get("dimensions") is not None:  # a transposition first
    sizes = [w.shape[d] for d in op.params["dimensions"]]
    w = permuted(w, op.params["dimensions"], jax.ShapeDtypeStruct(sizes, given.dtype))  # of the base, its sizes alone
  if 0 in new:
    raise Unfactorable("a reshape of nothing")
  roles = regrouped_roles(w.roles, w.shape, new)
  if roles is None:
    raise Unfactorable(f"a reshape from {w.shape} to {new} that merges axes of different roles ({w.roles!r})")
  return [w.reshaped(new, roles, op.bind(given)[0])]


@rule("squeeze")
def squeeze(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  gone = {int(d) for d in op.params["dimensions"]}
  base = op.bind(w.base)[0]
  roles = "".join(role for d, role in enumerate(w.roles) if d not in gone)
  return [w.reshaped(base.shape, roles, base)]


@rule("broadcast_in_dim")
def _broadcast(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  shape = tuple(op.params["shape"])  # symbolic sizes among them, where a program is exported
  source = {int(out): d for d, out in enumerate(op.params["broadcast_dimensions"])}
  # A new axis only B needs to hold: its contraction and its batching then cost what they cost the base.
  roles = "".join(w.roles[source[d]] if d in source else "o" for d in range(len(shape)))

  def spread(factor, own):
    before, after = factor_axes(w.roles, own), factor_axes(roles, own)
    sizes = tuple(rank_of(w, factor) if d == RANK else shape[d] for d in after)
    places = tuple(after.index(d if d == RANK else int(op.params["broadcast_dimensions"][d])) for d in before)
    return lax.broadcast_in_dim(factor, sizes, places)

  return [w.mapped(spread, base=op.bind(w.base)[0], roles=roles)]


@rule("slice")
def _slice(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  start, limit = op.params["start_indices"], op.params["limit_indices"]
  strides = op.params["strides"] or (1,) * len(start)

  def cut(factor, own):
    return lax.slice(
      factor,
      restricted(w, own, start, 0),
      restricted(w, own, limit, rank_of(w, factor)),
      restricted(w, own, strides, 1),
    )

  return [w.mapped(cut, base=op.bind(w.base)[0])]


@rule("dynamic_slice")
def _dynamic_slice(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  starts = args[1:]
  if len(starts) != len(w.roles):
    raise Unfactorable("a dynamic slice with dynamic sizes")

  def cut(factor, own):
    zero = jnp.zeros((), jnp.asarray(starts[0]).dtype)
    indices = restricted(w, own, starts, zero)
    sizes = restricted(w, own, op.params["slice_sizes"], rank_of(w, factor))
    # The primitive clamps its starts; negative ones were counted from the end before they came here.
    return lax.dynamic_slice(factor, indices, sizes, allow_negative_indices=False)

  return [w.mapped(cut, base=op.bind(*args_with(args, w.base))[0])]


def args_with(args: Sequence[Any], base: Any) -> list[Any]:
  """The operands with the base in the weight's place."""
  return [base if isinstance(arg, TracedWeight) else arg for arg in args]


@rule("split")
def _split(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  axis, sizes = int(op.params["axis"]), [int(size) for size in op.params["sizes"]]
  bases = op.bind(w.base)

  def pieces(factor, own):
    axes = factor_axes(w.roles, own)
    return lax.split(factor, sizes, axis=axes.index(axis)) if axis in axes else [factor] * len(sizes)

  gains = [None] * len(sizes) if w.gain is None else pieces(w.gain, w.gained)
  parts = zip(bases, pieces(w.a, "i"), pieces(w.b, "o"), gains, strict=True)
  return [w.replace(base=base, a=a, b=b, gain=gain) for base, a, b, gain in parts]


@rule(*REVERSALS)
def _rev(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  dimensions = {int(d) for d in op.params["dimensions"]}

  def reversed_(factor, own):
    return lax.rev(factor, [k for k, d in enumerate(factor_axes(w.roles, own)) if d in dimensions])

  return [w.mapped(reversed_, base=op.bind(w.base)[0])]


@rule(*IDENTITIES)
def _each(op: Op, args: Sequence[Any]) -> list[Any]:
  """Identities on one value: what they say of the weight holds of its parts.

  Under `shard_map` factors may differ from shard to shard where their base does not: nothing has to say so again.
  """
  w = only_weight(args)
  axes = op.params.get("axes") if op.primitive.name in VARYING else None

  def on_part(part: Any, own: str = "") -> Any:
    del own
    if axes is None:
      return op.bind(part)[0]
    left = tuple(axis for axis in axes if axis not in varying_axes(jax.tree.leaves(part)[0]))
    return op.bind(part, axes=left)[0] if left else part

  return [w.mapped(on_part, base=on_part(w.base))]


@rule(*BARRIERS)
def barrier(op: Op, args: Sequence[Any]) -> list[Any]:
  """An identity on several values at once: the parts of the weights take their places among them."""
  held = [arg.replace(key=None) if isinstance(arg, TracedWeight) else arg for arg in args]
  parts, treedef = jax.tree.flatten(held)
  out = jax.tree.unflatten(treedef, op.bind(*parts))
  return [
    new.replace(key=arg.key) if isinstance(arg, TracedWeight) else new for arg, new in zip(args, out, strict=True)
  ]
