"""Grouped products: `ragged_dot`, where each group of an input's rows meets an expert of its own.

    y = ragged_dot(x, W) + ragged_dot(ragged_dot(x, A), B)

A factor that has no axis of experts is shared by them all: its product is then a plain one. Rows behind the last group
are zero in each of the three products, and so in their sum.

Reading order: how a grouped product meets a weight -> the thin products -> the gain of a variant -> the rule.
"""

from collections.abc import Hashable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.explicit import explicitly_sharded
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, dropped
from jaxlora._transform.pairing import Pairing, meeting
from jaxlora._transform.product import ShardingByLabel
from jaxlora._transform.rule import Op, rule
from jaxlora._transform.rules.dot import times
from jaxlora._weight.roles import RANK, factor_axes, laid_along

# ----------------------------------------------------------------------------------------------------------------------
# How a grouped product meets a weight.


@dataclasses.dataclass(frozen=True)
class Grouping:
  """Which axes have groups.

  Attributes:
    rows: label of the input's axis that the groups cut.
    experts: the weight's axis that has a slice for each group.
    batched: the labels that all operands share, in the equation's order.
    sizes_of_batches: whether the groups' sizes have batches of their own, and not one row for all.
    offset: `group_offset` of the equation.
  """

  rows: Hashable
  experts: int
  batched: tuple[int, ...]
  sizes_of_batches: bool
  offset: Any

  def product(self, x: Labelled, w: Labelled, sizes: jax.Array, summed: Sequence[Hashable], result: Result) -> Labelled:
    """The product of the rows of `x` with the experts in `w`; a plain one where `w` is shared by all of them."""
    if self.experts not in w.labels:
      return contract(x, w, summed, result)
    shared = [label for label in x.labels if label in w.labels]
    batch = [label for label in (*self.batched, *shared) if label in shared and label not in summed]
    batch = list(dict.fromkeys(batch))
    if self.sizes_of_batches and batch != [*self.batched]:
      raise Unfactorable("groups whose sizes differ from batch to batch, and a factor that has no axis of the batches")
    places = lambda of, labels: [of.labels.index(label) for label in labels]
    met = [label for label in shared if label in summed]
    own = lambda of: [label for label in of.labels if label not in shared and label != self.experts]
    labels = (*batch, *own(x), *own(w))
    dtype = wider_dtype(x.array.dtype, w.array.dtype)
    product = lax.ragged_dot_general(
      x.array.astype(dtype),
      w.array.astype(dtype),
      sizes,
      lax.RaggedDotDimensionNumbers(
        ((places(x, met), places(w, met)), (places(x, batch), places(w, batch))),
        [x.labels.index(self.rows)],
        [w.labels.index(self.experts)],
      ),
      precision=result.precision,
      preferred_element_type=None if result.dtype == dtype else result.dtype,
      group_offset=self.offset,
      out_sharding=result.sharding and result.sharding(labels),
    )
    return Labelled(product, labels)


def grouped(op: Op, args: Sequence[Any]) -> tuple[Factored, Pairing, Grouping]:
  """The weight of a grouped product as that meets it, with no axis of role `o` contracted, and how it does."""
  x, w, sizes = args
  if not isinstance(w, TracedWeight) or isinstance(x, TracedWeight):
    raise Unfactorable("a grouped product that has an adapted weight as its rows")
  numbers = op.params["ragged_dot_dimension_numbers"]
  if not numbers.rhs_group_dimensions:
    raise Unfactorable("a grouped product that cuts the contracted or the batched axes of the weight into groups")
  params = {"dimension_numbers": numbers.dot_dimension_numbers, "precision": op.params["precision"]}
  pairing, roles, flips = meeting(params, w.shape, w.roles, False)
  w = w.with_roles(roles)
  (rows,), (experts,) = numbers.lhs_ragged_dimensions, numbers.rhs_group_dimensions
  batches = tuple(pairing.batched), jnp.ndim(sizes) > 1
  grouping = Grouping(pairing.input_labels(x.ndim)[rows], int(experts), *batches, op.params["group_offset"])
  return (w.flipped() if flips else w), pairing, grouping


# ----------------------------------------------------------------------------------------------------------------------
# The thin products.


@dataclasses.dataclass(frozen=True)
class GroupedShrink:
  """The first thin product, `h = x A^T` of the experts' A, as a function of arrays: equal for products that are alike.

  Attributes:
    grouping: which axes have groups.
    labels, factor: of the axes of `x` and of A.
    summed: the labels that are summed.
    result: what `h` is to be.
  """

  grouping: Grouping
  labels: tuple[Hashable, ...]
  factor: tuple[Hashable, ...]
  summed: tuple[Hashable, ...]
  result: Result

  def __call__(self, x: jax.Array, a: jax.Array, sizes: jax.Array) -> Labelled:
    u, first = Labelled(x, self.labels), Labelled(a, self.factor)
    return self.grouping.product(u, first, sizes, self.summed, self.result)


# ----------------------------------------------------------------------------------------------------------------------
# The gain of a variant.


def gain_of_rows(
  w: Factored, grouping: Grouping, x: Labelled, sizes: jax.Array, summed: Sequence[Hashable], wanted: Sequence[Hashable]
) -> jax.Array:
  """The gain that each row's expert has, beside an array with these labels.

  Where experts have gains of their own, it is a grouped product with ones, exact in any precision.
  """
  gain = Labelled(w.gain, factor_axes(w.roles, w.gained))
  if set(gain.labels) - {RANK, grouping.experts} - set(wanted):
    raise Unfactorable("of the axes along which its variant scales the weight, the product sums over one")
  if grouping.experts not in gain.labels:
    return laid_along(gain.array, gain.labels, wanted)
  labels = (*(label for label in x.labels if label not in summed), RANK)
  kept = [n for n, label in zip(x.array.shape, x.labels, strict=True) if label not in summed]
  ones = Labelled(jnp.ones((*kept, 1), gain.array.dtype), labels)
  of_rows = grouping.product(ones, gain, sizes, [RANK], Result(gain.array.dtype, lax.Precision.HIGHEST))
  return laid_along(of_rows.array[..., None], (*of_rows.labels, RANK), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# The rule.


@rule("ragged_dot_general")
def _ragged_dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  w, pairing, grouping = grouped(op, args)
  x, _, sizes = args
  recipe, labels = op.recipe(x), pairing.input_labels(x.ndim)
  wanted = [label for label in pairing.result_labels(x.ndim, len(w.roles)) if label != grouping.experts]
  if w.gain is not None and w.gained == "i":
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      raise Unfactorable("integers meet a weight along the axes that its variant scales")
    x, recipe = times(x, gain_of_rows(w, grouping, Labelled(x, labels), sizes, tuple(pairing.contracted), labels)), None
  base = op.bind(x, w.base, sizes)[0]
  u, recipe = dropped(x, w, op.use, recipe)
  sharded = explicitly_sharded(x) or explicitly_sharded(op.result)
  sharding = ShardingByLabel.of(op.result, wanted) if sharded else None
  inputs = tuple(d for d in pairing.contracted if w.roles[d] == "i")
  thin = Result(wider_dtype(u.dtype, base.dtype), pairing.precision, sharding, op.looping)
  first = GroupedShrink(grouping, labels, factor_axes(w.roles, "i"), inputs, thin)
  h = op.shrink(first, u, w.a, recipe, sizes)
  stack = [d for d in pairing.contracted if w.roles[d] == "s"]
  second = Labelled(w.b, factor_axes(w.roles, "o"))
  delta = grouping.product(h, second, sizes, [RANK, *stack], thin._replace(dtype=base.dtype))
  result = op.policy.sum(base, delta.ordered(wanted), op.looping)
  if w.gain is not None and w.gained == "o":
    x_labels = Labelled(x, labels)
    result = times(result, gain_of_rows(w, grouping, x_labels, sizes, tuple(pairing.contracted), wanted))
  return [result]
