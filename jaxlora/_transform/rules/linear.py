"""Linear in the weight: casts, signs and scalar factors."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from jaxlora._base.dtypes import beside
from jaxlora._jax.primitives import CASTS, NEGATIONS, ROUNDINGS, SCALINGS
from jaxlora._transform.factored import TracedWeight, Unfactorable
from jaxlora._transform.rule import Op, only_weight, rule
from jaxlora._transform.rules.layout import args_with


@rule(*ROUNDINGS)
def _rounded(op: Op, args: Sequence[Any]) -> list[Any]:
  """A cast to a format that no dtype has: of the base, as with any cast the factors stay finer."""
  w = only_weight(args)
  return [w.replace(base=op.bind(w.base)[0])]


@rule(*CASTS)
def _cast(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  dtype = op.params["new_dtype"]
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise Unfactorable(f"a cast to {jnp.dtype(dtype).name}")
  return [w.mapped(lambda factor, own: beside(factor, dtype), base=op.bind(w.base)[0])]


@rule(*NEGATIONS)
def _neg(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  return [w.replace(base=op.bind(w.base)[0], b=-w.b)]


@rule(*SCALINGS)
def _scale(op: Op, args: Sequence[Any]) -> list[Any]:
  """Times or over a scalar. Only one factor takes it: the product is linear in each."""
  w: Any = args[0] if isinstance(args[0], TracedWeight) else args[1]
  if not is_scaled(op, args):
    raise Unfactorable("a product with something that is not a scalar")
  base = op.bind(*args_with(args, w.base))[0]
  b = op.bind(*args_with(args, w.b))[0]
  return [w.replace(base=base, b=b)]


def is_scaled(op: Op, args: Sequence[Any]) -> bool:
  """Whether an equation is a weight times or over a scalar, or takes a weight alone."""
  if len(args) == 1:
    return True
  w, scalar = args if isinstance(args[0], TracedWeight) else args[::-1]
  return not (
    isinstance(scalar, TracedWeight) or jnp.ndim(scalar) != 0 or (op.primitive.name == "div" and w is args[1])
  )
