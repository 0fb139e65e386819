"""The first thin product of an adapted weight, `h = x A^T`, alone or together with those that share its input.

Reading order: one -> several -> one whose input is rematerialised.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled, Result, contract, merged_alike, own_labels
from jaxlora._platform.policy import Policy
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import TransposeOf, at_once, late
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
    flattens: whether groups of axes are flattened to one.
  """

  labels: tuple[Hashable, ...]
  factor: tuple[Hashable, ...]
  summed: tuple[Hashable, ...]
  weight_first: bool
  result: Result
  flattens: bool

  def __call__(self, x: jax.Array, a: jax.Array) -> Labelled:
    u, first, summed = Labelled(x, self.labels), Labelled(a, self.factor), list(self.summed)
    if self.flattens and self.result.sharding is None:
      u, first, summed = merged_alike(u, first, summed)
      u = u.flattened(own_labels(self.labels))
    return contract(*((first, u) if self.weight_first else (u, first)), summed, self.result).expanded()

  def apart(self) -> "Shrink":
    """The same with all axes of `x` apart."""
    return dataclasses.replace(self, flattens=False)


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

  def apart(self) -> "Shrinks":
    """The same with all axes of `x` apart."""
    return Shrinks(tuple(shrink.apart() for shrink in self.each))


# ----------------------------------------------------------------------------------------------------------------------
# Its derivative.


def shrink_by(product: Callable[[jax.Array, jax.Array], Any], x: jax.Array, a: jax.Array, recipe: Recipe | None) -> Any:
  """`h = product(x, a)`, bilinear, where `x` is rematerialised for the gradient of `a` if there is a recipe for it.

      dh = product(dx, a) + product(x rematerialised, da)

  Only the second term needs x, and so does only its transpose, `da = product^T(x rematerialised, dh)`.
  """
  if recipe is None or not jnp.issubdtype(x.dtype, jnp.floating):
    return product(x, a)

  @jax.custom_jvp
  def h(x, a, leaves):
    del leaves  # what x is made of; its derivatives run through x
    return product(x, a)

  def jvp(primals, tangents):
    (x, a, leaves), (dx, da, _) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
      terms.append(product(dx, a))
    if not isinstance(da, SymbolicZero):
      terms.append(late(lambda leaves, da: product(recipe.again(leaves), da), leaves, da, recipe.wait))
    out = h(x, a, leaves)
    return out, jax.tree.map(
      lambda *parts: functools.reduce(jnp.add, parts), *terms or [jax.tree.map(jnp.zeros_like, out)]
    )

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, recipe.leaves)


def shrink_along_factor(shrink: Shrink, x: jax.Array, a: jax.Array, recipe: Recipe | None, policy: Policy) -> Labelled:
  """`h = x A^T` with the derivative along A alone, `dh = x dA^T`; `x` is rematerialised for it if there is a recipe.

  The derivative along `x` is that of the whole product `x W + h B` (`_transform/product.py`).
  """
  if recipe is None:
    recipe = Recipe((x,), lambda leaves: leaves[0], at_once)
  again = recipe.again

  @jax.custom_jvp
  def h(x, a, leaves):
    del leaves
    return policy.lowered(shrink, {"tpu": shrink.apart()}, x, a)

  def jvp(primals, tangents):
    (x, a, leaves), (_, da, _) = primals, tangents
    out = h(x, a, leaves)
    if isinstance(da, SymbolicZero):
      return out, jax.tree.map(jnp.zeros_like, out)
    apart = TransposeOf(lambda leaves, da: shrink.apart()(again(leaves), da), at_once, jax.tree.structure(a))
    along = lambda leaves, da: shrink(again(leaves), da)
    return out, late(along, leaves, da, recipe.wait, policy.transposes({"tpu": apart}))

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, recipe.leaves)
