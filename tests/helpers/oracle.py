"""The oracle: what a wrapped function gives on a combined tree, its original must give on the merged one."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from tests.helpers.arrays import normal
from tests.helpers.policies import Under, on_devices


def loss_of(fn: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[Any], jax.Array]:
  """A scalar whose gradient reaches every element of the result with a weight of its own."""

  def loss(tree):
    out = jax.tree.leaves(fn(tree, *args))
    terms = [jnp.sum(y * normal(100 + k, y.shape, y.dtype)) for k, y in enumerate(out)]
    return jnp.sum(jnp.stack(terms).astype(terms[0].dtype))

  return loss


def sine_step(fn: Callable[..., Any], recompute: bool = True, **options: Any) -> Callable[..., Any]:
  """A training step's value and gradients: of the sum of sines of what `wrap(fn)` gives, by the factors."""
  wrapped = jaxlora.wrap(fn, recompute=recompute, on_materialize="error", **options)
  return jaxlora.value_and_grad(lambda tree, x: jnp.sum(jnp.sin(wrapped(tree, x))))


def frozen_step(fn: Callable[..., Any]) -> Callable[..., Any]:
  """What the frozen model's own step computes: forward, and the gradient of its input."""
  return jax.grad(lambda x, p: jnp.sum(jnp.sin(fn(p, x))))


def oracle(fn: Callable[..., Any]) -> Callable[..., Any]:
  """What `wrap(fn)` must equal."""
  return lambda tree, *args: fn(jaxlora.dequantize(jaxlora.merge(tree)), *args)


def assert_close(got: Any, want: Any, tolerance: float) -> None:
  """Every leaf, relative to the largest element of the expected one."""
  got_leaves, got_def = jax.tree.flatten(got)
  want_leaves, want_def = jax.tree.flatten(want)
  assert got_def == want_def
  for x, y in zip(got_leaves, want_leaves, strict=True):
    assert x.dtype == y.dtype
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * max(float(np.abs(y).max(initial=0)), 1e-3))


TOLERANCE = {jnp.float64: 1e-12, jnp.float32: 1e-5, jnp.bfloat16: 6e-2}


def check(
  fn: Callable[..., Any],
  tree: Any,
  args: tuple[Any, ...],
  tolerance: float,
  *,
  reverse: bool = True,
  on_materialize: str = "error",
  policies: Sequence[Under] = (Under({}),),
) -> None:
  """Values and the gradients of every factor, factored against merged.

  The function under all policies that run on as many devices, and the oracle, are one compilation.
  """
  for devices in sorted({policy.devices for policy in policies}):
    wraps = [functools.partial(jaxlora.wrap, **policy.options) for policy in policies if policy.devices == devices]
    functions = [*(wrap(fn, on_materialize=on_materialize) for wrap in wraps), oracle(fn)]
    halves = on_devices(devices, *jaxlora.split(tree), args)
    *found, want = jax.jit(functools.partial(_values_and_gradients, functions, reverse))(*halves)
    for got in found:
      assert_close(got, want, tolerance)


def _values_and_gradients(functions: Sequence[Any], reverse: bool, frozen: Any, trainable: Any, args: Any) -> list[Any]:
  """For each function its value, and its gradients by the factors; or a tangent, where there is no reverse mode."""
  tangent = jax.tree.map(lambda leaf: normal(5, leaf.shape, leaf.dtype), trainable)

  def one(f: Callable[..., Any]) -> Any:
    loss = loss_of(f, args)
    of_factors = lambda trainable: loss(jaxlora.join(frozen, trainable))
    out = f(jaxlora.join(frozen, trainable), *args)
    if reverse:
      return out, jax.grad(of_factors)(trainable)
    return out, jax.jvp(of_factors, (trainable,), (tangent,))

  return [one(f) for f in functions]
