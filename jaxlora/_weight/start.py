"""`Start`: what a variant makes its first parts from; and the shapes of common parts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._weight.roles import factor_shape, fan

# (key, shape of A, dtype, fan_in, rank) -> A. `fan_in` is the product of the contracted axes alone, never the stack.
Initializer = Callable[[jax.Array, tuple[int, ...], Any, int, int], jax.Array]


class Start(NamedTuple):
  """What a variant's parts are made from.

  Attributes:
    base: the weight.
    roles: one letter per axis.
    rank: number of terms of the update.
    dtype: of the parts.
    key: of this leaf.
    shared: the key of the whole tree, for parts that all leaves of one shape have in common.
    drawn: the parts drawn from `shared` so far, for leaves of one shape, each of which takes a copy.
    init: makes the factor A.
    given: A and B, by name, where an initialiser has made both; then neither is drawn.
  """

  base: Any
  roles: str
  rank: int
  dtype: Any
  key: jax.Array
  shared: jax.Array
  drawn: dict[Any, Any]
  init: Initializer
  given: Mapping[str, jax.Array] | None = None

  @property
  def a_shape(self) -> tuple[int, ...]:
    return factor_shape(jnp.shape(self.base), self.roles, "i", self.rank)

  @property
  def b_shape(self) -> tuple[int, ...]:
    return factor_shape(jnp.shape(self.base), self.roles, "o", self.rank)

  @property
  def stack(self) -> tuple[int, ...]:
    """The sizes of the stacked axes, which lead in every part."""
    return stack_sizes(jnp.shape(self.base), self.roles)

  def first(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A factor over the contracted axes: the one that is given, or drawn by the initialiser that the user chose."""
    if self.given is not None and shape == self.a_shape:
      return self.given["a"]
    return self.init(key, shape, self.dtype, fan(jnp.shape(self.base), self.roles, "i"), self.rank)

  def zeros(self, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, self.dtype)

  def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
    return jnp.full(shape, value, self.dtype)


def stack_sizes(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  return tuple(size for size, role in zip(shape, roles, strict=True) if role == "s")


def along_rank(vector: jax.Array, like: jax.Array, rank_axis: int) -> jax.Array:
  """A vector over the rank, `(*stack, rank)`, with axes of size one so that it multiplies a factor."""
  return lax.expand_dims(vector, range(rank_axis + 1, like.ndim))


def over_outputs(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  """The shape of a part with one number per output: a factor over the free axes, of rank 1."""
  return factor_shape(tuple(shape), roles, "o", 1)
