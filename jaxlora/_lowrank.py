"""The factored product: how a weight that is `base + A B` acts on an input without ever being formed.

`Factored` is a weight as the transform carries it through a program; `dot` is the hot path. Both treat a contraction as
labelled axes: an axis of the weight is labelled with its position, an axis that only the input has with `("x", k)`.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._weight import RANK, LoraWeight, factor_axes, low_rank_delta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
  """A weight on its way through a program, standing for `base + sum_r a b`.

  Invariants:
    1. `base`, `a`, `b` and `roles` obey `LoraWeight`'s invariants 1 and 2 for the array that this value stands for.
    2. The scale is already in `b`, and the factors have the base's dtype.
    3. `key` is `None`, or the random key of this leaf's dropout.
  """

  base: Any
  a: Any
  b: Any
  key: Any
  roles: str = dataclasses.field(metadata={"static": True})
  dropout: float = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  def replace(self, **changes: Any) -> "Factored":
    return dataclasses.replace(self, **changes)

  def flipped(self) -> "Factored":
    """The same weight with A and B trading places: contracted and free axes trade roles."""
    return self.replace(a=self.b, b=self.a, roles=self.roles.translate(str.maketrans("io", "oi")))


def enter(weight: LoraWeight, path: str, key: jax.Array | None) -> Factored:
  """The value that stands for `weight` inside the function: base frozen, scale folded into the smaller work."""
  dtype = weight.base.dtype
  b = weight.b if weight.scale == 1 else weight.b * jnp.asarray(weight.scale, weight.b.dtype)
  return Factored(
    base=lax.stop_gradient(weight.base),
    a=weight.a.astype(dtype),
    b=b.astype(dtype),
    key=key if weight.dropout else None,
    roles=weight.roles,
    dropout=weight.dropout,
    path=path,
  )


def materialize(w: Factored) -> jax.Array:
  """`base + a b` as one array: right everywhere, and what the transform exists to avoid."""
  return w.base + low_rank_delta(w.a, w.b, w.roles)


def dropped(x: jax.Array, w: Factored, use: int) -> jax.Array:
  """The adapter's input with dropout; `use` counts the leaf's uses, so that each has a mask of its own."""
  if w.key is None:
    return x
  keep = jax.random.bernoulli(jax.random.fold_in(w.key, use), 1 - w.dropout, x.shape)
  return jnp.where(keep, x / jnp.asarray(1 - w.dropout, x.dtype), jnp.zeros((), x.dtype))


class Run(NamedTuple):
  """The label of several axes flattened to one."""

  labels: tuple[Hashable, ...]
  sizes: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Labelled:
  """An array whose axes have labels."""

  array: jax.Array
  labels: tuple[Hashable, ...]

  def merged(self, run: Sequence[Hashable]) -> "Labelled":
    """The axes of `run` flattened to one; unchanged where they are not adjacent and in this order."""
    run = tuple(run)
    start = self.labels.index(run[0]) if len(run) > 1 else 0
    if len(run) < 2 or self.labels[start : start + len(run)] != run:
      return self
    shape = self.array.shape
    sizes = shape[start : start + len(run)]
    array = lax.reshape(self.array, (*shape[:start], math.prod(sizes), *shape[start + len(run) :]))
    return Labelled(array, (*self.labels[:start], Run(run, sizes), *self.labels[start + len(run) :]))

  def expanded(self) -> "Labelled":
    """Every flattened run as its own axes again."""
    pairs = zip(self.labels, self.array.shape, strict=True)
    runs = [label if isinstance(label, Run) else Run((label,), (size,)) for label, size in pairs]
    labels = tuple(label for run in runs for label in run.labels)
    if labels == self.labels:
      return self
    return Labelled(lax.reshape(self.array, tuple(n for run in runs for n in run.sizes)), labels)

  def ordered(self, wanted: Sequence[Hashable]) -> jax.Array:
    """The array with its axes in the wanted order."""
    permutation = tuple(self.labels.index(label) for label in wanted)
    return self.array if permutation == tuple(range(self.array.ndim)) else lax.transpose(self.array, permutation)


def contract(x: Labelled, y: Labelled, summed: Sequence[Hashable], precision: Any = None) -> Labelled:
  """One `dot_general` by labels: shared labels are summed if in `summed`, batched otherwise, and batches lead."""
  shared = [label for label in x.labels if label in y.labels]
  batch = [label for label in shared if label not in summed]

  def places(group: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    return [x.labels.index(label) for label in group], [y.labels.index(label) for label in group]

  dims = places([label for label in shared if label in summed]), places(batch)
  free = [label for label in (*x.labels, *y.labels) if label not in shared]
  return Labelled(lax.dot_general(x.array, y.array, dims, precision=precision), (*batch, *free))


def _explicitly_sharded(x: jax.Array) -> bool:
  """Whether the type of `x` says how it is sharded: merging its axes would then have to say it, too."""
  return any(axis is not None for axis in getattr(jax.typeof(x).sharding, "spec", ()))


@dataclasses.dataclass(frozen=True)
class Pairing:
  """Which axes of the input meet which axes of the weight: weight axis -> input axis."""

  contracted: dict[int, int]
  batched: dict[int, int]


def dot(x: jax.Array, w: Factored, pairing: Pairing, *, weight_first: bool, precision: Any) -> jax.Array:
  """The low-rank part of a `dot_general` of `x` and `w`, laid out as that `dot_general` lays out its result.

      h = x A^T,   y = h B      (2-D: token axes are flattened to one, so is each group of the weight's axes)

  In this form plain autodiff gives `dB = h^T dy` and `dA = (dy B^T)^T x`, both with the rank leading, and no transpose
  of a whole cotangent. No axis of role `o` may be contracted together with one of role `i`; where only `o` axes are,
  the factors trade places.

  Args:
    x: the input, any shape.
    w: the weight.
    pairing: the axes that are summed and the axes that are batched.
    weight_first: whether the weight is the left operand, whose free axes come first in the result.
    precision: as in `jax.lax.dot_general`.

  Returns:
    Array of the shape of the base product.
  """
  if any(w.roles[d] == "o" for d in pairing.contracted):
    w = w.flipped()
  paired = {k: d for d, k in (pairing.contracted | pairing.batched).items()}
  labels = [paired.get(k, ("x", k)) for k in range(x.ndim)]
  x_free = [label for label in labels if isinstance(label, tuple)]
  w_free = [d for d in range(len(w.roles)) if d not in paired.values()]
  inputs: list[Hashable] = [d for d in range(len(w.roles)) if d in pairing.contracted and w.roles[d] == "i"]
  stack = [d for d in pairing.contracted if w.roles[d] == "s"]

  dtype = x.dtype if jnp.issubdtype(x.dtype, jnp.inexact) else w.a.dtype
  u = Labelled(x.astype(dtype), tuple(labels))
  first = Labelled(w.a.astype(dtype), factor_axes(w.roles, "i"))
  second = Labelled(w.b.astype(dtype), factor_axes(w.roles, "o"))
  if not _explicitly_sharded(x):
    flat = u.merged(inputs), first.merged(inputs)
    if flat[0].labels != u.labels and flat[1].labels != first.labels:
      u, first = flat
      inputs = [label for label in first.labels if isinstance(label, Run)]
    u = u.merged(x_free)
    second = second.merged([d for d in w_free if w.roles[d] == "o"])

  def product(data: Labelled, factor: Labelled, summed: Sequence[Hashable]) -> Labelled:
    return contract(*((factor, data) if weight_first else (data, factor)), summed, precision)

  y = product(product(u, first, inputs), second, [RANK, *stack]).expanded()
  return y.ordered([*pairing.batched, *((*w_free, *x_free) if weight_first else (*x_free, *w_free))])


def add(base: jax.Array, delta: jax.Array) -> jax.Array:
  """The base's product plus the low-rank part, in the base product's dtype."""
  return base + delta.astype(base.dtype)
