"""Residuals that wait for their cotangents."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.jaxpr import without_dead_code
from jaxlora._jax.linear_call import linear_call
from jaxlora._platform.recipes import _is_float


def late(fn: Callable[[Any, Any], Any], leaves: Sequence[Any], linear: Any) -> Any:
  """`fn(leaves, linear)`, linear in the second argument, whose transpose uses the leaves only after its cotangent.

  Forward mode, second derivatives and batching are those of `fn`.
  """
  return linear_call(fn, _wait, tuple(leaves), linear)


def uses(fn: Callable[[Any, Any], Any], leaves: Any, linear: Any) -> list[bool]:
  """Which of the leaves `late(fn, leaves, linear)` keeps."""
  return without_dead_code(jax.make_jaxpr(fn)(leaves, linear))[1][: len(jax.tree.leaves(leaves))]


def _wait(leaves: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """The leaves, unchanged, but as values that depend on the cotangents.

  `optimization_barrier` says this, but XLA's CPU backend drops it before it fuses and schedules. There the dependence
  is one of arithmetic: times one, where that one is made of a cotangent's bits; for narrow formats, which would be
  widened and rounded, a bitwise or with such a zero. No compiler pass ahead of code generation sees what it is; code
  generation does, and it costs nothing. Not with several devices, where one element of a sharded cotangent would have
  to reach them all.
  """
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    return lax.optimization_barrier((list(leaves), list(cotangents)))[0]
  bits = lax.bitcast_convert_type(_first_element(cotangents[0]).astype(jnp.float32), jnp.uint32)
  zero = lax.shift_right_logical(lax.shift_right_logical(bits, jnp.uint32(31)), jnp.uint32(1))
  return [_unchanged(leaf, zero) if _is_float(leaf) and leaf.ndim else leaf for leaf in leaves]


def _unchanged(value: jax.Array, zero: jax.Array) -> jax.Array:
  if value.dtype.itemsize > 2:
    return value * (1 + zero.astype(value.dtype))
  unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
  return lax.bitcast_convert_type(lax.bitcast_convert_type(value, unsigned) | zero.astype(unsigned), value.dtype)


def _first_element(value: jax.Array) -> jax.Array:
  return lax.reshape(lax.slice(value, (0,) * value.ndim, (1,) * value.ndim), ())
