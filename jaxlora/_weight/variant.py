"""A variant of LoRA: a record of pure functions of the parts that it adds beside the base.

A variant says which parts a weight has, which of them train, how they start, and which pair of effective factors they
amount to. The transform computes with effective factors alone, so that whatever it does for LoRA it does for every
variant. A variant may also have a gain over the outputs, as DoRA does:

    W' = gain * (base + scale * sum_r A[..., r, in] B[..., r, out]),    (A, B) = factors(parts)

Here and in every part the rank leads, behind stacked axes: `(*stack, rank, *in)`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._weight.roles import factor_shape, fan

Parts = Mapping[str, Any]

Shapes = dict[str, tuple[int, ...]]

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
    drawn: the parts drawn from `shared` so far: leaves of one shape share the very buffers.
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


def own_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  """A and B themselves: the effective factors of plain variants."""
  del roles
  return parts["a"], parts["b"]


class Variant(NamedTuple):
  """One member of the family.

  Attributes:
    trains: part -> its label (`"a"`, `"b"` or `"magnitude"`), for those that train. All other parts are frozen.
    shapes: `(shape, roles, rank)` -> the shape of every part but the base; `a` and `b` are among them, each with the
      rank behind the stacked axes.
    start: the parts at first. Their update is zero, so that the adapted model is the base.
    factors: the effective factors, without the scale, in the layout `(*stack, rank, *own)`; their rank may be another.
    gain: `(parts, roles, a, b) -> array (*stack, 1, *out)` with b scaled, in front of base and update; `None` for none.
  """

  trains: Mapping[str, str]
  shapes: Callable[[tuple[int, ...], str, int], Shapes]
  start: Callable[[Start], dict[str, jax.Array]]
  factors: Callable[[Parts, str], tuple[jax.Array, jax.Array]]
  gain: Callable[[Parts, str, jax.Array, jax.Array], jax.Array] | None = None

  @property
  def plain(self) -> bool:
    """Whether its effective factors are A and B themselves, so that an initialiser of both can start it."""
    return self.factors is own_factors

  @property
  def linear(self) -> bool:
    """Whether the adapted weight is the base plus a product of factors; a gain rescales the base as well."""
    return self.gain is None


VARIANTS: dict[str, Variant] = {}  # filled in the package's `__init__`, and by `register_variant`


def variant_named(name: str) -> Variant:
  """The record of a variant.

  Raises:
    ValueError: if no variant has that name, with those that exist.
  """
  if name not in VARIANTS:
    raise ValueError(
      f"variant {name!r} is not registered; expected one of {', '.join(map(repr, VARIANTS))}. Register it first"
      " (jaxlora.register_variant)."
    )
  return VARIANTS[name]


def stack_sizes(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  return tuple(size for size, role in zip(shape, roles, strict=True) if role == "s")


def along_rank(vector: jax.Array, like: jax.Array, rank_axis: int) -> jax.Array:
  """A vector over the rank, `(*stack, rank)`, with axes of size one so that it multiplies a factor."""
  return lax.expand_dims(vector, range(rank_axis + 1, like.ndim))


def over_outputs(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  """The shape of a part with one number per output: a factor over the free axes, of rank 1."""
  return factor_shape(tuple(shape), roles, "o", 1)
