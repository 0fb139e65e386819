"""Differentiating a region as one."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._jax.jaxpr import equation_context
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.regions import Region
from jaxlora._platform.wait import late, uses


def light(
  region: Region, values: Sequence[Any], taps: Callable[[Any, Any], Any], factors: Sequence[Any]
) -> tuple[Any, Any, Any]:
  """A region, of which the backward pass keeps little, together with what is linear in its result.

  The derivative makes the result again once, for the region's own sake and for the taps'.

  Args:
    region: what to evaluate.
    values: of its inputs.
    taps: `taps(result, factors)`, bilinear.
    factors: arrays, perhaps none.

  Returns:
    The result; the small variables, as constants; `taps(result, factors)`.
  """
  with equation_context(region.equations[-1]):
    return traced_once(_Light(_Comparable(region), taps), list(values), list(factors))


class _Comparable:
  """A region as a value: equal to every other one with its signature."""

  def __init__(self, region: Region):
    self.region = region
    self.signature = region.signature()
    try:
      self.hash = hash(self.signature)
    except TypeError:  # a parameter that cannot be compared: it is like no other
      self.signature = object()
      self.hash = hash(self.signature)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Comparable) and self.signature == other.signature

  def __hash__(self) -> int:
    return self.hash


@dataclasses.dataclass(frozen=True)
class _Light:
  """See `light`."""

  comparable: _Comparable
  taps: Callable[[Any, Any], Any]

  def __call__(self, values: list[Any], factors: list[Any]) -> tuple[Any, Any, Any]:
    region, taps = self.comparable.region, self.taps
    place = region.inputs.index(region.root)

    @jax.custom_jvp
    def call(values, factors):
      env = region.evaluate(values)
      return env[region.result], [env[var] for var in region.small], taps(env[region.result], factors)

    def jvp(primals, tangents):
      result, small, tapped = call(*primals)
      values, factors = primals
      moving = [[k for k, step in enumerate(steps) if not isinstance(step, SymbolicZero)] for steps in tangents]
      steps = [[steps[k] for k in numbers] for steps, numbers in zip(tangents, moving, strict=True)]
      along = _along(region, taps, *moving, from_result=True)
      kept = (values, factors, small, result)
      if not region.softmax() or uses(along, kept, steps)[place]:
        along = _along(region, taps, *moving, from_result=False)
      d_result, d_tapped = late(along, kept, steps)
      if d_result is None:
        return (result, small, tapped), (*jax.tree.map(_standing_still, (result, small)), d_tapped)
      return (result, small, tapped), (d_result, _of_small(region, values, moving[0], steps[0]), d_tapped)

    call.defjvp(jvp, symbolic_zeros=True)
    result, small, tapped = call(values, factors)
    return result, list(map(jax.lax.stop_gradient, small)), tapped


def _standing_still(value: Any) -> SymbolicZero:
  return SymbolicZero(jax.typeof(value))


def _of_small(region: Region, values: Sequence[Any], inputs: Sequence[int], steps: Sequence[Any]) -> list[Any]:
  """The derivative of the small variables, of which only second derivatives make use."""

  def small(*some):
    env = region.evaluate(with_some(values, inputs, some))
    return [env[var] for var in region.small]

  return jax.jvp(small, [values[k] for k in inputs], list(steps))[1]


def _along(
  region: Region, taps: Callable[[Any, Any], Any], inputs: Sequence[int], factors: Sequence[int], *, from_result: bool
) -> Callable[[Any, Any], Any]:
  """The derivative as a function of what is kept, and of the tangents of the numbered inputs and factors.

  d taps = taps(d result, factors) + taps(result again, d factors)
  """

  def along(kept, steps):
    values, all_factors, small, result = kept
    instead = dict(zip(region.small, small, strict=True))
    if from_result and (parts := region.softmax()):
      over, under = parts
      instead[over] = result * instead[under]

    def of_inputs(*some):
      return region.evaluate(with_some(values, inputs, some), instead)[region.result]

    start = [values[k] for k in inputs]
    again, d_result = jax.jvp(of_inputs, start, list(steps[0])) if inputs else (of_inputs(), None)
    terms = [taps(d_result, all_factors)] if inputs else []
    if factors:
      terms.append(taps(again, with_some(list(map(jnp.zeros_like, all_factors)), factors, steps[1])))
    return d_result, jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *terms)

  return along


def with_some(values: Sequence[Any], numbers: Sequence[int], some: Sequence[Any]) -> list[Any]:
  """The values, with others in the numbered places."""
  out = list(values)
  for k, value in zip(numbers, some, strict=True):
    out[k] = value
  return out


def again(region: Region) -> Callable[[Sequence[Any]], Any]:
  """The result again, from the inputs and the small variables."""
  split = len(region.inputs)

  def make(operands: Sequence[Any]) -> Any:
    instead = dict(zip(region.small, operands[split:], strict=True))
    return region.evaluate(operands[:split], instead)[region.result]

  return make
