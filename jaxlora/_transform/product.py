"""The adapted product: how a weight that is `base + A B` acts on an input without ever being formed.

    h = x A^T,   y = x W + h B

The derivative of the whole along x is linear in one step, `dy = dx W + (dx A^T) B`, and so is its transpose, which each
compiler is given in the form that it likes: `dx = dy W^T + (dy B^T) A` as two products or as one.

Reading order: one product as a value -> several of one input -> their derivative -> one that stands alone.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.dtypes import inexact, wider_dtype
from jaxlora._base.labelled import (
  Labelled,
  Result,
  Run,
  contract,
  explicitly_sharded,
  merged_alike,
  own_labels,
  type_of,
)
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform import joint
from jaxlora._platform.kept_sum import plain_sum
from jaxlora._platform.policy import Policy
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import at_once, late
from jaxlora._platform.widened import NotWidened, widened
from jaxlora._transform.factored import Factored
from jaxlora._transform.pairing import Pairing
from jaxlora._transform.thin import Shrink, Shrinks, shrink_along_factor
from jaxlora._weight.roles import RANK, factor_axes

Weight = tuple[Any, Any, Any]  # base, A, B


# ----------------------------------------------------------------------------------------------------------------------
# One product, as a value.


@dataclasses.dataclass(frozen=True)
class Product:
  """`x W + h B`, as functions of its arrays: equal for products that are alike.

  Attributes:
    primitive, params: `dot_general`, and the equation's parameters.
    labels: of the axes of `x`; those of the weight are numbered.
    ndim: how many axes the weight has.
    contracted: the weight's axes that are summed.
    free: those that go to the result alone.
    second: the labels of B.
    stack: the summed axes that the factors share.
    weight_first: whether the weight is the left operand.
    wanted: the labels of the result.
    result: what the product is to be.
    shrink: how `x` meets A.
    looping: whether this is inside the body of a loop.
  """

  primitive: Any
  params: tuple[tuple[str, Any], ...]
  labels: tuple[Hashable, ...]
  ndim: int
  contracted: tuple[int, ...]
  free: tuple[int, ...]
  batched: bool
  second: tuple[Hashable, ...]
  stack: tuple[int, ...]
  weight_first: bool
  wanted: tuple[Hashable, ...]
  result: Result
  shrink: Shrink
  policy: Policy

  def in_order(self, x: Any, w: Any) -> tuple[Any, Any]:
    """The two as the equation has them."""
    return (w, x) if self.weight_first else (x, w)

  def base(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """The base's own product. Where the compiler makes a wider copy of W, the backward pass makes that again."""
    if self.policy.widens_bases and w.dtype.itemsize == 2 and not explicitly_sharded(x):
      return late(lambda residuals, x: self.plain(x, residuals[0]), (w,), x, self.policy.wait)
    return self.plain(x, w)

  def plain(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x W`."""
    y = self.flat(x, w) if self.policy.flattens else None
    return self.primitive.bind(*self.in_order(x, w), **dict(self.params)) if y is None else y

  def flat(self, x: jax.Array, w: jax.Array) -> jax.Array | None:
    """The product with a weight of many axes flattened to two; `None` where that is no help.

    The gradient `dx = dy W^T` is then one product, too: of a kernel with its output axes apart, `(in, heads, width)`,
    XLA would lay out a transposed copy each time. Token axes stay apart: a mesh may shard more than one of them.
    """
    alike = x.dtype == w.dtype and not self.batched and not explicitly_sharded(x)
    if self.ndim < 3 or not alike or not self.contracted:
      return None
    u, v, summed = merged_alike(Labelled(x, self.labels), Labelled(w, tuple(range(self.ndim))), list(self.contracted))
    v = v.flattened(self.free)
    if v.array.ndim > 2:
      return None
    y = contract(*self.in_order(u, v), summed, self.result)
    return y.expanded().ordered(self.wanted)

  def expand(self, h: Labelled, b: jax.Array, by: Callable[..., Labelled] = contract) -> jax.Array:
    """`h B`, laid out as the result."""
    v = Labelled(b, self.second)
    if self.policy.flattens and self.result.sharding is None:
      h = h.flattened(own_labels(h.labels))
      v = v.flattened([d for d in self.free if d in self.second])
    y = by(*self.in_order(h, v), [RANK, *self.stack], self.result)
    return y.expanded().ordered(self.wanted)

  def joins(self, x: jax.Array, weight: Weight) -> bool:
    """Whether the products can be one: of matrices, in one dtype, and not sharded by type."""
    alike = len({array.dtype for array in (x, *weight)}) == 1
    return alike and not explicitly_sharded(x) and self.matrices(*weight) is not None

  def matrices(self, w: jax.Array, a: jax.Array, b: jax.Array) -> joint.Matrices | None:
    """The product as one of matrices; `None` where it is not."""
    if self.batched or self.stack or self.result.sharding is not None:
      return None
    labels = run_of(self.labels, self.contracted, w.shape)
    v = Labelled(w, tuple(range(self.ndim))).flattened(self.contracted).flattened(self.free)
    first = Labelled(a, self.shrink.factor).flattened(self.contracted)
    second = Labelled(b, self.second).flattened(self.free)
    if labels is None or v.array.ndim != 2 or first.array.ndim != 2 or second.array.ndim != 2:
      return None
    (k,) = (label for label in v.labels if label in labels)
    (n,) = (label for label in v.labels if label != k)
    known = {*first.labels} == {RANK, k} and {*second.labels} == {RANK, n} and run_of(self.wanted, self.free, w.shape)
    return joint.Matrices(labels, v, first, second, k, n, RANK) if known else None


def run_of(labels: Sequence[Hashable], run: Sequence[int], shape: Sequence[int]) -> tuple[Hashable, ...] | None:
  """Labels with a run of the weight's axes as one; `None` where those are not adjacent and in this order."""
  if len(run) < 2:
    return tuple(labels) if run else None
  start = labels.index(run[0])
  if tuple(labels[start : start + len(run)]) != tuple(run):
    return None
  return (*labels[:start], Run(tuple(run), tuple(shape[d] for d in run)), *labels[start + len(run) :])


def product_of(
  primitive: Any, params: Any, x: Any, w: Factored, pairing: Pairing, out: Any, policy: Policy, looping: bool
) -> Product:
  """The product of a `dot_general` equation.

  Args:
    primitive, params: of the equation.
    x, out: of the types of the adapter's input and of the result.
    w: the weight, of which no axis of role `o` is contracted.
    pairing: which axes are summed and which are batched.
    policy: how the products are written.
    looping: whether this is inside the body of a loop.
  """
  ndim = len(w.roles)
  wanted = tuple(pairing.result_labels(x.ndim, ndim))
  sharded = explicitly_sharded(x) or explicitly_sharded(out)
  sharding = ShardingByLabel.of(out, wanted) if sharded else None
  return Product(
    primitive=primitive,
    params=tuple(sorted(params.items())),
    labels=pairing.input_labels(x.ndim),
    ndim=ndim,
    contracted=tuple(pairing.contracted),
    free=tuple(pairing.free(ndim)),
    batched=bool(pairing.batched),
    second=factor_axes(w.roles, "o"),
    stack=tuple(d for d in pairing.contracted if w.roles[d] == "s"),
    weight_first=pairing.weight_first,
    wanted=wanted,
    result=Result(out.dtype, pairing.precision, sharding, looping),
    shrink=shrink_of(x, w.roles, pairing, out.dtype, policy, looping, sharding),
    policy=policy,
  )


# ----------------------------------------------------------------------------------------------------------------------
# Several products of one input.


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

  def __call__(
    self, x: jax.Array, thin: Sequence[Labelled], weights: Sequence[Weight], sources: Sequence[jax.Array] = ()
  ) -> list[jax.Array]:
    """The products; `sources` are what `norm` is made of."""
    add, add_once = (plain_sum, plain_sum) if self.each[0].result.looping else (self.policy.add, self.policy.add_once)

    @jax.custom_jvp
    def products(x, thin, weights, sources):
      return self.forward(x, thin, weights, sources, self.policy.expand, add)

    @jax.custom_jvp
    def differentiated(x, thin, weights, sources):
      return self.forward(x, thin, weights, sources, contract, add_once)

    def jvp(primals, tangents):
      ys = differentiated(*primals)
      return ys, self.derivative(primals, tangents) or [jnp.zeros_like(y) for y in ys]

    products.defjvp(jvp, symbolic_zeros=True)
    differentiated.defjvp(jvp, symbolic_zeros=True)
    return products(x, list(thin), list(weights), list(sources))

  def forward(
    self, x: jax.Array, thin: Sequence[Labelled], weights: Sequence[Weight], sources: Sequence[Any], *how: Any
  ) -> list[jax.Array]:
    """The products."""
    return [
      self.one(product, x, h, weight, sources, *how)
      for product, h, weight in zip(self.each, thin, weights, strict=True)
    ]

  def one(
    self, product: Product, x: jax.Array, h: Labelled, weight: Weight, sources: Sequence[Any], expand: Any, add: Any
  ) -> jax.Array:
    """One of them: two products and a sum, or one product."""
    base = product.plain(x, weight[0])
    separately = lambda base, x, h, weight, sources: add(base, product.expand(h, weight[2], expand))
    if not product.joins(x, weight):
      return separately(base, x, h, weight, sources)
    shared = range(3, 6)  # the weight and its factors, behind the base's product, x and h
    return self.policy.lowered(
      separately, {"tpu": Joined(product, self.norm)}, base, x, h, weight, sources, shared=shared
    )

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
      completed(product.shrink)(h, x, weight[1]) if moving.x and moves else h
      for product, h, weight, moves in zip(self.each, thin, weights, moving.seconds, strict=True)
    ]
    along = Along(self, moving)
    transposes = {}
    if all(product.joins(x, weight) for product, weight in zip(self.each, weights, strict=True)):
      transposes = self.policy.transposes({"tpu": TransposeJoined(self, moving)})
    return late(along, (complete, list(weights)), steps, at_once, transposes)


@dataclasses.dataclass(frozen=True)
class Moving:
  """What of some products' operands has a tangent."""

  x: bool
  thin: tuple[bool, ...]
  seconds: tuple[bool, ...]


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
      terms = [] if dx is None else [product.base(dx, w)]
      terms += [] if dh is None else [product.expand(dh, b)]
      terms += [] if db is None else [product.expand(h, db)]
      out.append(functools.reduce(lambda x, y: x + y.astype(x.dtype), terms))
    return out


def added(x: Labelled, y: Labelled) -> Labelled:
  """The sum of two arrays with the same labels."""
  return Labelled(x.array + y.array, x.labels)


@functools.cache
def completed(shrink: Shrink) -> Callable[[Labelled, jax.Array, jax.Array], Labelled]:
  """`h`, with the derivative along `x` that it was made without: second derivatives of the whole need it."""

  @jax.custom_jvp
  def complete(h, x, a):
    del x, a
    return h

  def jvp(primals, tangents):
    (h, x, a), (dh, dx, _) = primals, tangents
    return complete(h, x, a), added(dh, shrink(dx, a))

  complete.defjvp(jvp)
  return complete


@dataclasses.dataclass(frozen=True)
class Joined:
  """One product in the form that has a single pass."""

  product: Product
  norm: Any

  def __call__(
    self, base: jax.Array, x: jax.Array, h: Labelled, weight: Weight, sources: Sequence[jax.Array]
  ) -> jax.Array:
    del base  # which is part of the one product
    product, matrices = self.product, self.product.matrices(*weight)
    assert matrices is not None
    u = self.beside_norm(h, sources, matrices)
    if u is None:
      u = joint.joined(Labelled(x, product.labels).flattened(product.contracted), matrices.k, [h], [matrices.r])
    y = joint.forward(matrices, u, product.weight_first, product.result)
    return y.expanded().ordered(product.wanted)

  def beside_norm(self, h: Labelled, sources: Sequence[Any], m: joint.Matrices) -> Labelled | None:
    """`[x, h]` where `x` is a norm; `None` where it is not, or not one that can be made wider."""
    labels = self.product.labels
    if self.norm is None or m.k not in labels:
      return None
    try:
      rank = h.array.shape[h.labels.index(m.r)]
      wider = widened(self.norm.region, sources, labels.index(m.k), rank)
    except NotWidened:
      return None
    return joint.beside_norm(Labelled(wider, labels), m.k, h, m.r)


@dataclasses.dataclass(frozen=True)
class TransposeJoined:
  """The transpose of `Along` in the form that has a single pass for each weight."""

  products: Products
  moving: Moving

  def __call__(self, residuals: Any, cotangents: Sequence[jax.Array], types: Sequence[Any]) -> list[Any]:
    del types
    thin, weights = residuals
    each = self.products.each
    matrices = [p.matrices(*weight) for p, weight in zip(each, weights, strict=True)]
    flat = [Labelled(dy, p.wanted).flattened(p.free) for p, dy in zip(each, cotangents, strict=True)]
    gs = [contract(dy, m.b, [m.n], p.shrink.result) for p, m, dy in zip(each, matrices, flat, strict=True)]
    out = [joint.transpose_input(matrices, flat, gs).expanded().ordered(each[0].labels)] if self.moving.x else []
    out += [g.ordered(h.labels) for g, h, moves in zip(gs, thin, self.moving.thin, strict=True) if moves]
    for p, m, h, dy, moves in zip(each, matrices, thin, flat, self.moving.seconds, strict=True):
      out += [joint.transpose_second(m, h, dy).expanded().ordered(p.second)] if moves else []
    return out


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
  return called(Products((product,)), x, [h], [weight])[0]


def called(products: Products, *args: Any) -> list[jax.Array]:
  """The products, traced once for all that are alike where the policy says so."""
  return traced_once(products, *args) if products.policy.shares_traces else products(*args)


@dataclasses.dataclass(frozen=True)
class Apart:
  """`x W + h B` of a base's product that is there, and of an `h` whose input is not `x`: of dropout, say."""

  product: Product

  def __call__(self, base: jax.Array, h: Labelled, b: jax.Array) -> jax.Array:
    policy = self.product.policy
    return policy.sum(base, self.product.expand(h, b, policy.expand), self.product.result.looping)


def dot_apart(
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
  apart = Apart(product)
  return traced_once(apart, y, h, b) if product.policy.shares_traces else apart(y, h, b)


def shrink_of(
  x: Any, roles: str, pairing: Pairing, dtype: Any, policy: Policy, looping: bool, sharding: Any = None
) -> Shrink:
  """How `x` meets the A of a weight with these roles, in a product of result `dtype`."""
  inputs = tuple(d for d in range(len(roles)) if d in pairing.contracted and roles[d] == "i")
  thin = Result(wider_dtype(x.dtype, dtype), pairing.precision, sharding, looping)
  labels, factor = pairing.input_labels(x.ndim), factor_axes(roles, "i")
  return Shrink(labels, factor, inputs, pairing.weight_first, thin, policy.flattens)


@dataclasses.dataclass(frozen=True)
class ShardingByLabel:
  """How a product is sharded: along each of its labels as the base's product is, along the rank never.

  Equal for products that are alike, so that those are traced once.
  """

  mesh: Any
  names: tuple[tuple[Hashable, Any], ...]

  @classmethod
  def of(cls, base: jax.Array, labels: Sequence[Hashable]) -> "ShardingByLabel":
    """That of the base's product, whose axes have these labels."""
    whole = type_of(base).sharding
    return cls(whole.mesh, tuple(zip(labels, whole.spec, strict=True)))

  def __call__(self, labels: Sequence[Hashable]) -> Any:
    names = dict(self.names)
    return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*(names.get(label) for label in labels)))
