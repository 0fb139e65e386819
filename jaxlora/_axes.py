"""The roles of a weight's axes, and the shapes and products of factors that follow from them."""

from typing import Any

import jax
import jax.numpy as jnp

ROLES = "ios"  # contracted with the input, free (goes to the output), stacked
RANK = "r"  # label of the rank axis beside the weight's own axes


def factor_axes(roles: str, own: str) -> tuple[Any, ...]:
  """Which of the weight's axes a factor holds, in its own order: `(*stack, rank, *own)`.

  `own` is `"i"` for A and `"o"` for B. The rank leads the factor's own axes (invariant 2 of `LoraWeight`).
  """
  stack = [d for d, role in enumerate(roles) if role == "s"]
  return (*stack, RANK, *(d for d, role in enumerate(roles) if role == own))


def factor_shape(shape: tuple[int, ...], roles: str, own: str, rank: int) -> tuple[int, ...]:
  """The shape of the factor that holds the axes of role `own`."""
  return tuple(rank if d == RANK else shape[d] for d in factor_axes(roles, own))


def spread_gain(gain: jax.Array, roles: str, own: str = "o") -> jax.Array:
  """A factor of rank 1 over the axes of role `own`, laid out so that it multiplies the whole weight."""
  axes = factor_axes(roles, own)
  rank = axes.index(RANK)
  flat = jnp.squeeze(gain, rank)
  held = [d for d in axes if d != RANK]
  order = sorted(range(len(held)), key=lambda k: held[k])
  missing = [d for d in range(len(roles)) if d not in held]
  return jnp.expand_dims(jnp.transpose(flat, order), missing)


def low_rank_delta(a: jax.Array, b: jax.Array, roles: str) -> jax.Array:
  """`sum_r a[..., r, in] b[..., r, out]` laid out as the weight: the product that the hot path never forms."""
  number = {RANK: len(roles)}
  a_axes = [number.get(d, d) for d in factor_axes(roles, "i")]
  b_axes = [number.get(d, d) for d in factor_axes(roles, "o")]
  return jnp.einsum(a, a_axes, b, b_axes, list(range(len(roles))), precision="highest")
