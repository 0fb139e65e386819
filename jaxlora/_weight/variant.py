"""A variant of LoRA: a record of pure functions of the parts that it adds beside the base.

A variant says which parts a weight has, which of them train, how they start, and which pair of effective factors they
amount to. The transform computes with effective factors alone, so that whatever it does for LoRA it does for every
variant. A variant may also have a gain over the outputs, as DoRA does:

    W' = gain * (base + scale * sum_r A[..., r, in] B[..., r, out]),    (A, B) = factors(parts)

Here and in every part the rank leads, behind stacked axes: `(*stack, rank, *in)`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

Parts = Mapping[str, Any]

Shapes = dict[str, tuple[int, ...]]


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
    start: from a `Start`, the parts at first. Their update is zero, so that the adapted model is the base.
    factors: the effective factors, without the scale, in the layout `(*stack, rank, *own)`; their rank may be another.
    gain: `(parts, roles, a, b) -> array (*stack, 1, *out)` with b scaled, in front of base and update; `None` for none.
  """

  trains: Mapping[str, str]
  shapes: Callable[[tuple[int, ...], str, int], Shapes]
  start: Callable[[Any], dict[str, jax.Array]]  # of a `Start`, whose file this one does not import
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

TOKENS = "tokens"  # the variant of rows of tables that train

UNLISTED: dict[str, Variant] = {}  # those that a config makes by a field of their own


def is_variant(name: str) -> bool:
  """Whether a weight can be of a variant of that name."""
  return name in VARIANTS or name in UNLISTED


def variant_named(name: str) -> Variant:
  """The record of a variant.

  Raises:
    ValueError: if no variant has that name, with those that exist.
  """
  if not is_variant(name):
    raise ValueError(
      f"variant {name!r} is not registered; expected one of {', '.join(map(repr, VARIANTS))}. Register it first"
      " (jaxlora.register_variant)."
    )
  return VARIANTS[name] if name in VARIANTS else UNLISTED[name]
