"""Variants that are products of products: LoHa and LoKr."""

import math

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.reshape import reshape
from jaxlora._weight.lora import lora_shapes
from jaxlora._weight.roles import fan
from jaxlora._weight.start import Start, stack_sizes
from jaxlora._weight.variant import Parts, Shapes, Variant


def _loha_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  first = lora_shapes(shape, roles, rank)
  return {**first, "a2": first["a"], "b2": first["b"]}


def _loha_start(start: Start) -> dict[str, jax.Array]:
  keys = jax.random.split(start.key, 3)
  return {
    "a": start.first(keys[0], start.a_shape),
    "b": start.init(keys[1], start.b_shape, start.dtype, start.rank, start.rank),
    "a2": start.init(keys[2], start.a_shape, start.dtype, start.rank, start.rank),
    "b2": start.zeros(start.b_shape),
  }


def _pairs(x: jax.Array, y: jax.Array, rank_axis: int) -> jax.Array:
  """Every row of `x` times every row of `y`, elementwise: `(*stack, rank^2, *own)`."""
  rows = lax.expand_dims(x, (rank_axis + 1,)) * lax.expand_dims(y, (rank_axis,))
  return lax.collapse(rows, rank_axis, rank_axis + 2)


def _loha_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  """`(A B) o (A2 B2) = sum_{r, q} (A_r o A2_q) (B_r o B2_q)`: a product of rank^2 terms."""
  stack = roles.count("s")
  return _pairs(parts["a"], parts["a2"], stack), _pairs(parts["b"], parts["b2"], stack)


# Hyeon-Woo et al., "FedPara" (arXiv:2108.06098), prop. 1; LoHa in LyCORIS (arXiv:2309.14859), eq. 8.
LOHA = Variant({"a": "a", "b": "b", "a2": "a", "b2": "b"}, _loha_shapes, _loha_start, _loha_factors)

_LOKR_BLOCK = 8  # the effective rank is rank x the output blocks


def _blocks(size: int) -> int:
  """The largest divisor that is at most the square root, and at most 8."""
  return max(k for k in range(1, min(_LOKR_BLOCK, math.isqrt(size)) + 1) if size % k == 0)


def _lokr_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  stack, fan_in, fan_out = stack_sizes(shape, roles), fan(shape, roles, "i"), fan(shape, roles, "o")
  rows, columns = _blocks(fan_in), _blocks(fan_out)
  return {
    "a": (*stack, rank, fan_in // rows),
    "b": (*stack, rank, fan_out // columns),
    "c": (*stack, rows, columns),
  }


def _lokr_start(start: Start) -> dict[str, jax.Array]:
  shapes = _lokr_shapes(jnp.shape(start.base), start.roles, start.rank)
  a_key, c_key = jax.random.split(start.key)
  return {
    "a": start.first(a_key, shapes["a"]),
    "b": start.zeros(shapes["b"]),
    "c": jax.random.normal(c_key, shapes["c"], start.dtype),
  }


def _lokr_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  """`C (x) (A B) = sum_{r, q} (C_q (x) A_r) (e_q (x) B_r)`, q over the columns of C: rank x columns terms."""
  shape, stack = jnp.shape(parts["base"]), stack_sizes(jnp.shape(parts["base"]), roles)
  a, b, c = parts["a"], parts["b"], parts["c"]
  columns = c.shape[-1]
  one = jnp.eye(columns, dtype=b.dtype)
  first = jnp.einsum("...pq,...ri->...rqpi", c, a)
  second = jnp.einsum("pq,...ri->...rqpi", one, b)
  wide = columns * a.shape[-2]
  sizes = [tuple(size for size, role in zip(shape, roles, strict=True) if role == own) for own in "io"]
  return reshape(first, (*stack, wide, *sizes[0])), reshape(second, (*stack, wide, *sizes[1]))


# LyCORIS (arXiv:2309.14859), eq. 9, the second Kronecker factor a low-rank product.
LOKR = Variant({"a": "a", "b": "b", "c": "magnitude"}, _lokr_shapes, _lokr_start, _lokr_factors)
