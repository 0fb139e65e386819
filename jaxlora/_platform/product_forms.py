"""The forms of adapted products, and of the transpose of their derivative, that some compilers are given.

TPUs take each product and its low-rank part as one (`joint.py`), in loops as a product and a short sum (`summed.py`).
There the compiler lays tokens along the fastest axis, which suits that sum and the shortest ranks alone: what longer
ones are joined to lies along its rows.
GPUs take all products of one input as two (`merged.py`).

Reading order: what is known of a product -> one product -> the products of one input -> transposes.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
from typing import Any, Protocol

import jax

from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._platform import joint, merged, summed
from jaxlora._platform.joint import Weight
from jaxlora._platform.layouts import along_rows
from jaxlora._platform.widened import NotWidened, widened


class Product(Protocol):
  """How an input meets a weight, as far as the forms need to know it."""

  @property
  def labels(self) -> tuple[Hashable, ...]: ...
  @property
  def ndim(self) -> int: ...
  @property
  def contracted(self) -> tuple[int, ...]: ...
  @property
  def free(self) -> tuple[int, ...]: ...
  @property
  def second(self) -> tuple[Hashable, ...]: ...
  @property
  def weight_first(self) -> bool: ...
  @property
  def wanted(self) -> tuple[Hashable, ...]: ...
  @property
  def result(self) -> Result: ...
  @property
  def thin_result(self) -> Result: ...
  def as_matrices(self, x: jax.Array, weight: Weight) -> joint.Matrices: ...
  def as_matrices_again(self, cotangent: jax.Array, weight: Weight) -> joint.Matrices: ...


@dataclasses.dataclass(frozen=True)
class Moving:
  """What of some products' operands has a tangent."""

  x: bool
  thin: tuple[bool, ...]
  seconds: tuple[bool, ...]


def read_in_place(each: Sequence[Product], weights: Sequence[Weight]) -> bool:
  """Whether the weights are layers of a stack that their products can read: matrices as they lie, in a loop.

  Of codes those alone that are a number times a scale. Others take the vector units more time than the products take
  the matrix units: joined, they are formed once.
  """
  readable = all(isinstance(w, jax.Array) or w.forms_in_passing for w, _, _ in weights)
  return readable and all(product.result.looping and product.ndim == 2 for product in each)


@dataclasses.dataclass(frozen=True)
class Joined:
  """One product in the form that has a single pass.

  Attributes:
    product: how the input meets the weight.
    norm: the region that the input is the result of, where it is a norm.
    place: which of the products of the input it is.
    thin_and_second: what it has of `h` and B, outside of loops (`joint.py`).
  """

  product: Product
  norm: Any
  place: int
  thin_and_second: Callable[..., tuple[Labelled, Labelled]]

  def __call__(self, x: jax.Array, thin: Sequence[Labelled], weight: Weight, sources: Sequence[jax.Array]) -> jax.Array:
    product, matrices = self.product, self.product.as_matrices(x, weight)
    if product.result.looping:
      h, b = thin[self.place], matrices.b  # they lie with tokens as the fastest axis there, and to part them is free
    else:
      h, b = self.thin_and_second(matrices, thin, self.place)
    flat = Labelled(x, product.labels).flattened(product.contracted)
    short = summed.is_short(h, matrices.r)
    if short and read_in_place([product], [weight]):
      y = summed.forward(matrices, flat, h, product.weight_first, product.result)
      return y.expanded().ordered(product.wanted)
    if product.result.looping and joint.as_large_as_result(flat, matrices.k):
      y = joint.forward_apart(matrices, flat, h, product.weight_first, product.result)
      return y.expanded().ordered(product.wanted)
    if product.result.looping and not short:
      sources = [along_rows(value) if value.shape == x.shape else value for value in sources]
    u = self.beside_norm(h, sources, matrices)
    if u is None:
      u = joint.joined(flat, matrices.k, [h], [matrices.r])
    y = joint.forward(dataclasses.replace(matrices, b=b), u, product.weight_first, product.result)
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
class SideBySide:
  """All products of one input in the form that merges them (`merged.py`)."""

  each: tuple[Product, ...]

  def __call__(
    self, x: jax.Array, thin: Sequence[Labelled], weights: Sequence[Weight], sources: Sequence[jax.Array]
  ) -> list[jax.Array]:
    del sources
    matrices = [p.as_matrices(x, weight) for p, weight in zip(self.each, weights, strict=True)]
    u = Labelled(x, self.each[0].labels).flattened(self.each[0].contracted)
    ys = merged.forward(merged.SideBySide(matrices), u, thin, self.each[0].result)
    return [y.expanded().ordered(p.wanted) for p, y in zip(self.each, ys, strict=True)]


@dataclasses.dataclass(frozen=True)
class TransposeJoined:
  """The transpose of `Along` in the form that has a single pass for each weight."""

  each: tuple[Product, ...]
  moving: Moving

  def __call__(self, residuals: Any, cotangents: Sequence[jax.Array], types: Sequence[Any]) -> list[Any]:
    del types
    thin, weights = residuals
    triples = zip(self.each, cotangents, weights, strict=True)
    matrices = [p.as_matrices_again(dy, weight) for p, dy, weight in triples]
    flat = [Labelled(dy, p.wanted).flattened(p.free) for p, dy in zip(self.each, cotangents, strict=True)]
    if any(p.result.looping and not summed.is_short(h, m.r) for p, h, m in zip(self.each, thin, matrices, strict=True)):
      flat = [dataclasses.replace(dy, array=along_rows(dy.array)) for dy in flat]
    gs = [contract(dy, m.b, [m.n], p.thin_result) for p, m, dy in zip(self.each, matrices, flat, strict=True)]
    in_place = read_in_place(self.each, weights)
    out = [self.to_input(matrices, flat, gs, in_place).expanded().ordered(self.each[0].labels)] if self.moving.x else []
    out += [g.ordered(h.labels) for g, h, moves in zip(gs, thin, self.moving.thin, strict=True) if moves]
    for p, m, h, dy, moves in zip(self.each, matrices, thin, flat, self.moving.seconds, strict=True):
      out += [along_rows(joint.transpose_second(m, h, dy).expanded().ordered(p.second))] if moves else []
    return out

  def to_input(
    self, matrices: Sequence[joint.Matrices], flat: Sequence[Labelled], gs: Sequence[Labelled], in_place: bool
  ) -> Labelled:
    """`dx`, in the form that suits."""
    if in_place and all(summed.is_short(g, m.r) for g, m in zip(gs, matrices, strict=True)):
      return summed.transpose_input(matrices, flat, gs)
    if self.each[0].result.looping and joint.as_large_as_result(flat[-1], matrices[-1].n):
      return joint.transpose_input_apart(matrices, flat, gs)
    return joint.transpose_input(matrices, flat, gs)


@dataclasses.dataclass(frozen=True)
class TransposeSideBySide:
  """The transpose of `Along`, where all operands have tangents, in the form that merges the products."""

  each: tuple[Product, ...]

  def __call__(self, residuals: Any, cotangents: Sequence[jax.Array], types: Sequence[Any]) -> list[Any]:
    del types
    thin, weights = residuals
    triples = zip(self.each, cotangents, weights, strict=True)
    matrices = merged.SideBySide([p.as_matrices_again(dy, weight) for p, dy, weight in triples])
    flat = [Labelled(dy, p.wanted).flattened(p.free) for p, dy in zip(self.each, cotangents, strict=True)]
    dx, gs, seconds = merged.transpose(matrices, thin, flat, self.each[0].thin_result)
    out = [dx.expanded().ordered(self.each[0].labels)]
    out += [g.ordered(h.labels) for g, h in zip(gs, thin, strict=True)]
    return out + [db.expanded().ordered(p.second) for p, db in zip(self.each, seconds, strict=True)]
