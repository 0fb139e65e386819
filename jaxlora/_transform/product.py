"""One adapted product as a value: how a `dot_general` of an input and a weight `base + A B` is computed.

    h = x A^T,   y = x W + h B

Reading order: the product -> that of an equation.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
from typing import Any

import jax

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.explicit import explicitly_sharded, type_of
from jaxlora._base.labelled import (
  Labelled,
  Result,
  Run,
  contract,
  merged_alike,
  own_labels,
)
from jaxlora._jax.sizes import elements
from jaxlora._platform import joint
from jaxlora._platform.joint import Weight
from jaxlora._platform.policy import Forms, Policy
from jaxlora._platform.wait import TransposeOf, at_once, late, on_cpus
from jaxlora._transform.coded import Coded, CodedProduct, formed, formed_again, how_it_waits, product_with
from jaxlora._transform.factored import Factored
from jaxlora._transform.pairing import Pairing
from jaxlora._transform.thin import Shrink
from jaxlora._weight.roles import RANK, factor_axes


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
    policy: how the products are written.
    flattens: whether groups of axes are flattened to one, as programs of one device have them.
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
  flattens: bool = False

  def flat(self) -> "Product":
    """The same for programs of one device."""
    flattens = self.policy.flattens and self.result.sharding is None
    return dataclasses.replace(self, shrink=self.shrink.flat(), flattens=flattens)

  @property
  def thin_result(self) -> Result:
    """What `h` is to be."""
    return self.shrink.result

  def in_order(self, x: Any, w: Any) -> tuple[Any, Any]:
    """The two as the equation has them."""
    return (w, x) if self.weight_first else (x, w)

  def base(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """The base's own product. Where the compiler makes a wider copy of W, the backward pass makes that again; of codes
    it forms W again in any case.
    """
    if isinstance(w, Coded):
      return product_with(Plain(self), x, w, self.policy, self.result.looping)
    widened = self.policy.widens_bases and w.dtype.itemsize == 2 and not explicitly_sharded(x)
    flat = self.flat()
    if not widened and not flat.is_flattened(x, w):
      return self.plain(x, w)
    along = lambda product: lambda residuals, x: product.plain(x, residuals[0])
    wait = on_cpus if widened else at_once
    forms = Forms(flat=TransposeOf(along(flat), jax.tree.structure(x), wait))
    return late(along(self), (w,), x, wait, self.policy.transposes(forms))

  def again(self, w: Any, x: jax.Array) -> jax.Array:
    """The base's own product with a tangent, or, transposed, with a cotangent."""
    if isinstance(w, Coded):
      coded = CodedProduct(Plain(self), self.policy, self.result.looping)
      return late(coded.linear, w, x, how_it_waits(w, self.policy))
    return self.base(x, w)

  def plain(self, x: jax.Array, w: jax.Array) -> jax.Array:
    """`x W`.

    Flat, a weight of many axes has two. The gradient `dx = dy W^T` is then one product, too: of a kernel with its
    output axes apart, `(in, heads, width)`, XLA would lay out a transposed copy each time.
    """
    if not self.is_flattened(x, w):
      return self.primitive.bind(*self.in_order(x, w), **dict(self.params))
    u, v, summed = merged_alike(Labelled(x, self.labels), Labelled(w, tuple(range(self.ndim))), list(self.contracted))
    y = contract(*self.in_order(u, v.flattened(self.free)), summed, self.result)
    return y.expanded().ordered(self.wanted)

  def is_flattened(self, x: Any, w: Any) -> bool:
    """Whether the weight is laid out as a matrix for its own product, and is none."""
    if not self.flattens or self.ndim < 3 or self.batched or x.dtype != w.dtype or explicitly_sharded(x):
      return False
    weight = tuple(range(self.ndim))
    inputs = len(self.contracted) == 1 or (is_run(self.contracted, weight) and is_run(self.contracted, self.labels))
    outputs = len(self.free) < 2 or is_run(self.free, weight)
    return inputs and outputs

  def expand(self, h: Labelled, b: jax.Array, by: Callable[..., Labelled] = contract) -> jax.Array:
    """`h B`, laid out as the result."""
    v = Labelled(b, self.second)
    if self.flattens:
      own = [d for d in self.free if d in self.second and d not in h.labels]  # not the stacked axes, which `h` has, too
      h, v = h.flattened(own_labels(h.labels)), v.flattened(own)
    y = by(*self.in_order(h, v), [RANK, *self.stack], self.result)
    return y.expanded().ordered(self.wanted)

  def joins(self, x: jax.Array, weight: Weight) -> bool:
    """Whether the products had better be one: of matrices, in one dtype, not sharded by type, and of many tokens."""
    alike = len({array.dtype for array in (x, *weight)}) == 1
    tokens = elements([size for size, label in zip(x.shape, self.labels, strict=True) if isinstance(label, tuple)])
    many = tokens > self.policy.few_tokens
    return many and alike and not explicitly_sharded(x) and self.is_of_matrices

  @property
  def is_of_matrices(self) -> bool:
    """Whether the weight and its factors are matrices, once runs of axes are flattened: labels tell, and no array."""
    if self.batched or self.stack or self.result.sharding is not None:
      return False
    own, inputs, outputs = tuple(range(self.ndim)), self.contracted, self.free
    two = len(inputs) + len(outputs) == self.ndim
    of_factors = {*self.shrink.factor} == {RANK, *inputs} and {*self.second} == {RANK, *outputs}
    side_by_side = all(is_run(inputs, labels) for labels in (own, self.shrink.factor, self.labels))
    return two and of_factors and side_by_side and all(is_run(outputs, x) for x in (own, self.second, self.wanted))

  def input_labels(self, shape: Sequence[int]) -> tuple[Hashable, ...]:
    """The labels of the input of a product of matrices, whose weight has this shape."""
    return with_run(self.labels, self.contracted, shape)

  def as_matrices(self, x: jax.Array, weight: Weight) -> joint.Matrices:
    """The product of `x` as one of matrices, where it is."""
    w, a, b = weight
    return self.laid_out(formed(w, x, self.policy, self.result.looping), a, b)

  def as_matrices_again(self, cotangent: jax.Array, weight: Weight) -> joint.Matrices:
    """The same in the backward pass, for the transpose, of the cotangent."""
    w, a, b = weight
    return self.laid_out(formed_again(w, cotangent, self.policy, self.result.looping), a, b)

  def laid_out(self, w: jax.Array, a: jax.Array, b: jax.Array) -> joint.Matrices:
    """A weight and its factors as matrices."""
    v = Labelled(w, tuple(range(self.ndim)))
    v = v.flattened(self.contracted).flattened(self.free)
    first = Labelled(a, self.shrink.factor).flattened(self.contracted)
    second = Labelled(b, self.second).flattened(self.free)
    labels = self.input_labels(w.shape)
    k, n = sorted(v.labels, key=lambda label: label not in labels)
    return joint.Matrices(labels, v, first, second, k, n, RANK)


@dataclasses.dataclass(frozen=True)
class Plain:
  """`x W` of a product, as a function of the two: equal for products that are alike."""

  product: Product

  def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
    return self.product.plain(x, w)


def is_run(run: Sequence[int], labels: Sequence[Hashable]) -> bool:
  """Whether some axes of the weight are adjacent among labels, and in this order."""
  if not run or run[0] not in labels:
    return False
  start = labels.index(run[0])
  return tuple(labels[start : start + len(run)]) == tuple(run)


def with_run(labels: Sequence[Hashable], run: Sequence[int], shape: Sequence[int]) -> tuple[Hashable, ...]:
  """Labels with a run of the weight's axes as one."""
  if len(run) < 2:
    return tuple(labels)
  start = labels.index(run[0])
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
    shrink=shrink_of(x, w.roles, pairing, out.dtype, looping, sharding),
    policy=policy,
  )


def shrink_of(x: Any, roles: str, pairing: Pairing, dtype: Any, looping: bool, sharding: Any = None) -> Shrink:
  """How `x` meets the A of a weight with these roles, in a product of result `dtype`."""
  inputs = tuple(d for d in range(len(roles)) if d in pairing.contracted and roles[d] == "i")
  thin = Result(wider_dtype(x.dtype, dtype), pairing.precision, sharding, looping)
  labels, factor = pairing.input_labels(x.ndim), factor_axes(roles, "i")
  return Shrink(labels, factor, inputs, pairing.weight_first, thin)


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
