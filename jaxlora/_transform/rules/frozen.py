"""Quantised weights without an adapter: whatever `bind_coded` can do with their codes."""

from collections.abc import Sequence
from typing import Any

from jaxlora._jax.primitives import BARRIERS, IDENTITIES, PLACEMENTS, TRANSFERS
from jaxlora._transform.coded import ELEMENTWISE, Coded
from jaxlora._transform.coded_equations import BILINEAR, LAYOUT
from jaxlora._transform.factored import TracedWeight, Unfactorable
from jaxlora._transform.frozen import CODES, FrozenWeight
from jaxlora._transform.rule import Op, rule
from jaxlora._transform.rules.layout import barrier
from jaxlora._transform.rules.linear import is_scaled
from jaxlora._transform.rules.placement import device_put

rule(*BARRIERS, kind=FrozenWeight)(barrier)
rule(*TRANSFERS, kind=FrozenWeight)(device_put)


@rule(*BILINEAR, *LAYOUT, *IDENTITIES, *PLACEMENTS, "split", "gather", kind=FrozenWeight)
def _by_codes(op: Op, args: Sequence[Any]) -> list[Any]:
  weights: list[Any] = [arg for arg in args if isinstance(arg, TracedWeight)]
  if len(weights) > 1:
    raise Unfactorable("an equation of two weights")
  op.note(CODES)
  out = op.bind(*(arg.base if isinstance(arg, FrozenWeight) else arg for arg in args))
  if op.primitive.name == "gather":  # what is looked up is used as an array
    return [op.formed(value) for value in out]
  return [weights[0].on(value) if isinstance(value, Coded) else value for value in out]


@rule(*ELEMENTWISE, kind=FrozenWeight)
def _put_off(op: Op, args: Sequence[Any]) -> list[Any]:
  if not is_scaled(op, args):
    raise Unfactorable("a product with something that is not a scalar")
  return _by_codes(op, args)
