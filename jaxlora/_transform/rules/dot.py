"""Matrix products: the base's own product, and beside it the two thin ones."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.explicit import sharded_as
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, dropped
from jaxlora._transform.pairing import Pairing, meeting
from jaxlora._transform.product import Product, Weight, product_of
from jaxlora._transform.products import dot, dot_separately
from jaxlora._transform.rule import AHEAD, Ahead, Op, rule
from jaxlora._weight.roles import RANK, factor_axes, laid_along


def operands(args: Sequence[Any]) -> tuple[Any, Any, bool]:
  """The weight of a `dot_general`, its input, and whether the weight is the left operand."""
  lhs, rhs = args
  if isinstance(lhs, TracedWeight) and isinstance(rhs, TracedWeight):
    raise Unfactorable("the product of two adapted weights")
  return (lhs, rhs, True) if isinstance(lhs, TracedWeight) else (rhs, lhs, False)


def met(params: dict[str, Any], w: Any, weight_first: bool) -> tuple[Any, Pairing]:
  """The weight as a product meets it, with no axis of role `o` contracted, and how it does."""
  pairing, roles, flips = meeting(params, w.shape, w.roles, weight_first)
  w = w.with_roles(roles)
  return (w.flipped() if flips else w), pairing


@rule("dot_general")
def dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  """`x W + h B`, times the gain of the weight's variant."""
  w, x, weight_first = operands(args)
  w, pairing = met(op.params, w, weight_first)
  result = op.ahead if op.ahead is not None else product(op, x, w, pairing)
  if w.gain is not None and w.gained == "o":
    result = gained_after(result, w, pairing.result_labels(jnp.ndim(x), len(w.roles)))
  return [result]


def product(op: Op, x: Any, w: Factored, pairing: Pairing) -> Any:
  """`x W + h B`."""
  recipe = op.recipe(x)
  if w.gain is not None and w.gained == "i":
    x, recipe = gained_before(x, w, pairing.input_labels(x.ndim)), None
  u, recipe = dropped(x, w, op.use, recipe)
  which = product_of(op.primitive, op.params, x, w, pairing, op.result, op.policy, op.looping)
  if op.policy.joins and u is x and jnp.issubdtype(x.dtype, jnp.floating):
    return dot(x, which, (w.base, w.a, w.b), recipe)
  shrink = lambda product, x, a: op.shrink(product, x, a, recipe)
  return dot_separately(x, u, which, (w.base, w.a, w.b), shrink)


def ahead(given: Ahead) -> tuple[Product, Weight] | None:
  """A product and its weight, where it may be computed ahead of the rest; else `None`."""
  if given.w.key is not None or "s" in given.w.roles or not given.policy.joins:
    return None
  try:
    w, pairing = met(given.params, given.w, given.weight_first)
  except Unfactorable:
    return None
  if w.gained == "i" and w.gain is not None:
    return None
  which = product_of(given.primitive, given.params, given.x, w, pairing, given.out, given.policy, given.looping)
  return which, (w.base, w.a, w.b)


AHEAD[Factored] = ahead


# ----------------------------------------------------------------------------------------------------------------------
# The gain of a variant.


def gained_before(x: Any, w: Factored, labels: Sequence[Any]) -> Any:
  """The input of a product that contracts the axes over which the weight has a gain."""
  if not jnp.issubdtype(x.dtype, jnp.inexact):
    raise Unfactorable("integers meet a weight along the axes that its variant scales")
  return times(x, gain_along(w, labels, "leaves one free"))


def gained_after(result: Any, w: Factored, labels: Sequence[Any]) -> Any:
  """The result of a product times the weight's gain along its outputs."""
  return times(result, gain_along(w, labels, "sums over one"))


def gain_along(w: Factored, labels: Sequence[Any], otherwise: str) -> jax.Array:
  """The weight's gain beside an array with these labels, which must have every axis of it."""
  axes = factor_axes(w.roles, w.gained)
  if set(axes) - {RANK} - set(labels):
    raise Unfactorable(f"of the axes along which its variant scales the weight, the product {otherwise}")
  return laid_along(w.gain, axes, labels)


def times(x: jax.Array, gain: jax.Array) -> jax.Array:
  """`x` times a gain that lies along some of its axes, in the dtype of `x`."""
  return x * sharded_as(gain.astype(x.dtype), x)
