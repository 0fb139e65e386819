"""Adapted products of one input, and their derivative.

    h_k = x A_k^T,   y_k = x W_k + h_k B_k

`h` is differentiated along A where it is made (`thin.py`), so that this derivative alone has a part along `x`:

    dy_k = dx W_k + (dx A_k^T + dh_k) B_k + h_k dB_k

It is linear in one step, and so is its transpose, which each compiler is given in the form that it likes:
`dx = dy W^T + (dy B^T) A` as two products, or as one.

What programs for TPUs and GPUs are given instead is in `_platform/product_forms.py`.

Reading order: the products -> their derivative -> one product alone.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.dtypes import inexact
from jaxlora._base.labelled import Labelled, contract
from jaxlora._jax.sizes import elements
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform import merged
from jaxlora._platform.joint import Weight, own_thin_and_second, whole_thin_and_second
from jaxlora._platform.kept_sum import plain_sum
from jaxlora._platform.policy import Forms, Policy
from jaxlora._platform.product_forms import Joined, Moving, SideBySide, TransposeJoined, TransposeSideBySide
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import TransposeOf, at_once, late
from jaxlora._transform.coded import Coded, along_leaves, formed
from jaxlora._transform.product import Product
from jaxlora._transform.thin import Shrink, Shrinks
from jaxlora._transform.thin_derivative import shrink_along_factor


class Written(NamedTuple):
  """How the two products and their sum are written.

  Attributes:
    expand: the second thin product.
    add: the sum.
    thin_and_second: what one product for TPUs has of `h` and B (`_platform/joint.py`).
  """

  expand: Callable[..., Labelled]
  add: Callable[[jax.Array, jax.Array], jax.Array]
  thin_and_second: Callable[..., tuple[Labelled, Labelled]]


@dataclasses.dataclass(frozen=True)
class Products:
  """`y_k = x W_k + h_k B_k` for the weights of one input, as a function of arrays: equal for products that are alike.

  `h` is differentiated along A where it is made, so that only this derivative has a part along `x`:

      dy_k = dx W_k + (dx A_k^T + dh_k) B_k + h_k dB_k
  """

  each: tuple[Product, ...]
  norm: Any = None  # the region that `x` is the result of, as a `Comparable`, where it is a norm

  @property
  def policy(self) -> Policy:
    return self.each[0].policy

  def flat(self) -> "Products":
    """The same for programs of one device."""
    return dataclasses.replace(self, each=tuple(product.flat() for product in self.each))

  def __call__(
    self, x: jax.Array, thin: Sequence[Labelled], weights: Sequence[Weight], sources: Sequence[jax.Array] = ()
  ) -> list[jax.Array]:
    """The products; `sources` are what `norm` is made of."""
    add, add_once = (plain_sum, plain_sum) if self.each[0].result.looping else (self.policy.add, self.policy.add_once)
    alone = Written(self.policy.expand, add, own_thin_and_second)
    before_backward = Written(contract, add_once, whole_thin_and_second)

    @jax.custom_jvp
    def products(x, thin, weights, sources):
      return self.forward(x, thin, weights, sources, alone)

    @jax.custom_jvp
    def differentiated(x, thin, weights, sources):
      return self.forward(x, thin, weights, sources, before_backward)

    def jvp(primals, tangents):
      ys = differentiated(*primals)
      along = self.derivative(primals, tangents) or [jnp.zeros_like(y) for y in ys]
      more = self.along_bases(primals, tangents)
      return ys, [functools.reduce(jnp.add, terms, step) for step, terms in zip(along, more, strict=True)]

    products.defjvp(jvp, symbolic_zeros=True)
    differentiated.defjvp(jvp, symbolic_zeros=True)
    return products(x, list(thin), list(weights), list(sources))

  def forward(
    self, x: jax.Array, thin: Sequence[Labelled], weights: Sequence[Weight], sources: Sequence[Any], written: Written
  ) -> list[jax.Array]:
    """The products."""

    def apart(x, thin, weights, sources):
      return [self.one(k, x, thin, weight, sources, written) for k, weight in enumerate(weights)]

    if not self.merges(x, weights):
      return apart(x, thin, weights, sources)
    return self.policy.lowered(Forms(apart, merged=SideBySide(self.each)), x, thin, weights, sources)

  def joins(self, x: jax.Array, weights: Sequence[Weight]) -> bool:
    """Whether each of the products can be one."""
    return all(product.joins(x, weight) for product, weight in zip(self.each, weights, strict=True))

  def merges(self, x: jax.Array, weights: Sequence[Weight]) -> bool:
    """Whether they can be one product of all the weights side by side, and that is worth a copy of these."""
    if len(self.each) < 2 or any(isinstance(w, Coded) for w, _, _ in weights):
      return False
    inputs = elements([weights[0][0].shape[d] for d in self.each[0].contracted])
    if not merged.worth_it(x, inputs) or not self.joins(x, weights):
      return False
    pairs = zip(self.each, weights, strict=True)
    return (
      len({(product.input_labels(w.shape), product.contracted, product.result) for product, (w, _, _) in pairs}) == 1
    )

  def one(
    self, k: int, x: jax.Array, thin: Sequence[Labelled], weight: Weight, sources: Sequence[Any], written: Written
  ) -> jax.Array:
    """One of them: two products and a sum, or one product."""
    product = self.each[k]

    def separately(product, x, thin, weight, sources):
      del sources
      base = product.plain(x, formed(weight[0], x, product.policy, product.result.looping))
      return written.add(base, product.expand(thin[k], weight[2], written.expand))

    apart, flat = (functools.partial(separately, form) for form in (product, product.flat()))
    joined = Joined(product, self.norm, k, written.thin_and_second) if product.joins(x, weight) else None
    first = 1 + len(thin)  # the weight and its factors are behind x and every h
    shared = range(first, first + len(jax.tree.leaves(weight)))
    return self.policy.lowered(Forms(apart, flat, joined=joined), x, list(thin), weight, sources, shared=shared)

  def along_bases(self, primals: Any, tangents: Any) -> list[list[jax.Array]]:
    """What each product has along its base: nothing, unless something that trains multiplies the base."""
    (x, _, weights, _), (_, _, d_weights, _) = primals, tangents
    plain = lambda product, w: product.plain(x, formed(w, x, product.policy, looping=False))
    return [
      along_leaves(functools.partial(plain, product), w, dw)
      for product, (w, _, _), (dw, _, _) in zip(self.each, weights, d_weights, strict=True)
    ]

  def derivative(self, primals: Any, tangents: Any) -> list[Any]:
    """The tangents of the products; none where none of the operands has one."""
    (x, thin, weights, _), (dx, d_thin, d_weights, _) = primals, tangents
    moving = Moving(
      not isinstance(dx, SymbolicZero),
      tuple(not isinstance(d.array, SymbolicZero) for d in d_thin),
      tuple(not isinstance(d, SymbolicZero) for _, _, d in d_weights),
    )
    if not any((moving.x, *moving.thin, *moving.seconds)):
      return []
    steps = (
      dx if moving.x else None,
      [d if moves else None for d, moves in zip(d_thin, moving.thin, strict=True)],
      [d if moves else None for (_, _, d), moves in zip(d_weights, moving.seconds, strict=True)],
    )
    complete = [
      completed(h, x, weight[1], product.shrink) if moving.x and moves else h
      for product, h, weight, moves in zip(self.each, thin, weights, moving.seconds, strict=True)
    ]
    every = moving.x and all((*moving.thin, *moving.seconds))
    forms = Forms(
      flat=TransposeOf(Along(self.flat(), moving), jax.tree.structure(steps)),
      joined=TransposeJoined(self.each, moving) if self.joins(x, weights) else None,
      merged=TransposeSideBySide(self.each) if every and self.merges(x, weights) else None,
    )
    return late(Along(self, moving), (complete, list(weights)), steps, at_once, self.policy.transposes(forms))


@dataclasses.dataclass(frozen=True)
class Along:
  """The tangents of some products as a linear function of those of their operands."""

  products: Products
  moving: Moving

  def __call__(self, residuals: Any, steps: Any) -> list[jax.Array]:
    (thin, weights), (dx, d_thin, d_seconds) = residuals, steps
    each = self.products.each
    moved = list(d_thin)
    if dx is not None:
      through = Shrinks(tuple(product.shrink for product in each))(dx, [a for _, a, _ in weights])
      moved = [h if d is None else added(d, h) for d, h in zip(d_thin, through, strict=True)]
    out = []
    for product, h, (w, _, b), dh, db in zip(each, thin, weights, moved, d_seconds, strict=True):
      terms = [] if dx is None else [product.again(w, dx)]
      terms += [] if dh is None else [product.expand(dh, b)]
      terms += [] if db is None else [product.expand(h, db)]
      out.append(functools.reduce(lambda x, y: x + y.astype(x.dtype), terms))
    return out


def added(x: Labelled, y: Labelled) -> Labelled:
  """The sum of two arrays with the same labels."""
  return Labelled(x.array + y.array, x.labels)


def completed(h: Labelled, x: jax.Array, a: jax.Array, shrink: Shrink) -> Labelled:
  """`h`, with the derivative along `x` that it was made without: second derivatives of the whole need it."""

  @jax.custom_jvp
  def complete(h, x, a):
    del x, a
    return h

  def jvp(primals, tangents):
    (h, x, a), (dh, dx, _) = primals, tangents
    return complete(h, x, a), added(dh, shrink(dx, a))

  complete.defjvp(jvp)
  return complete(h, x, a)


# ----------------------------------------------------------------------------------------------------------------------
# One that stands alone.


def dot(x: jax.Array, product: Product, weight: Weight, recipe: Recipe | None) -> jax.Array:
  """`x W + h B`.

  Args:
    x: the input, of a floating dtype.
    product: how it meets the weight.
    weight: base, A and B.
    recipe: how to rematerialise `x` in the backward pass; `None` where it is kept.
  """
  h = shrink_along_factor(product.shrink, x, weight[1], recipe, product.policy)
  return evaluate_products(Products((product,)), x, [h], [weight])[0]


def evaluate_products(products: Products, *args: Any) -> list[jax.Array]:
  """The products, traced once for all that are alike where the policy says so."""
  return traced_once(products, *args) if products.policy.shares_traces else products(*args)


@dataclasses.dataclass(frozen=True)
class Separate:
  """`x W + h B` of a base's product that is there, and of an `h` whose input is not `x`: of dropout, say."""

  product: Product

  def __call__(self, base: jax.Array, h: Labelled, b: jax.Array) -> jax.Array:
    policy = self.product.policy
    return policy.sum(base, self.product.expand(h, b, policy.expand), self.product.result.looping)


def dot_separately(
  x: jax.Array,
  u: jax.Array,
  product: Product,
  weight: Weight,
  shrink: Callable[[Callable[..., Any], jax.Array, jax.Array], Any],
) -> jax.Array:
  """`x W + (u A^T) B`, each product differentiated by itself.

  In this form autodiff gives `dB = h^T dy` and `dA = (dy B^T)^T u`, both with the rank leading, and no transpose of a
  whole cotangent.

  Args:
    x, u: the inputs of the base and of the adapter.
    product: how they meet the weight.
    weight: base, A and B.
    shrink: `shrink(product, u, a)` computes the first thin product.
  """
  base, a, b = weight
  y = product.base(x, base)
  h = shrink(product.shrink, inexact(u, a.dtype), a)
  separate = Separate(product)
  return traced_once(separate, y, h, b) if product.policy.shares_traces else separate(y, h, b)
