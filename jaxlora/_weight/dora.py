"""DoRA: a magnitude for every output."""

from collections.abc import Sequence
import functools

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.coded import decoded
from jaxlora._base.dtypes import precise
from jaxlora._base.explicit import einsum
from jaxlora._base.memory import on_device
from jaxlora._base.programs import one_program
from jaxlora._base.reshape import reshape
from jaxlora._weight.lora import lora_shapes, lora_start
from jaxlora._weight.roles import RANK, factor_axes
from jaxlora._weight.start import Start, over_outputs
from jaxlora._weight.variant import Parts, Shapes, Variant, own_factors


def _dora_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  outputs = over_outputs(shape, roles)
  return {**lora_shapes(shape, roles, rank), "magnitude": outputs, "norm": outputs}


@functools.partial(one_program, static_argnums=1)
def squared_norms(base: jax.Array, roles: str) -> jax.Array:
  """`sum_in base^2` for every output, `(*stack, 1, *out)`."""
  wide = precise(base)
  summed = jnp.sum(wide * wide, axis=[d for d, role in enumerate(roles) if role == "i"], keepdims=True)
  order = [d for d, role in enumerate(roles) if role != "i"]
  return reshape(_ordered(summed, roles, order), over_outputs(jnp.shape(base), roles))


def _ordered(x: jax.Array, roles: str, order: Sequence[int]) -> jax.Array:
  """Stacked axes first, then the free ones, then those that were summed."""
  stack = [d for d in order if roles[d] == "s"]
  free = [d for d in order if roles[d] == "o"]
  return lax.transpose(x, (*stack, *free, *(d for d in range(x.ndim) if d not in order)))


def _dora_start(start: Start) -> dict[str, jax.Array]:
  norm = jnp.sqrt(squared_norms(decoded(on_device(start.base)), start.roles))
  return {**lora_start(start), "magnitude": norm, "norm": norm.copy()}


@functools.partial(one_program, static_argnums=1)
def change_of_squares(base: jax.Array, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`sum_in (base + A B)^2 - base^2` for every output, without ever forming the sum.

      ||w + A b||^2 - ||w||^2 = 2 b . (A w) + b . (A A^T) b       for each column w of the base, b of B

  That is rank x in x out multiplications where forming the sum takes as many and an array of the base's size.
  """
  dtype = jnp.promote_types(precise(a).dtype, precise(base).dtype)
  a, b, base = a.astype(dtype), b.astype(dtype), base.astype(dtype)
  rank, other = len(roles), len(roles) + 1  # labels of the rank's axis, and of a second one
  a_axes, b_axes = ([rank if d == RANK else d for d in factor_axes(roles, own)] for own in "io")
  stack = [d for d, role in enumerate(roles) if role == "s"]

  def second(axes: Sequence[int]) -> list[int]:
    return [other if d == rank else d for d in axes]

  crossed = einsum(a, a_axes, base, range(len(roles)), b_axes)
  gram = einsum(a, a_axes, a, second(a_axes), [*stack, rank, other])
  folded = einsum(gram, [*stack, rank, other], b, second(b_axes), b_axes)
  return jnp.sum(b * (2 * crossed + folded), axis=len(stack), keepdims=True)


def _dora_norm(parts: Parts, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`||base + A B||` for every output: the base's own norm, to the bit, where the update is zero.

  So the gain is exactly one at first, however the compiler rounds roots. A column of zeros has the norm one.
  """
  change, norm = change_of_squares(parts["base"], roles, a, b), parts["norm"]
  squares, none = norm * norm, norm == 0
  relative = jnp.maximum(1 + change / jnp.where(none, 1, squares), 0)
  grown = jnp.where(none, jnp.where(change > 0, change, 1), jnp.where(relative > 0, relative, 1))
  return jnp.where(none, 1, norm) * jnp.sqrt(grown)


@functools.partial(one_program, static_argnums=1)
def _dora_gain(parts: Parts, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`m / ||W + s A B||`, the norm a constant for the gradient (section 4.3 of the paper)."""
  return parts["magnitude"] / _dora_norm(parts, roles, *lax.stop_gradient((a, b)))


@functools.partial(one_program, static_argnums=1)
def _exact_dora_gain(parts: Parts, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return parts["magnitude"] / _dora_norm(parts, roles, a, b)


# Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5: W' = m (W + B A) / ||W + B A||_c.
DORA = Variant({"a": "a", "b": "b", "magnitude": "magnitude"}, _dora_shapes, _dora_start, own_factors, gain=_dora_gain)


DORA_EXACT = DORA._replace(gain=_exact_dora_gain)
