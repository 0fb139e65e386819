"""The derivative of the first thin product, whose input is rematerialised where there is a recipe for it.

Reading order: along the input and A -> along A alone.
"""

from collections.abc import Callable
import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.policy import Forms, Policy
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import TransposeOf, at_once, late
from jaxlora._transform.thin import Shrink


def shrink_by(product: Callable[..., Any], x: jax.Array, a: jax.Array, recipe: Recipe | None, *rest: jax.Array) -> Any:
  """`h = product(x, a, *rest)`, bilinear in the two, where `x` is rematerialised for the gradient of `a` if there is a
  recipe for it. The rest are integers, such as sizes of groups.

      dh = product(dx, a) + product(x rematerialised, da)

  Only the second term needs x, and so does only its transpose, `da = product^T(x rematerialised, dh)`.
  """
  if recipe is None or not jnp.issubdtype(x.dtype, jnp.floating):
    return product(x, a, *rest)

  @jax.custom_jvp
  def h(x, a, leaves, rest):
    del leaves  # what x is made of; its derivatives run through x
    return product(x, a, *rest)

  def jvp(primals, tangents):
    (x, a, leaves, rest), (dx, da, *_) = primals, tangents
    terms = []
    if not isinstance(dx, SymbolicZero):
      terms.append(product(dx, a, *rest))
    if not isinstance(da, SymbolicZero):
      along = lambda kept, da: product(recipe.again(kept[0]), da, *kept[1])
      terms.append(late(along, (leaves, rest), da, recipe.wait))
    out = h(x, a, leaves, rest)
    return out, jax.tree.map(
      lambda *parts: functools.reduce(jnp.add, parts), *terms or [jax.tree.map(jnp.zeros_like, out)]
    )

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, recipe.leaves, rest)


def shrink_along_factor(shrink: Shrink, x: jax.Array, a: jax.Array, recipe: Recipe | None, policy: Policy) -> Labelled:
  """`h = x A^T` with the derivative along A alone, `dh = x dA^T`; `x` is rematerialised for it if there is a recipe.

  The derivative along `x` is that of the whole product `x W + h B` (`products.py`).
  """
  if recipe is not None:
    return _along_factor(shrink, x, a, recipe, policy)
  kept = _Kept(shrink, policy)
  return traced_once(kept, x, a) if policy.shares_traces else kept(x, a)


@dataclasses.dataclass(frozen=True)
class _Kept:
  """The same where `x` is kept; equal for products that are alike."""

  shrink: Shrink
  policy: Policy

  def __call__(self, x: jax.Array, a: jax.Array) -> Labelled:
    return _along_factor(self.shrink, x, a, Recipe((x,), lambda leaves: leaves[0], at_once), self.policy)


def _along_factor(shrink: Shrink, x: jax.Array, a: jax.Array, recipe: Recipe, policy: Policy) -> Labelled:
  @jax.custom_jvp
  def h(x, a, leaves):
    del leaves
    return policy.lowered(Forms(shrink, shrink.flat(), in_tiles=shrink), x, a)

  def jvp(primals, tangents):
    (x, a, leaves), (_, da, _) = primals, tangents
    out = h(x, a, leaves)
    if isinstance(da, SymbolicZero):
      return out, jax.tree.map(jnp.zeros_like, out)
    along = lambda shrink: lambda leaves, da: shrink(recipe.again(leaves), da)
    of_a = functools.partial(TransposeOf, treedef=jax.tree.structure(a))
    forms = Forms(flat=of_a(along(shrink.flat()), wait=recipe.wait), in_tiles=of_a(along(shrink)))
    return out, late(along(shrink), leaves, da, recipe.wait, policy.transposes(forms))

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, recipe.leaves)
