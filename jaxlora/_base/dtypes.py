"""Dtypes: the one that holds the values of several, and whether one can hold factors."""

from typing import Any

import jax
import jax.numpy as jnp


def wider_dtype(x: Any, y: Any) -> jnp.dtype:
  """The floating dtype that holds the values of both, however strict the user's own promotion is."""
  x, y = sorted((jnp.dtype(x), jnp.dtype(y)), key=lambda dtype: dtype.itemsize)
  if x == y:
    return x
  if x.itemsize == 1:  # JAX promotes no 8-bit floats; every wider one holds their values
    return y if y.itemsize > 1 else jnp.dtype(jnp.float32)
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(x, y)


def wide(x: Any, *more: Any) -> jnp.dtype:
  """The dtype to decompose in: no narrower than single precision."""
  dtype = jnp.dtype(jnp.float32)
  for array in (x, *more):
    dtype = wider_dtype(dtype, array.dtype)
  return dtype


def precise(x: jax.Array) -> jax.Array:
  """Sums of squares are taken in at least 32 bits."""
  return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def holds_factors(dtype: Any) -> bool:
  """Whether factors can have this dtype: real, signed, and wide enough for JAX to draw random numbers in it."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return False
  info = jnp.finfo(dtype)
  return bool(info.bits >= 8 and info.min < 0)


def inexact(x: jax.Array, dtype: Any) -> jax.Array:
  """`x`, or, where it holds integers, `x` in `dtype`."""
  return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)


def beside(factor: jax.Array, dtype: Any) -> jax.Array:
  """A factor in the base's `dtype`; in its own where that is no float, or has 8 bits and would round updates away."""
  return factor.astype(dtype) if dtype.itemsize > 1 and jnp.issubdtype(dtype, jnp.inexact) else factor
