"""The factored product: how a weight that is `base + A B` acts on an input without ever being formed."""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.dtypes import inexact, wider_dtype
from jaxlora._base.labelled import Labelled, Result, Run, contract, explicitly_sharded
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.expand import second_product
from jaxlora._platform.kept_sum import add
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import late
from jaxlora._transform.factored import Factored
from jaxlora._weight.roles import RANK, factor_axes


class Tap:
  """Is shown the input of an adapted product, and how it meets A."""

  def see(self, product: Callable[[jax.Array, jax.Array], Any], x: jax.Array, a: jax.Array) -> None:
    """`product(x, a)` is the product with the weight's A, bilinear."""
    raise NotImplementedError


def first_product(
  product: Callable[[jax.Array, jax.Array], Any], x: jax.Array, a: jax.Array, recipe: Recipe | Tap | None
) -> Any:
  """`h = product(x, a)`, bilinear, where `x` is made again for the gradient of `a` if there is a recipe for it.

      dh = product(dx, a) + product(x again, da)

  Only the second term needs x, and so does only its transpose, `da = product^T(x again, dh)`. A `Tap` in the place of
  a recipe is shown what meets here.
  """
  if isinstance(recipe, Tap):
    recipe.see(product, x, a)
    return product(x, a)
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
      terms.append(late(lambda leaves, da: product(recipe.again(leaves), da), leaves, da))
    out = h(x, a, leaves)
    return out, jax.tree.map(
      lambda *parts: functools.reduce(jnp.add, parts), *terms or [jax.tree.map(jnp.zeros_like, out)]
    )

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, recipe.leaves)


@dataclasses.dataclass(frozen=True)
class Pairing:
  """How a `dot_general` brings an input and a weight together, by labels.

  Attributes:
    contracted, batched: which axes of the weight meet which axes of the input.
    weight_first: whether the weight is the left operand, whose free axes come first in the result.
    precision: as in `jax.lax.dot_general`.
  """

  contracted: dict[int, int]
  batched: dict[int, int]
  weight_first: bool
  precision: Any

  def input_labels(self, ndim: int) -> tuple[Hashable, ...]:
    paired = {k: d for d, k in (self.contracted | self.batched).items()}
    return tuple(paired.get(k, ("x", k)) for k in range(ndim))

  def free(self, ndim: int) -> list[int]:
    """The axes of the weight, of `ndim`, that go to the result alone."""
    return [d for d in range(ndim) if d not in self.contracted and d not in self.batched]

  def result_labels(self, x_ndim: int, w_ndim: int) -> list[Hashable]:
    x_free, w_free = own_labels(self.input_labels(x_ndim)), self.free(w_ndim)
    return [*self.batched, *((*w_free, *x_free) if self.weight_first else (*x_free, *w_free))]

  def product(self, x: Any, w: Any, by: Callable[..., Any], *rest: Any) -> Any:
    """`by` of the two in the order of the `dot_general`."""
    return by(*((w, x) if self.weight_first else (x, w)), *rest)


def own_labels(labels: Sequence[Hashable]) -> list[Hashable]:
  """The labels of axes that only the input has."""
  return [label for label in labels if isinstance(label, tuple)]


def _merged_alike(x: Labelled, y: Labelled, axes: Sequence[Hashable]) -> tuple[Labelled, Labelled, list[Hashable]]:
  """Both with the axes that they share flattened to one, if that can be done to both; and those axes' labels then."""
  flat = x.merged(axes), y.merged(axes)
  if flat[0].labels == x.labels or flat[1].labels == y.labels:
    return x, y, list(axes)
  return *flat, [label for label in flat[1].labels if isinstance(label, Run)]


def base_dot(x: jax.Array, base: jax.Array, pairing: Pairing, like: Any) -> jax.Array | None:
  """The base's own product with a weight of many axes flattened to two; `None` where that is no help.

  The gradient `dx = dy W^T` is then one product, too: of a kernel with its output axes apart, `(in, heads, width)`, XLA
  would lay out a transposed copy each time. Token axes stay apart: a mesh may shard more than one of them.
  """
  plain = x.dtype == base.dtype and not pairing.batched and not explicitly_sharded(x)
  if base.ndim < 3 or not plain or not pairing.contracted:
    return None
  u, v, summed = _merged_alike(
    Labelled(x, pairing.input_labels(x.ndim)), Labelled(base, tuple(range(base.ndim))), list(pairing.contracted)
  )
  v = v.merged(pairing.free(base.ndim))
  if v.array.ndim > 2:
    return None
  y = pairing.product(u, v, contract, summed, Result(like.dtype, pairing.precision))
  return y.expanded().ordered(pairing.result_labels(x.ndim, base.ndim))


@dataclasses.dataclass(frozen=True)
class Shrink:
  """The first thin product, `h = x A^T`, as a function of `x` and A: equal for products that are alike.

  Attributes:
    labels: of the axes of `x`.
    factor: of the axes of A.
    summed: the labels that are summed.
    weight_first: whether the weight is the left operand.
    result: what `h` is to be.
  """

  labels: tuple[Hashable, ...]
  factor: tuple[Hashable, ...]
  summed: tuple[Hashable, ...]
  weight_first: bool
  result: Result

  def __call__(self, x: jax.Array, a: jax.Array) -> Labelled:
    u, first, summed = Labelled(x, self.labels), Labelled(a, self.factor), list(self.summed)
    if self.result.sharding is None:
      u, first, summed = _merged_alike(u, first, summed)
      u = u.merged(own_labels(self.labels))
    return contract(*((first, u) if self.weight_first else (u, first)), summed, self.result)


def shrinking(x: Any, w: Factored, pairing: Pairing, dtype: Any, sharding: Any = None, looping: bool = False) -> Shrink:
  """How `x` meets A in a product of result `dtype`."""
  inputs = tuple(d for d in range(len(w.roles)) if d in pairing.contracted and w.roles[d] == "i")
  thin = Result(wider_dtype(x.dtype, dtype), pairing.precision, sharding, looping)
  return Shrink(pairing.input_labels(x.ndim), factor_axes(w.roles, "i"), inputs, pairing.weight_first, thin)


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


@dataclasses.dataclass(frozen=True)
class Grow:
  """The sum of the base's product and the second thin one, `x W + h B`, as a function of the three: base, `h`, B.

  Attributes:
    weight_first: whether the weight is the left operand.
    summed: the labels that are summed.
    wanted: the labels of the result.
    result: what the product is to be.
  """

  weight_first: bool
  summed: tuple[Hashable, ...]
  wanted: tuple[Hashable, ...]
  result: Result

  def __call__(self, parts: Sequence[Any]) -> jax.Array:
    base, h, second = parts
    y = second_product(*((second, h) if self.weight_first else (h, second)), list(self.summed), self.result)
    return add(base, y.expanded().ordered(self.wanted), self.result.looping)


def dot(
  x: jax.Array,
  w: Factored,
  pairing: Pairing,
  base: jax.Array,
  recipe: Recipe | None = None,
  looping: bool = False,
  h: Labelled | None = None,
) -> jax.Array:
  """A `dot_general` of `x` and `w`, laid out as that of `x` and the base lays out its result.

      h = x A^T,   y = x W + h B      (2-D: token axes are flattened to one, so is each group of the weight's axes)

  In this form autodiff gives `dB = h^T dy` and `dA = (dy B^T)^T x`, both with the rank leading, and no transpose of a
  whole cotangent. No axis of role `o` may be contracted.

  Args:
    x: the adapter's input, any shape.
    w: the weight.
    pairing: which axes are summed and which are batched.
    base: the base's product: its dtype, and its sharding where that is part of its type, are the result's.
    recipe: how to make `x` again in the backward pass; `None` keeps it.
    looping: whether this is inside the body of a loop.
    h: the first product, where it was computed before, together with others'.

  Returns:
    Array of the shape and dtype of the base product.
  """
  ndim = len(w.roles)
  stack = [d for d in pairing.contracted if w.roles[d] == "s"]
  wanted = tuple(pairing.result_labels(x.ndim, ndim))

  sharded = explicitly_sharded(x) or explicitly_sharded(base)
  sharding = _sharding_by_label(Labelled(base, wanted)) if sharded else None
  if h is None:
    x = inexact(x, w.a.dtype)
    h = first_product(shrinking(x, w, pairing, base.dtype, sharding, looping), x, w.a, recipe)
  second = Labelled(w.b, factor_axes(w.roles, "o"))
  if not sharded:
    second = second.merged([d for d in pairing.free(ndim) if w.roles[d] == "o"])
  wide = Result(base.dtype, pairing.precision, sharding, looping)
  return traced_once(Grow(pairing.weight_first, (RANK, *stack), wanted, wide), (base, h, second))


def _sharding_by_label(result: Labelled) -> Callable[[Sequence[Hashable]], Any]:
  """How a product with these labels is sharded: along each as the base's product is, along the rank never."""
  whole = jax.typeof(result.array).sharding
  names = dict(zip(result.labels, whole.spec, strict=True))

  def of(labels: Sequence[Hashable]) -> Any:
    return jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec(*(names.get(label) for label in labels)))

  return of
