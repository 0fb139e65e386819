"""The derivative of a region as one, of which the backward pass keeps little.

    y = region(x),  h_k = y A_k^T;    kept: x and the statistics of its rows; of a softmax y itself, and not x

What is linear in the region's result, the first thin products of adapted weights, is differentiated with it, so that
the result is rematerialised once for all.
"""

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
from jaxlora._platform.wait import Wait, late, residuals_used

Shrinks = Callable[[Any, Any], Any]  # `(result, factors) -> thin products`, bilinear


def evaluate_region(
  region: Region, values: Sequence[Any], shrinks: Shrinks, factors: Sequence[Any], wait: Wait
) -> tuple[Any, Any, Any]:
  """A region's result, together with the thin products that read it.

  Args:
    region: what to evaluate.
    values: of its inputs.
    shrinks: `shrinks(result, factors)`, bilinear.
    factors: arrays, perhaps none.
    wait: how residuals wait for their cotangents.

  Returns:
    The result; the small variables, as constants; `shrinks(result, factors)`.
  """
  with equation_context(region.equations[-1]):
    return traced_once(_Evaluated(_Comparable(region), shrinks, wait), list(values), list(factors))


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
class _Evaluated:
  """See `evaluate_region`; equal for regions that are alike, so that it is traced once for all of them."""

  comparable: _Comparable
  shrinks: Shrinks
  wait: Wait

  def __call__(self, values: list[Any], factors: list[Any]) -> tuple[Any, Any, Any]:
    region, shrinks = self.comparable.region, self.shrinks
    place = region.inputs.index(region.root)

    @jax.custom_jvp
    def call(values, factors):
      env = region.evaluate(values)
      return env[region.result], [env[var] for var in region.small], shrinks(env[region.result], factors)

    def jvp(primals, tangents):
      result, small, thin = call(*primals)
      values, factors = primals
      moving = [[k for k, step in enumerate(steps) if not isinstance(step, SymbolicZero)] for steps in tangents]
      steps = [[steps[k] for k in numbers] for steps, numbers in zip(tangents, moving, strict=True)]
      along = _along(region, shrinks, *moving, from_result=True)
      kept = (values, factors, small, result)
      if not region.softmax() or residuals_used(along, kept, steps)[place]:
        along = _along(region, shrinks, *moving, from_result=False)
      d_result, d_thin = late(along, kept, steps, self.wait)
      if d_result is None:
        return (result, small, thin), (*jax.tree.map(_no_tangent, (result, small)), d_thin)
      return (result, small, thin), (d_result, _of_small(region, values, moving[0], steps[0]), d_thin)

    call.defjvp(jvp, symbolic_zeros=True)
    result, small, thin = call(values, factors)
    return result, list(map(jax.lax.stop_gradient, small)), thin


def _no_tangent(value: Any) -> SymbolicZero:
  return SymbolicZero(jax.typeof(value))


def _of_small(region: Region, values: Sequence[Any], inputs: Sequence[int], steps: Sequence[Any]) -> list[Any]:
  """The derivative of the small variables, of which only second derivatives make use."""

  def small(*some):
    env = region.evaluate(with_some(values, inputs, some))
    return [env[var] for var in region.small]

  return jax.jvp(small, [values[k] for k in inputs], list(steps))[1]


def _along(
  region: Region, shrinks: Shrinks, inputs: Sequence[int], factors: Sequence[int], *, from_result: bool
) -> Callable[[Any, Any], Any]:
  """The derivative as a function of what is kept, and of the tangents of the numbered inputs and factors.

  d h = shrinks(d result, factors) + shrinks(result rematerialised, d factors)
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
    terms = [shrinks(d_result, all_factors)] if inputs else []
    if factors:
      terms.append(shrinks(again, with_some(list(map(jnp.zeros_like, all_factors)), factors, steps[1])))
    return d_result, jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *terms)

  return along


def with_some(values: Sequence[Any], numbers: Sequence[int], some: Sequence[Any]) -> list[Any]:
  """The values, with `some` in the numbered places."""
  out = list(values)
  for k, value in zip(numbers, some, strict=True):
    out[k] = value
  return out


def rematerialised(region: Region) -> Callable[[Sequence[Any]], Any]:
  """A function from the inputs and the small variables to the result."""
  split = len(region.inputs)

  def make(operands: Sequence[Any]) -> Any:
    instead = dict(zip(region.small, operands[split:], strict=True))
    return region.evaluate(operands[:split], instead)[region.result]

  return make
