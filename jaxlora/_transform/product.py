"""The factored product: how a weight that is `base + A B` acts on an input without ever being formed.

    shrink h = x A^T,   expand y = x W + h B

Reading order: shrink -> the base's own product -> expand.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.dtypes import inexact, wider_dtype
from jaxlora._base.labelled import Labelled, Result, contract, explicitly_sharded
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.policy import Policy
from jaxlora._platform.recipes import Recipe
from jaxlora._platform.wait import late
from jaxlora._transform.factored import Factored
from jaxlora._transform.pairing import Pairing, merged_alike, own_labels
from jaxlora._weight.roles import RANK, factor_axes


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


def base_dot(x: jax.Array, base: jax.Array, pairing: Pairing, like: Any) -> jax.Array | None:
  """The base's own product with a weight of many axes flattened to two; `None` where that is no help.

  The gradient `dx = dy W^T` is then one product, too: of a kernel with its output axes apart, `(in, heads, width)`, XLA
  would lay out a transposed copy each time. Token axes stay apart: a mesh may shard more than one of them.
  """
  plain = x.dtype == base.dtype and not pairing.batched and not explicitly_sharded(x)
  if base.ndim < 3 or not plain or not pairing.contracted:
    return None
  u, v, summed = merged_alike(
    Labelled(x, pairing.input_labels(x.ndim)), Labelled(base, tuple(range(base.ndim))), list(pairing.contracted)
  )
  v = v.flattened(pairing.free(base.ndim))
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
    return contract(*((first, u) if self.weight_first else (u, first)), summed, self.result)


def shrink_of(
  x: Any, roles: str, pairing: Pairing, dtype: Any, policy: Policy, looping: bool, sharding: Any = None
) -> Shrink:
  """How `x` meets the A of a weight with these roles, in a product of result `dtype`."""
  inputs = tuple(d for d in range(len(roles)) if d in pairing.contracted and roles[d] == "i")
  thin = Result(wider_dtype(x.dtype, dtype), pairing.precision, sharding, looping)
  labels, factor = pairing.input_labels(x.ndim), factor_axes(roles, "i")
  return Shrink(labels, factor, inputs, pairing.weight_first, thin, policy.flattens)


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
class Expand:
  """The sum of the base's product and the second thin one, `x W + h B`, as a function of the three: base, `h`, B.

  Attributes:
    weight_first: whether the weight is the left operand.
    summed: the labels that are summed.
    wanted: the labels of the result.
    result: what the product is to be.
    policy: how the product and the sum are written.
  """

  weight_first: bool
  summed: tuple[Hashable, ...]
  wanted: tuple[Hashable, ...]
  result: Result
  policy: Policy

  def __call__(self, parts: Sequence[Any]) -> jax.Array:
    base, h, second = parts
    pair = (second, h) if self.weight_first else (h, second)
    y = self.policy.expand(*pair, list(self.summed), self.result)
    return self.policy.sum(base, y.expanded().ordered(self.wanted), self.result.looping)


def dot(
  x: jax.Array,
  w: Factored,
  pairing: Pairing,
  base: jax.Array,
  policy: Policy,
  looping: bool,
  shrink: Callable[[Callable[..., Any], jax.Array, jax.Array], Any],
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
    policy: how the products are written.
    looping: whether this is inside the body of a loop.
    shrink: `shrink(product, x, a)` computes the first thin product.
    h: the first thin product, where it was computed ahead, together with others'.

  Returns:
    Array of the shape and dtype of the base product.
  """
  ndim = len(w.roles)
  stack = [d for d in pairing.contracted if w.roles[d] == "s"]
  wanted = tuple(pairing.result_labels(x.ndim, ndim))
  sharded = explicitly_sharded(x) or explicitly_sharded(base)
  sharding = ShardingByLabel.of(base, wanted) if sharded else None
  if h is None:
    x = inexact(x, w.a.dtype)
    h = shrink(shrink_of(x, w.roles, pairing, base.dtype, policy, looping, sharding), x, w.a)
  second = Labelled(w.b, factor_axes(w.roles, "o"))
  if policy.flattens and not sharded:
    second = second.flattened([d for d in pairing.free(ndim) if w.roles[d] == "o"])
  result = Result(base.dtype, pairing.precision, sharding, looping)
  expand = Expand(pairing.weight_first, (RANK, *stack), wanted, result, policy)
  return traced_once(expand, (base, h, second)) if policy.shares_traces else expand((base, h, second))


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
    whole = jax.typeof(base).sharding
    return cls(whole.mesh, tuple(zip(labels, whole.spec, strict=True)))

  def __call__(self, labels: Sequence[Hashable]) -> Any:
    names = dict(self.names)
    return jax.sharding.NamedSharding(self.mesh, jax.sharding.PartitionSpec(*(names.get(label) for label in labels)))
