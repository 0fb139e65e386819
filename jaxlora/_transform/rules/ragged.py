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
from jaxlora._jax.by_platform import whole
from jaxlora._platform.layouts import kept_small
from jaxlora._platform.policy import Forms, Policy
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, dropped
from jaxlora._transform.pairing import Pairing, meeting
from jaxlora._transform.product import ShardingByLabel
from jaxlora._transform.rule import Op, rule
from jaxlora._transform.rules.dot import times
from jaxlora._transform.thin_derivative import InForms, shrink_by, with_prompt_gradients
from jaxlora._weight.roles import RANK, factor_axes, laid_along

# ----------------------------------------------------------------------------------------------------------------------
# How a grouped product meets a weight.

WIDEST = 512  # terms of all experts' factors that a TPU computes side by side in the forward pass, too


@dataclasses.dataclass(frozen=True)
class Grouping:
  """Which axes have groups.

  Attributes:
    rows: label of the input's axis that the groups cut.
    experts: the weight's axis that has a slice for each group.
    batched: the labels that all operands share, in the equation's order.
    sizes_of: how many axes the groups' sizes have ahead of the experts': batches, and others of the input behind them;
      none where they are one row for all.
    offset: `group_offset` of the equation.
  """

  rows: Hashable
  experts: int
  batched: tuple[int, ...]
  sizes_of: int
  offset: Any

  def product(self, x: Labelled, w: Labelled, sizes: jax.Array, summed: Sequence[Hashable], result: Result) -> Labelled:
    """The product of the rows of `x` with the experts in `w`; a plain one where `w` is shared by all of them."""
    if self.experts not in w.labels:
      return contract(x, w, summed, result)
    shared = [label for label in x.labels if label in w.labels]
    batch = [label for label in (*self.batched, *shared) if label in shared and label not in summed]
    batch = list(dict.fromkeys(batch))
    if self.sizes_of and batch != [*self.batched]:
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

  def members(self, x: Labelled, sizes: jax.Array) -> Labelled:
    """Which row is in which expert's group: (batches, rows, experts), without the batches where all have one size."""
    ends = jnp.cumsum(sizes, -1)[..., None, :]
    rows = x.array.shape[x.labels.index(self.rows)]
    row = lax.broadcasted_iota(ends.dtype, (*ends.shape[:-2], rows, 1), ends.ndim - 2)
    batches = self.batched if self.sizes_of else ()
    return Labelled((ends - sizes[..., None, :] <= row) & (row < ends), (*batches, self.rows, self.experts))


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
  batches = tuple(pairing.batched), jnp.ndim(sizes) - 1
  grouping = Grouping(pairing.input_labels(x.ndim)[rows], int(experts), *batches, op.params["group_offset"])
  return (w.flipped() if flips else w), pairing, grouping


# ----------------------------------------------------------------------------------------------------------------------
# The thin products.


@dataclasses.dataclass(frozen=True)
class ThinProduct:
  """`x A^T` or `h B` with the factors of each row's expert, as a function of arrays.

  Attributes:
    grouping: which axes have groups.
    labels, factor: of the axes of the input and of the factor.
    summed: the labels that are summed.
    result: what the product is to be.
  """

  grouping: Grouping
  labels: tuple[Hashable, ...]
  factor: tuple[Hashable, ...]
  summed: tuple[Hashable, ...]
  result: Result

  def __call__(self, x: jax.Array, factor: jax.Array, sizes: jax.Array) -> Labelled:
    return self.grouping.product(
      Labelled(x, self.labels), Labelled(factor, self.factor), sizes, self.summed, self.result
    )

  def side_by_side(self, x: jax.Array, factor: jax.Array, sizes: jax.Array) -> Labelled:
    """The same as one plain product with the factors of all experts, of which each row has its own alone."""
    experts = self.grouping.experts
    u, w = Labelled(x, self.labels), Labelled(factor, self.factor)
    member = self.grouping.members(u, sizes)
    within = dataclasses.replace(member, array=member.array.any(-1), labels=member.labels[:-1])
    if RANK in self.summed:
      wide = Labelled(u.array[..., None], (*u.labels, experts))
      y = contract(_where(member, wide), w, [*self.summed, experts], self.result)
      y = _where(within, y)
    else:
      y = _where(member, contract(_where(within, u), w, self.summed, self.result))
      axis = y.labels.index(experts)
      y = Labelled(y.array.sum(axis), (*y.labels[:axis], *y.labels[axis + 1 :]))
    return y

  def gathered(self, x: jax.Array, factor: jax.Array, sizes: jax.Array) -> Labelled:
    """The same where experts may be split between devices: each device has the factors of all."""
    return self.side_by_side(x, whole(factor), sizes)

  def in_forms(self, policy: Policy, experts: int, rank: int) -> "ThinProduct | InForms":
    """The product in the forms that programs are given: side by side, but for some on TPUs.

    XLA multiplies all rows by every expert, each with a copy of the rows that is zero elsewhere: on CPUs and GPUs, and
    on TPUs in the derivative along the factors. Side by side there is one product, and no copy. A TPU's products of the
    forward pass are kernels that meet each row's expert alone; their `rank` terms fill 128 lanes, and nothing fuses
    with them: they are better for many terms.

    In programs of several devices, between which experts may be split, each device has the factors of all. Else a
    compiler would sum outputs over the devices once more, or gather rows as often as they are used.
    """
    grouping = self.grouping
    one_form = grouping.offset is not None or grouping.sizes_of > len(grouping.batched) or self.result.sharding
    if one_form or grouping.experts not in self.factor:
      return self
    each = Forms(flat=self.side_by_side, joined=self.side_by_side, split=self.gathered)
    forward = each if experts * rank <= WIDEST else each._replace(joined=self)
    return InForms(self, policy, forward, each)


def _where(mask: Labelled, x: Labelled) -> Labelled:
  """`x`, zero where the mask is false: whatever is in rows of no group, NaN or not, goes nowhere."""
  chosen = laid_along(mask.array[..., None], (*mask.labels, RANK), x.labels)
  return Labelled(jnp.where(chosen, x.array, jnp.zeros((), x.array.dtype)), x.labels)


# ----------------------------------------------------------------------------------------------------------------------
# The gain of a variant.


def gain_of_rows(
  w: Factored,
  grouping: Grouping,
  x: Labelled,
  sizes: jax.Array,
  summed: Sequence[Hashable],
  wanted: Sequence[Hashable],
  policy: Policy,
) -> jax.Array:
  """The gain that each row's expert has, beside an array with these labels.

  Where experts have gains of their own, it is a thin product with ones, exact in any precision.
  """
  gain = Labelled(w.gain, factor_axes(w.roles, w.gained))
  if set(gain.labels) - {RANK, grouping.experts} - set(wanted):
    raise Unfactorable("of the axes along which its variant scales the weight, the product sums over one")
  if grouping.experts not in gain.labels:
    return laid_along(gain.array, gain.labels, wanted)
  labels = (*(label for label in x.labels if label not in summed), RANK)
  kept = [n for n, label in zip(x.array.shape, x.labels, strict=True) if label not in summed]
  ones = Labelled(jnp.ones((*kept, 1), gain.array.dtype), labels)
  product = ThinProduct(grouping, labels, gain.labels, (RANK,), Result(gain.array.dtype, lax.Precision.HIGHEST))
  forms = product.in_forms(policy, w.shape[grouping.experts], 1)
  of_rows = shrink_by(forms, ones.array, gain.array, None, sizes)
  return laid_along(of_rows.array[..., None], (*of_rows.labels, RANK), wanted)


# ----------------------------------------------------------------------------------------------------------------------
# The rule.


@rule("ragged_dot_general")
def _ragged_dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  w, pairing, grouping = grouped(op, args)
  x, _, sizes = args
  recipe, labels = op.recipe(x), pairing.input_labels(x.ndim)
  wanted = [label for label in pairing.result_labels(x.ndim, len(w.roles)) if label != grouping.experts]
  gain_beside = lambda wanted: gain_of_rows(
    w, grouping, Labelled(x, labels), sizes, tuple(pairing.contracted), wanted, op.policy
  )
  if w.gain is not None and w.gained == "i":
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      raise Unfactorable("integers meet a weight along the axes that its variant scales")
    x, recipe = times(x, gain_beside(labels)), None
  x, *factors = with_prompt_gradients((x, w.a, w.b), op.policy)
  w = w.replace(a=factors[0], b=factors[1])
  base = op.bind(x, w.base, sizes)[0]
  u, recipe = dropped(x, w, op.use, recipe)
  sharded = explicitly_sharded(x) or explicitly_sharded(op.result)
  sharding = ShardingByLabel.of(op.result, wanted) if sharded else None
  inputs = tuple(d for d in pairing.contracted if w.roles[d] == "i")
  thin = Result(wider_dtype(u.dtype, base.dtype), pairing.precision, sharding, op.looping)
  sides = w.shape[grouping.experts], w.rank
  first = ThinProduct(grouping, labels, factor_axes(w.roles, "i"), inputs, thin)
  h = op.shrink(first.in_forms(op.policy, *sides), u, w.a, recipe, sizes)
  h = dataclasses.replace(h, array=kept_small(h.array))
  stack = tuple(d for d in pairing.contracted if w.roles[d] == "s")
  last = thin._replace(dtype=base.dtype)
  second = ThinProduct(grouping, h.labels, factor_axes(w.roles, "o"), (RANK, *stack), last)
  delta = shrink_by(second.in_forms(op.policy, *sides), h.array, w.b, None, sizes)
  result = op.policy.sum(base, delta.ordered(wanted), op.looping)
  if w.gain is not None and w.gained == "o":
    result = times(result, gain_beside(wanted))
  return [result]
