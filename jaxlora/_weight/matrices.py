"""Weights and their factors as stacks of matrices, which decompositions take."""

from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from jaxlora._base.reshape import reshape
from jaxlora._weight.roles import axes_of, factor_shape


def matrices(x: jax.Array, roles: str) -> jax.Array:
  """An array of a weight's shape as one matrix for each stacked slice: `(stack, in, out)`."""
  order = [axes_of(roles, role) for role in "sio"]
  sizes = [math.prod(x.shape[d] for d in axes) for axes in order]
  return reshape(jnp.transpose(x, [d for axes in order for d in axes]), sizes)


def thin(factor: jax.Array, roles: str) -> jax.Array:
  """A factor as one matrix for each stacked slice: `(stack, rank, in)` or `(stack, rank, out)`."""
  stack = roles.count("s")
  sizes = factor.shape
  return reshape(factor, (math.prod(sizes[:stack]), sizes[stack], math.prod(sizes[stack + 1 :])))


def laid_out(matrix: jax.Array, shape: Sequence[int], roles: str, own: str) -> jax.Array:
  """The inverse of `thin`: `(stack, rank, n)` as a factor of a weight of `shape`."""
  return reshape(matrix, factor_shape(tuple(shape), roles, own, matrix.shape[-2]))
