"""The derivative of the first thin product, whose input is rematerialised where there is a recipe for it.

Reading order: a product in forms for platforms -> along the input and A -> along A alone -> gradients in time.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.policy import NONE, Forms, Policy
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import TransposeOf, at_once, late
from jaxlora._transform.thin import Shrink

_ONE_FORM = Forms()


@dataclasses.dataclass(frozen=True)
class InForms:
  """A product that is linear in each of its first two operands, an input and a factor, in forms for platforms.

  Attributes:
    product: of an input, a factor and integers, such as sizes of groups.
    policy: which forms a program is given.
    forms: of the product, and of its derivative along the input.
    along_factor: of its derivative along the factor.
  """

  product: Callable[..., Any]
  policy: Policy = NONE
  forms: Forms = _ONE_FORM
  along_factor: Forms = _ONE_FORM

  def __call__(self, x: jax.Array, a: jax.Array, *rest: jax.Array) -> Any:
    return self.product(x, a, *rest)

  def lowered(self, x: jax.Array, a: jax.Array, *rest: jax.Array) -> Any:
    """The product in the form for the program that is lowered."""
    return self.policy.lowered(self.forms._replace(default=self.product), x, a, *rest)

  def of_input(self, dx: jax.Array, a: jax.Array, rest: Sequence[jax.Array]) -> Any:
    """`product(dx, a)`, whose transpose has the forms."""
    if self.forms == _ONE_FORM:
      return self.product(dx, a, *rest)
    along = lambda product: lambda kept, dx: product(dx, kept[0], *kept[1])
    return self._late(along, self.forms, (a, tuple(rest)), dx, None)

  def of_factor(self, recipe: Recipe, da: jax.Array, rest: Sequence[jax.Array]) -> Any:
    """`product(x rematerialised, da)`, whose transpose has the forms for the factor."""
    along = lambda product: lambda kept, da: product(recipe.again(kept[0]), da, *kept[1])
    return self._late(along, self.along_factor, (recipe.leaves, tuple(rest)), da, recipe.wait)

  def _late(self, along: Any, forms: Forms, kept: Any, linear: jax.Array, wait: Any) -> Any:
    transpose = lambda form: form and TransposeOf(along(form), jax.tree.structure(linear), wait)
    others = self.policy.transposes(Forms(*map(transpose, forms)))
    return late(along(self.product), kept, linear, wait or at_once, others)


def shrink_by(
  product: Callable[..., Any] | InForms, x: jax.Array, a: jax.Array, recipe: Recipe | None, *rest: jax.Array
) -> Any:
  """`h = product(x, a, *rest)`, bilinear in the two, where `x` is rematerialised for the gradient of `a` if there is a
  recipe for it. The rest are integers, such as sizes of groups.

      dh = product(dx, a) + product(x rematerialised, da)

  Only the second term needs x, and so does only its transpose, `da = product^T(x rematerialised, dh)`.
  """
  if not jnp.issubdtype(x.dtype, jnp.floating) or (recipe is None and not isinstance(product, InForms)):
    return product(x, a, *rest)
  forms = product if isinstance(product, InForms) else InForms(product)

  @jax.custom_jvp
  def h(x, a, leaves, rest):
    del leaves  # what x is made of; its derivatives run through x
    return forms.lowered(x, a, *rest)

  def jvp(primals, tangents):
    (x, a, leaves, rest), (dx, da, *_) = primals, tangents
    again = _kept(x) if recipe is None else recipe._replace(leaves=leaves)
    terms = []
    if not isinstance(dx, SymbolicZero):
      terms.append(forms.of_input(dx, a, rest))
    if not isinstance(da, SymbolicZero):
      terms.append(forms.of_factor(again, da, rest))
    out = h(x, a, leaves, rest)
    return out, jax.tree.map(
      lambda *parts: functools.reduce(jnp.add, parts), *terms or [jax.tree.map(jnp.zeros_like, out)]
    )

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, () if recipe is None else recipe.leaves, rest)


def _kept(x: jax.Array) -> Recipe:
  """The recipe of an input that is kept."""
  return Recipe((x,), lambda leaves: leaves[0], at_once)


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
    return _along_factor(self.shrink, x, a, _kept(x), self.policy)


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


def with_prompt_gradients(values: Sequence[jax.Array], policy: Policy) -> Sequence[jax.Array]:
  """The values, whose gradients are all there before any is used, in programs that are given the forms for tiles.

  XLA's TPU backend may else leave the gradients of factors to the end of the step, and keep what they are made of.
  """
  forms = policy.transposes(Forms(in_tiles=_all_at_once))
  if not forms:
    return values

  @jax.custom_jvp
  def same(*values):
    return values

  def jvp(primals, tangents):
    steps = [step for step in tangents if not isinstance(step, SymbolicZero)]
    moved = iter(late(lambda _, steps: steps, (), steps, at_once, forms))
    return same(*primals), tuple(step if isinstance(step, SymbolicZero) else next(moved) for step in tangents)

  same.defjvp(jvp, symbolic_zeros=True)
  return same(*values)


def _all_at_once(residuals: Any, cotangents: Any, types: Any) -> Sequence[jax.Array]:
  del residuals, types
  return jax.lax.optimization_barrier(list(cotangents))
