"""The sum of the base's product and the low-rank part."""

import functools
from typing import Any

import jax

from jaxlora._jax.called import apart


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def add(base: jax.Array, delta: jax.Array, looping: bool = False) -> jax.Array:
  """The base's product plus the low-rank part, in the base product's dtype: one array where it is differentiated.

  XLA's CPU backend would otherwise add the two wherever it reads them, and keep both for the backward pass. In the body
  of a loop it keeps their sum.
  """
  del looping
  return _plus(base, delta)


@add.defjvp
def _(looping: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  apart = not looping and jax.default_backend() == "cpu"
  return jax.jvp(_one_array if apart else _plus, primals, tangents)


def _plus(base: jax.Array, delta: jax.Array) -> jax.Array:
  return base + delta.astype(base.dtype)


@jax.custom_jvp
def _one_array(base: jax.Array, delta: jax.Array) -> jax.Array:
  return apart(_plus, base, delta)


@_one_array.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _one_array(*primals), jax.jvp(_plus, primals, tangents)[1]
