"""The derivative of a region as one, of which the backward pass keeps little.

    y = region(x),  h_k = y A_k^T;    kept: x and the statistics of its rows; of a softmax y itself, and not x

What is linear in the region's result, the first thin products of adapted weights, is differentiated with it, so that
the result is rematerialised once for all.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, Protocol

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._jax.jaxpr import equation_context
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.layouts import along_rows
from jaxlora._platform.policy import Forms, Policy
from jaxlora._platform.regions import Region
from jaxlora._platform.wait import TransposeOf, at_once, by_barrier, late, residuals_used


class Shrinks(Protocol):
  """`(result, factors) -> thin products`, bilinear."""

  def __call__(self, x: Any, factors: Sequence[Any]) -> Any: ...

  def flat(self) -> "Shrinks":
    """The same for programs of one device."""


def evaluate_region(
  region: Region, values: Sequence[Any], shrinks: Shrinks, factors: Sequence[Any], policy: Policy
) -> tuple[Any, Any, Any]:
  """A region's result, together with the thin products that read it.

  Args:
    region: what to evaluate.
    values: of its inputs.
    shrinks: `shrinks(result, factors)`, bilinear.
    factors: arrays, perhaps none.
    policy: how residuals wait for their cotangents, and how thin products are written.

  Returns:
    The result; the small variables, as constants; `shrinks(result, factors)`.
  """
  with equation_context(region.equations[-1]):
    return traced_once(_Evaluated(Comparable(region), shrinks, policy), list(values), list(factors))


class Comparable:
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
    return isinstance(other, Comparable) and self.signature == other.signature

  def __hash__(self) -> int:
    return self.hash


@dataclasses.dataclass(frozen=True)
class _Evaluated:
  """See `evaluate_region`; equal for regions that are alike, so that it is traced once for all of them."""

  comparable: Comparable
  shrinks: Shrinks
  policy: Policy

  def __call__(self, values: list[Any], factors: list[Any]) -> tuple[Any, Any, Any]:
    region, shrinks = self.comparable.region, self.shrinks
    place = region.inputs.index(region.root)

    @jax.custom_jvp
    def call(values, factors):
      env = region.evaluate(values)
      result = env[region.result]
      forms = Forms(shrinks, shrinks.flat(), in_tiles=shrinks)
      thin = self.policy.lowered(forms, result, factors) if factors else []
      return result, [env[var] for var in region.small], thin

    def jvp(primals, tangents):
      result, small, thin = call(*primals)
      values, factors = primals
      moving = [[k for k, step in enumerate(steps) if not isinstance(step, SymbolicZero)] for steps in tangents]
      steps = [[steps[k] for k in numbers] for steps, numbers in zip(tangents, moving, strict=True)]
      along = functools.partial(_along, region, inputs=moving[0], factors=moving[1])
      kept = (values, factors, small, result)
      from_root, from_result = (along(shrinks, from_result=from_result) for from_result in (False, True))
      of_result = region.softmax() is not None and not residuals_used(from_result, kept, steps)[place]
      chosen, wait = (from_result, self.policy.wait_softmax) if of_result else (from_root, self.policy.wait)
      rows = place if is_norm(region) and self.policy.keeps_rows else None
      forms = Forms(
        flat=TransposeOf(along(shrinks.flat(), from_result=of_result), jax.tree.structure(steps), wait),
        in_tiles=_TransposeApart(along(shrinks, from_result=of_result), is_norm(region), steps, rows),
      )
      d_result, d_thin = late(chosen, kept, steps, wait, self.policy.transposes(forms))
      if not moving[1]:
        d_thin = jax.tree.map(jnp.zeros_like, thin)
      if d_result is None:
        return (result, small, thin), (*jax.tree.map(_no_tangent, (result, small)), d_thin)
      return (result, small, thin), (d_result, _of_small(region, values, moving[0], steps[0]), d_thin)

    call.defjvp(jvp, symbolic_zeros=True)
    result, small, thin = call(values, factors)
    return result, list(map(jax.lax.stop_gradient, small)), thin


class _TransposeApart:
  """The transpose that programs for TPUs are given.

  XLA's TPU backend sees for itself what the forward pass has made, and keeps it or not. It is left to, but for an
  activation whose thin product needs it again: kept beside its input, it would have to leave the chip's own memory.

  A norm's input is read along its rows, and in one thin product along its tokens. Left to itself, the compiler may keep
  it as that product likes it, and a scanned model then lays all layers' inputs out anew in each layer.
  """

  def __init__(self, along: Any, of_rows: bool, steps: Sequence[Any], rows: int | None):
    self.along = along
    self.of_rows = of_rows
    self.rows = rows  # which of the region's inputs is to be kept along its rows, if one is
    self.counts = [len(part) for part in steps]

  def __call__(self, residuals: Any, cotangents: Any, types: Sequence[Any]) -> Sequence[Any]:
    d_result, d_thin = cotangents
    if self.rows is not None:
      values, *others = residuals
      residuals = (with_some(values, [self.rows], [along_rows(values[self.rows])]), *others)
    inputs, factors = types[: self.counts[0]], types[self.counts[0] :]
    zeros = [jnp.zeros(like.shape, like.dtype) for like in types]
    out = []
    if inputs:
      of_inputs = lambda *steps: self.along(residuals, [list(steps), zeros[self.counts[0] :]])[0]
      out += jax.linear_transpose(of_inputs, *inputs)(d_result)
    if factors:
      leaves, treedef = jax.tree.flatten(residuals)
      wait = at_once if self.of_rows else by_barrier
      kept = jax.tree.unflatten(treedef, wait(leaves, jax.tree.leaves(d_thin)))
      of_factors = lambda *steps: self.along(kept, [zeros[: self.counts[0]], list(steps)])[1]
      out += jax.linear_transpose(of_factors, *factors)(d_thin)
    return out


def _no_tangent(value: Any) -> SymbolicZero:
  return SymbolicZero(jax.typeof(value))


def _of_small(region: Region, values: Sequence[Any], inputs: Sequence[int], steps: Sequence[Any]) -> list[Any]:
  """The derivative of the small variables, of which only second derivatives make use."""

  def small(*some):
    env = region.evaluate(with_some(values, inputs, some))
    return [env[var] for var in region.small]

  return jax.jvp(small, [values[k] for k in inputs], list(steps))[1]


def _along(
  region: Region, shrinks: Shrinks, *, inputs: Sequence[int], factors: Sequence[int], from_result: bool
) -> Callable[[Any, Any], Any]:
  """The derivative as a function of what is kept, and of the tangents of the numbered inputs and factors.

      d h = shrinks(result rematerialised, d factors)

  Along the result, `h` is differentiated with the products that it is a part of. A softmax `y = exp(z) / sum(exp(z))`
  needs nothing else for its own derivative, `d y = y (d z - sum(y d z))`.
  """
  softmax = region.softmax() if from_result else None

  def along(kept, steps):
    values, all_factors, small, result = kept
    instead = dict(zip(region.small, small, strict=True))
    if softmax is not None:
      instead[softmax.over] = result

    def of_inputs(*some):
      env = region.evaluate(with_some(values, inputs, some), instead)
      return env[region.result] if softmax is None else (env[softmax.exponent], env[softmax.under])

    start = [values[k] for k in inputs]
    again, d_result = jax.jvp(of_inputs, start, list(steps[0])) if inputs else (of_inputs(), None)
    if softmax is not None:
      again, d_result = result, d_result and result * (d_result[0] - d_result[1])
    if not factors:
      return d_result, None
    return d_result, shrinks(again, with_some(list(map(jnp.zeros_like, all_factors)), factors, steps[1]))

  return along


def with_some(values: Sequence[Any], numbers: Sequence[int], some: Sequence[Any]) -> list[Any]:
  """The values, with `some` in the numbered places."""
  out = list(values)
  for k, value in zip(numbers, some, strict=True):
    out[k] = value
  return out


def is_norm(region: Region) -> bool:
  """Whether a region has statistics of rows, and is no softmax."""
  return bool(region.small) and region.softmax() is None


def rematerialised(region: Region) -> Callable[[Sequence[Any]], Any]:
  """A function from the inputs and the small variables to the result."""
  split = len(region.inputs)

  def make(operands: Sequence[Any]) -> Any:
    instead = dict(zip(region.small, operands[split:], strict=True))
    return region.evaluate(operands[:split], instead)[region.result]

  return make
