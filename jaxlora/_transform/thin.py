"""The first thin product of an adapted weight, `h = x A^T`, alone or together with those that share its input.

Reading order: one -> several.
"""

from collections.abc import Hashable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax

from jaxlora._base.labelled import Labelled, Result, contract, merged_alike, own_labels
from jaxlora._weight.roles import RANK


@dataclasses.dataclass(frozen=True)
class Shrink:
  """The first thin product, `h = x A^T`, as a function of `x` and A: equal for products that are alike.

  Attributes:
    labels: of the axes of `x`.
    factor: of the axes of A.
    summed: the labels that are summed.
    weight_first: whether the weight is the left operand.
    result: what `h` is to be.
    flattens: whether groups of axes are flattened to one, as programs of one device have them.
  """

  labels: tuple[Hashable, ...]
  factor: tuple[Hashable, ...]
  summed: tuple[Hashable, ...]
  weight_first: bool
  result: Result
  flattens: bool = False

  def __call__(self, x: jax.Array, a: jax.Array) -> Labelled:
    u, first, summed = Labelled(x, self.labels), Labelled(a, self.factor), list(self.summed)
    if self.flattens:
      u, first, summed = merged_alike(u, first, summed)
      u = u.flattened(own_labels(self.labels))
    return contract(*((first, u) if self.weight_first else (u, first)), summed, self.result).expanded()

  def flat(self) -> "Shrink":
    """The same for programs of one device."""
    return dataclasses.replace(self, flattens=self.result.sharding is None)


@dataclasses.dataclass(frozen=True)
class Shrinks:
  """The first thin products of several weights that share an input, as a function of `x` and every A."""

  each: tuple[Shrink, ...]

  def __call__(self, x: jax.Array, factors: Sequence[jax.Array]) -> list[Labelled]:
    """`h` for each; weights that meet the input alike do so in one product."""
    groups: dict[Any, list[int]] = {}
    for k, shrink in enumerate(self.each):
      groups.setdefault((shrink, factors[k].dtype), []).append(k)
    out: dict[int, Labelled] = {}
    for (shrink, _), members in groups.items():
      alike = [factors[k] for k in members]
      rank = shrink.factor.index(RANK)
      h = shrink(x, lax.concatenate(alike, rank) if len(alike) > 1 else alike[0])
      parts = lax.split(h.array, [a.shape[rank] for a in alike], h.labels.index(RANK))
      out.update((k, Labelled(part, h.labels)) for k, part in zip(members, parts, strict=True))
    return [out[k] for k in range(len(factors))]

  def flat(self) -> "Shrinks":
    """The same for programs of one device."""
    return Shrinks(tuple(shrink.flat() for shrink in self.each))
