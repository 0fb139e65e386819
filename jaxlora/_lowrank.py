"""The factored product: how a weight that is `base + A B` acts on an input without ever being formed.

`Factored` is a weight as the transform carries it through a program; `dot` is the hot path. Both treat a contraction as
labelled axes: an axis of the weight is labelled with its position, an axis that only the input has with `("x", k)`.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora import _compat, _recompute
from jaxlora._axes import RANK, factor_axes, low_rank_delta, times_gain
from jaxlora._recompute import Recipe
from jaxlora._weight import LoraWeight, wider_dtype


class Routing(NamedTuple):
  """A mixed batch, as one row of it knows it.

  Attributes:
    rows: how many there are.
    via: how their low-rank products are to be computed; `"auto"` leaves it to `_banked.way`.
  """

  rows: int
  via: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
  """A weight on its way through a program, standing for `gain (base + sum_r a b)`.

  Invariants:
    1. `base`, `a`, `b` and `roles` obey `LoraWeight`'s invariants 1 and 2 for the array that this value stands for.
    2. The scale is already in `b`, and the factors have the base's dtype; under a base of 8 bits or less, their own.
    3. `key` is `None`, or the random key of this leaf's dropout.
    4. `gain` is `None`, for one, or laid out as a factor of rank 1 over the axes of role `gained`.
    5. `slot` is `None`; or `a` and `b` hold the factors of many adapters, on an axis that leads all others and in a
       dtype of their own, and the value stands for `base` with those of the adapter numbered `slot`; with none, where
       there is no such adapter. `routing` then says how many rows do this together. Only `picked` and `_banked.py`
       look into such factors. There is no gain then.
  """

  base: Any
  a: Any
  b: Any
  gain: Any
  key: Any
  roles: str = dataclasses.field(metadata={"static": True})
  dropout: float = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(metadata={"static": True})
  gained: str = dataclasses.field(default="o", metadata={"static": True})
  slot: Any = None
  routing: "Routing | None" = dataclasses.field(default=None, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  def mapped(self, by: Callable[[jax.Array, str], jax.Array], **changes: Any) -> "Factored":
    """The same with every factor, and the gain, by `by(factor, the role whose axes it holds)`."""
    gain = None if self.gain is None else by(self.gain, self.gained)
    return self.replace(a=by(self.a, "i"), b=by(self.b, "o"), gain=gain, **changes)

  def replace(self, **changes: Any) -> "Factored":
    return dataclasses.replace(self, **changes)

  def flipped(self) -> "Factored":
    """The same weight with A and B trading places: contracted and free axes trade roles."""
    trade = str.maketrans("io", "oi")
    return self.replace(a=self.b, b=self.a, roles=self.roles.translate(trade), gained=self.gained.translate(trade))


def enter(weight: LoraWeight, path: str, key: jax.Array | None) -> Factored:
  """The value that stands for `weight` inside the function: base frozen, scale folded into the smaller work."""
  dtype = weight.base.dtype
  base = lax.stop_gradient(weight.base)
  weight = dataclasses.replace(weight, base=base)
  a, b = weight.factors()
  gain = weight.gain(a, b)
  return Factored(
    base=base,
    a=beside(a, dtype),
    b=beside(b, dtype),
    gain=None if gain is None else beside(gain, dtype),
    key=key if weight.dropout else None,
    roles=weight.roles,
    dropout=weight.dropout,
    path=path,
  )


def beside(factor: jax.Array, dtype: Any) -> jax.Array:
  """A factor in the dtype that a base of `dtype` wants it in: narrow formats would leave nothing of an update."""
  return factor.astype(dtype) if dtype.itemsize > 1 and jnp.issubdtype(dtype, jnp.inexact) else factor


def picked(w: Factored) -> Factored:
  """The weight with the factors of its one adapter; of zero, where there is none of that number."""
  if w.slot is None:
    return w
  a, b = (beside(of_slot(bank, w.slot), w.base.dtype) for bank in (w.a, w.b))
  return w.replace(a=a, b=b, slot=None, routing=None)


def of_slot(bank: jax.Array, slot: jax.Array) -> jax.Array:
  """What a bank has in one slot; zeros where the number is none of a slot."""
  return bank.at[slot].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def materialize(w: Factored) -> jax.Array:
  """`gain (base + a b)` as one array: right everywhere, and what the transform exists to avoid."""
  w = picked(w)
  delta = low_rank_delta(w.a, w.b, w.roles)
  return times_gain(w.base.astype(delta.dtype) + delta, w.gain, w.roles, w.gained).astype(w.base.dtype)


def gained(x: jax.Array, gain: jax.Array) -> jax.Array:
  """`x` times a gain that lies along some of its axes."""
  return x * gain.astype(x.dtype)


def dropped(x: jax.Array, w: Factored, use: int, recipe: Recipe | None) -> tuple[jax.Array, Recipe | None]:
  """The adapter's input with dropout, and how to make it again.

  `use` counts the leaf's uses, so that each has a mask of its own; so has every shard that holds data of its own.
  """
  if w.key is None:
    return x, recipe
  key = jax.random.fold_in(w.key, use)
  for axis in _compat.varying_axes(x):
    key = jax.random.fold_in(key, lax.axis_index(axis))
  keep = jax.random.bernoulli(key, 1 - w.dropout, x.shape)

  def drop(x, keep):
    return jnp.where(keep, x / jnp.asarray(1 - w.dropout, x.dtype), jnp.zeros((), x.dtype))

  return drop(inexact(x, w.a.dtype), keep), recipe and recipe.then(drop, keep)


def inexact(x: jax.Array, dtype: Any) -> jax.Array:
  """`x`, or, where it holds integers, `x` in `dtype`."""
  return x if jnp.issubdtype(x.dtype, jnp.inexact) else x.astype(dtype)


class Run(NamedTuple):
  """The label of several axes flattened to one."""

  labels: tuple[Hashable, ...]
  sizes: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Labelled:
  """An array whose axes have labels."""

  array: jax.Array
  labels: tuple[Hashable, ...] = dataclasses.field(metadata={"static": True})

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


class Result(NamedTuple):
  """What a product is to be.

  Attributes:
    dtype: its dtype.
    precision: the user's, as in `jax.lax.dot_general`.
    sharding: from its labels to how it is sharded, where types say so.
    looping: whether it is computed in the body of a loop.
  """

  dtype: Any
  precision: Any = None
  sharding: Callable[[Sequence[Hashable]], Any] | None = None
  looping: bool = False


def contract(x: Labelled, y: Labelled, summed: Sequence[Hashable], result: Result) -> Labelled:
  """One `dot_general` by labels: shared labels are summed if in `summed`, batched otherwise, and batches lead."""
  shared = [label for label in x.labels if label in y.labels]
  batch = [label for label in shared if label not in summed]

  def places(group: Sequence[Hashable]) -> tuple[list[int], list[int]]:
    return [x.labels.index(label) for label in group], [y.labels.index(label) for label in group]

  dims = places([label for label in shared if label in summed]), places(batch)
  labels = (*batch, *(label for label in (*x.labels, *y.labels) if label not in shared))
  dtype = wider_dtype(x.array.dtype, y.array.dtype)
  product = lax.dot_general(
    x.array.astype(dtype),
    y.array.astype(dtype),
    dims,
    precision=result.precision,
    preferred_element_type=None if result.dtype == dtype else result.dtype,
    out_sharding=result.sharding and result.sharding(labels),
  )
  return Labelled(product, labels)


# ----------------------------------------------------------------------------------------------------------------------
# The two thin products.


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
      terms.append(_recompute.late(lambda leaves, da: product(recipe.again(leaves), da), leaves, da))
    out = h(x, a, leaves)
    return out, jax.tree.map(
      lambda *parts: functools.reduce(jnp.add, parts), *terms or [jax.tree.map(jnp.zeros_like, out)]
    )

  h.defjvp(jvp, symbolic_zeros=True)
  return h(x, a, recipe.leaves)


# Up to this rank XLA's CPU backend does better with the second product as a sum of outer products, at inference: it
# computes that sum inside what comes after, and writes no array of the output's size.
_SUMMED_RANK = 16


def second_product(x: Labelled, y: Labelled, summed: Sequence[Hashable], result: Result) -> Labelled:
  """`y = h B`, whichever of the two is on the left."""
  two_matrices = x.array.ndim == y.array.ndim == 2 and list(summed) == [RANK] and len({*x.labels, *y.labels}) == 3
  if two_matrices and result.sharding is None and not result.looping and jax.default_backend() == "cpu":
    rank = x.array.shape[x.labels.index(RANK)]
    if rank <= _SUMMED_RANK and jnp.issubdtype(result.dtype, jnp.floating):
      return rank_sum(x, y, result)
  return contract(x, y, summed, result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def rank_sum(x: Labelled, y: Labelled, result: Result) -> Labelled:
  """`sum_r x[:, r] y[r, :]` as one elementwise sum, which fuses; a dot where it is differentiated.

  d(x . y) = dx . y + x . dy
  """
  (row,) = (label for label in x.labels if label != RANK)
  (column,) = (label for label in y.labels if label != RANK)
  dtype = wider_dtype(result.dtype, jnp.float32)
  total = _outer_sum(x.ordered((row, RANK)).astype(dtype), y.ordered((RANK, column)).astype(dtype))
  return Labelled(total.astype(result.dtype), (row, column))


@functools.partial(jax.jit, inline=True)  # one trace for all products of a shape
def _outer_sum(rows: jax.Array, columns: jax.Array) -> jax.Array:
  terms = (
    lax.slice_in_dim(rows, r, r + 1, axis=1) * lax.slice_in_dim(columns, r, r + 1, axis=0) for r in range(rows.shape[1])
  )
  return functools.reduce(jnp.add, terms)


@rank_sum.defjvp
def _(result: Result, primals: Any, tangents: Any) -> tuple[Labelled, Labelled]:
  return jax.jvp(lambda x, y: contract(x, y, [RANK], result), primals, tangents)


def explicitly_sharded(x: Any) -> bool:
  """Whether the type of `x` says how it is sharded: merging its axes would then have to say it, too."""
  return any(axis is not None for axis in getattr(jax.typeof(x).sharding, "spec", ()))


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
    x_free, w_free = _own(self.input_labels(x_ndim)), self.free(w_ndim)
    return [*self.batched, *((*w_free, *x_free) if self.weight_first else (*x_free, *w_free))]

  def product(self, x: Any, w: Any, by: Callable[..., Any], *rest: Any) -> Any:
    """`by` of the two in the order of the `dot_general`."""
    return by(*((w, x) if self.weight_first else (x, w)), *rest)


def _own(labels: Sequence[Hashable]) -> list[Hashable]:
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
      u = u.merged(_own(self.labels))
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
  return _compat.traced_once(Grow(pairing.weight_first, (RANK, *stack), wanted, wide), (base, h, second))


def _sharding_by_label(result: Labelled) -> Callable[[Sequence[Hashable]], Any]:
  """How a product with these labels is sharded: along each as the base's product is, along the rank never."""
  whole = jax.typeof(result.array).sharding
  names = dict(zip(result.labels, whole.spec, strict=True))

  def of(labels: Sequence[Hashable]) -> Any:
    return jax.sharding.NamedSharding(whole.mesh, jax.sharding.PartitionSpec(*(names.get(label) for label in labels)))

  return of


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def add(base: jax.Array, delta: jax.Array, looping: bool = False) -> jax.Array:
  """The base's product plus the low-rank part, in the base product's dtype: one array where it is differentiated.

  XLA's CPU backend would otherwise add the two wherever it reads them, and keep both for the backward pass. In the body
  of a loop it keeps their sum.
  """
  del looping
  return _plus(base, delta)


@add.defjvp
def _(looping: bool, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  apart = not looping and jax.default_backend() == "cpu"
  return jax.jvp(_one_array if apart else _plus, primals, tangents)


def _plus(base: jax.Array, delta: jax.Array) -> jax.Array:
  return base + delta.astype(base.dtype)


@jax.custom_jvp
def _one_array(base: jax.Array, delta: jax.Array) -> jax.Array:
  return _compat.apart(_plus, base, delta)


@_one_array.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
  return _one_array(*primals), jax.jvp(_plus, primals, tangents)[1]
