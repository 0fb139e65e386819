"""The roles of a weight's axes, and the shapes and products of factors that follow from them."""

from collections.abc import Hashable, Sequence
import functools
import math
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


def laid_along(gain: jax.Array, axes: Sequence[Hashable], labels: Sequence[Hashable]) -> jax.Array:
  """A factor of rank 1, laid out so that it multiplies an array along the axes that the two share.

  Args:
    gain: the factor.
    axes: labels of its axes, `RANK` among them; all others are among `labels`.
    labels: of the array's axes.
  """
  own = [label for label in axes if label != RANK]
  ordered = jnp.transpose(jnp.squeeze(gain, axes.index(RANK)), [own.index(label) for label in labels if label in own])
  return jnp.expand_dims(ordered, [k for k, label in enumerate(labels) if label not in own])


def times_gain(weight: jax.Array, gain: jax.Array | None, roles: str, own: str = "o") -> jax.Array:
  """A weight times the gain of its variant, over its axes of role `own`; `None` is a gain of one."""
  if gain is None:
    return weight
  return weight * laid_along(gain, factor_axes(roles, own), range(len(roles))).astype(weight.dtype)


@functools.partial(jax.jit, inline=True, static_argnums=2)  # one program where it is called with arrays
def low_rank_delta(a: jax.Array, b: jax.Array, roles: str) -> jax.Array:
  """`sum_r a[..., r, in] b[..., r, out]` laid out as the weight, which training and inference never form."""
  number = {RANK: len(roles)}
  a_axes = [number.get(d, d) for d in factor_axes(roles, "i")]
  b_axes = [number.get(d, d) for d in factor_axes(roles, "o")]
  return jnp.einsum(a, a_axes, b, b_axes, list(range(len(roles))), precision="highest")


def fan(shape: Sequence[int], roles: str, own: str) -> int:
  """The number of elements along the axes of one role."""
  return math.prod(size for size, role in zip(shape, roles, strict=True) if role == own)


def axes_of(roles: str, role: str) -> list[int]:
  return [d for d, own in enumerate(roles) if own == role]
