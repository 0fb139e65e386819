"""The sum of the base's product and the low-rank part: `x W + h B` as one array, or as part of what reads it."""

from typing import Any

import jax

from jaxlora._jax.by_platform import Form, by_platform
from jaxlora._jax.called import apart


def plain_sum(base: jax.Array, delta: jax.Array) -> jax.Array:
  """The sum, in the base product's dtype."""
  return base + delta.astype(base.dtype)


@jax.custom_jvp
def kept_sum(base: jax.Array, delta: jax.Array) -> jax.Array:
  """The sum; where it is differentiated, one array in the program.

  XLA's CPU backend would otherwise add the two wherever it reads them, and keep both for the backward pass. Other
  compilers add within the product, and are given a plain sum.
  """
  return plain_sum(base, delta)


@kept_sum.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return jax.jvp(sum_once, primals, tangents)


@jax.custom_jvp
def sum_once(base: jax.Array, delta: jax.Array) -> jax.Array:
  """The sum as one array."""
  return by_platform(plain_sum, {"cpu": Form(_apart)}, base, delta)


@sum_once.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return sum_once(*primals), jax.jvp(plain_sum, primals, tangents)[1]


def _apart(base: jax.Array, delta: jax.Array) -> jax.Array:
  return apart(plain_sum, base, delta)
