"""A variant of LoRA: a record of pure functions of the parts that it adds beside the base.

A variant says which parts a weight has, which of them train, how they start, and what they come to: a pair of effective
factors, so that whatever the transform does with LoRA it does with all of them; and for DoRA a gain over the outputs:

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


class Start(NamedTuple):
  """What a variant's parts are made from.

  Attributes:
    base: the weight.
    roles: one letter per axis.
    rank: number of terms of the update.
    dtype: of the parts.
    key: of this leaf.
    shared: of the whole tree, for what all leaves of one shape have in common.
    drawn: what was drawn from it so far: leaves of one shape share the very buffers.
    init: makes the factor A, `(key, shape, dtype, fan_in, rank) -> array`.
  """

  base: Any
  roles: str
  rank: int
  dtype: Any
  key: jax.Array
  shared: jax.Array
  drawn: dict[Any, Any]
  init: Callable[..., jax.Array]

  @property
  def a_shape(self) -> tuple[int, ...]:
    return factor_shape(jnp.shape(self.base), self.roles, "i", self.rank)

  @property
  def b_shape(self) -> tuple[int, ...]:
    return factor_shape(jnp.shape(self.base), self.roles, "o", self.rank)

  def first(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A factor over the contracted axes, by the initialiser that the user chose."""
    return self.init(key, shape, self.dtype, fan(jnp.shape(self.base), self.roles, "i"), self.rank)

  def zeros(self, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, self.dtype)

  def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
    return jnp.full(shape, value, self.dtype)


class Variant(NamedTuple):
  """One member of the family.

  Attributes:
    trains: part -> its label, for those that train. All other parts are frozen.
    shapes: `(shape, roles, rank)` -> the shape of every part but the base.
    start: the parts at first. Their update is zero, so that the adapted model is the base.
    factors: the effective factors, without the scale, in the layout `(*stack, rank, *own)`; their rank may be another.
    gain: `(parts, roles, a, b) -> array (*stack, 1, *out)` with b scaled, in front of base and update; `None` for none.
  """

  trains: Mapping[str, str]
  shapes: Callable[[tuple[int, ...], str, int], Shapes]
  start: Callable[[Start], dict[str, jax.Array]]
  factors: Callable[[Parts, str], tuple[jax.Array, jax.Array]]
  gain: Callable[[Parts, str, jax.Array, jax.Array], jax.Array] | None = None


VARIANTS: dict[str, Variant] = {}  # filled by `register_variant`, in the package's `__init__`


def stack_sizes(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  return tuple(size for size, role in zip(shape, roles, strict=True) if role == "s")


def along_rank(vector: jax.Array, like: jax.Array, rank_axis: int) -> jax.Array:
  """A vector over the rank, `(*stack, rank)`, beside a factor."""
  return lax.expand_dims(vector, range(rank_axis + 1, like.ndim))


def over_outputs(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  """The shape of what has one number per output: a factor over the free axes, of rank 1."""
  return factor_shape(tuple(shape), roles, "o", 1)


def register_variant(name: str, variant: Variant) -> None:
  """Adds a member to the family, under the name that `LoraConfig(variant=...)` takes.

  Args:
    name: a new name.
    variant: its record.

  Raises:
    ValueError: if the name is taken.
  """
  if name in VARIANTS:
    raise ValueError(f"register_variant: {name!r} is registered already; expected a new name.")
  VARIANTS[name] = variant
