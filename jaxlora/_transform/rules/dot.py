"""Matrix products: the base's own product, and beside it the two thin ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.labelled import explicitly_sharded
from jaxlora._platform.kept_sum import add
from jaxlora._platform.wait import late
from jaxlora._transform.factored import Factored, dropped, gained, picked
from jaxlora._transform.product import Pairing, Shrink, base_dot, dot, shrinking
from jaxlora._transform.rule import Op, Unfactorable, rule
from jaxlora._transform.rules.layout import with_roles
from jaxlora._transform.ways import GATHERED, choose_way, low_rank_part
from jaxlora._weight.roles import RANK, factor_axes, laid_along


def matched_sizes(w: Factored, groups: Sequence[tuple[Sequence[int], str]]) -> Factored:
  """Gives axes of size 1 the roles that a product wants of them; `groups` holds (axes, wanted role)."""
  roles = list(w.roles)
  for axes, role in groups:
    for d in axes:
      if w.shape[d] == 1:
        roles[d] = role
  return with_roles(w, "".join(roles))


def meeting(params: dict[str, Any], w: Factored, weight_first: bool) -> tuple[Factored, Pairing]:
  """How a `dot_general` brings its input and a weight together, of which no axis of role `o` is contracted.

  Axes of both roles may not be contracted together; where only `o` axes are, the factors trade places.
  """
  (contract, batch) = params["dimension_numbers"]
  contracted, batched = (
    {int(d): int(k) for d, k in zip(*(pair if weight_first else pair[::-1]), strict=True)} for pair in (contract, batch)
  )
  pairing = Pairing(contracted, batched, weight_first, params["precision"])
  summed = {w.roles[d] for d in pairing.contracted if w.shape[d] != 1} - {"s"}
  if len(summed) > 1:
    raise Unfactorable(f"a contraction across roles {sorted(summed)} of a weight with roles {w.roles!r}")
  if not summed:
    if any(w.shape[d] != 1 for d in pairing.contracted) or not pairing.contracted:
      raise Unfactorable("a product that contracts neither the input axes nor the output axes of the weight")
    summed = {"i"}
  w = matched_sizes(w, [(tuple(pairing.contracted), next(iter(summed)))])
  return (w.flipped() if "o" in summed else w), pairing


@rule("dot_general")
def _dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  lhs, rhs = args
  if isinstance(lhs, Factored) and isinstance(rhs, Factored):
    raise Unfactorable("the product of two adapted weights")
  weight_first = isinstance(lhs, Factored)
  w, x = (lhs, rhs) if weight_first else (rhs, lhs)
  w, pairing = meeting(op.params, w, weight_first)
  recipe = op.recipe(x)
  if w.gain is not None and w.gained == "i":
    x, recipe = gained_before(x, w, pairing.input_labels(x.ndim)), None
  base = base_product(op, x, w.base, pairing)
  if w.slot is not None:
    sharded = explicitly_sharded(x) or explicitly_sharded(base)
    op.took(way := GATHERED if sharded else choose_way(jnp.shape(x), w, pairing))
    if way != GATHERED:
      delta = low_rank_part(x, w, pairing, base.dtype, way, op.looping)
      return [add(base, delta, op.looping)]
    w = picked(w)
  u, recipe = dropped(x, w, op.use, recipe)
  result = dot(u, w, pairing, base, recipe, op.looping, op.h)
  if w.gain is not None and w.gained == "o":
    result = gained_after(result, w, pairing.result_labels(x.ndim, len(w.roles)))
  return [result]


def gained_before(x: Any, w: Factored, labels: Sequence[Any]) -> Any:
  """The input of a product that contracts the axes over which the weight has a gain."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise Unfactorable("integers meet a weight along the axes that its variant scales")
  return gained(x, gain_along(w, labels, "leaves one free"))


def gained_after(result: Any, w: Factored, labels: Sequence[Any]) -> Any:
  """The result of a product times the weight's gain along its outputs."""
  return gained(result, gain_along(w, labels, "sums over one"))


def gain_along(w: Factored, labels: Sequence[Any], otherwise: str) -> jax.Array:
  """The weight's gain beside an array with these labels, which must have every axis of it."""
  axes = factor_axes(w.roles, w.gained)
  if set(axes) - {RANK} - set(labels):
    raise Unfactorable(f"of the axes along which its variant scales the weight, the product {otherwise}")
  return laid_along(w.gain, axes, labels)


def base_product(op: Op, x: Any, base: Any, pairing: Pairing) -> Any:
  """The base's own product. Of a half-precision weight CPUs make a wider copy, which is not to be kept."""

  def product(base: Any, x: Any) -> Any:
    y = base_dot(x, base, pairing, op.result)
    return pairing.product(x, base, op.bind)[0] if y is None else y

  widened = base.dtype.itemsize == 2 and jax.default_backend() == "cpu" and not explicitly_sharded(x)
  if op.recompute and widened:
    return late(lambda leaves, x: product(leaves[0], x), (base,), x)
  return product(base, x)


def first_half(eqn: Any, w: Factored, weight_first: bool, looping: bool) -> tuple[Shrink, Any] | None:
  """The first thin product of a `dot_general`, and its A, where it may be computed ahead of the rest; else `None`."""
  if w.key is not None or "s" in w.roles:
    return None
  try:
    w, pairing = meeting(eqn.params, w, weight_first)
  except Unfactorable:
    return None
  if w.gained == "i" and w.gain is not None:
    return None
  x, out = eqn.invars[1 if weight_first else 0].aval, eqn.outvars[0].aval
  if w.slot is not None:
    if choose_way(x.shape, w, pairing) != GATHERED:
      return None
    w = picked(w)
  return shrinking(x, w, pairing, out.dtype, looping=looping), w.a
