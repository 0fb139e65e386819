"""Uses: each ends a program with what is made of the weight and data."""

import itertools

from hypothesis import strategies as st
from jax import lax
import jax.numpy as jnp

from tests._transform.fuzz.layouts import batched, draw_take, loose, take
from tests._transform.fuzz.programs import run, step


def draw_dot(d):
  """Every axis is contracted, batched or free; mostly those of one role are contracted, perhaps stacks besides."""
  sides = [role for role in "io" if d.of_role(role)] or ["1"] * (1 in d.shape)
  if d.strict or (sides and d.one_of(True, True, False)):
    side = d.one_of(*sides)
    first = d.axis(d.of_role(side) if side != "1" else [k for k in d.axes if d.shape[k] == 1])
    allowed = side + ("1" if side == "1" else "1s")
    part = {k: d.one_of(*("cbf" if d.kind(k) in allowed else "bf")) for k in d.axes} | {first: "c"}
  else:
    part = {k: d.one_of(*"cfb") for k in d.axes}
  contracted, batch = (d.order([k for k in d.axes if part[k] == which]) for which in "cb")
  sizes = [d.shape[k] for k in (*contracted, *batch)] + list(d.sizes(1, 3))
  order = d.order(range(len(sizes)))
  d.inputs.append(tuple(sizes[k] for k in order))
  places = [order.index(k) for k in range(len(contracted) + len(batch))]
  pairs = (contracted, tuple(places[: len(contracted)])), (batch, tuple(places[len(contracted) :]))
  return len(d.inputs) - 1, *pairs, d.one_of("right", "left"), d.one_of(None, "highest")


@step("use", draw=draw_dot, weight=4)
def dot(w, data, number, contract, batch, side, precision):
  x = data["inputs"][number].astype(w.dtype)
  if side == "left":
    return lax.dot_general(w, x, (contract, batch), precision=precision)
  return lax.dot_general(x, w, (contract[::-1], batch[::-1]), precision=precision)


def factors_of_conv(d, out, in_):
  """Whether a kernel stays factored without groups, and with them: one factor has one feature axis and nothing else."""
  kinds = {k: d.kind(k) for k in d.axes if d.kind(k) != "1"}
  split_at = lambda k: (
    k in kinds
    and {kinds[k], *(kinds[j] for j in kinds if j != k)} == {"i", "o"}
    and (kinds[k] not in [kinds[j] for j in kinds if j != k])
  )
  with_groups = split_at(out) and (kinds[out] == "o" or any(k not in (out, in_) for k in kinds))
  return split_at(out) or (split_at(in_) and out in kinds), with_groups


def kernels(d):
  """Axis orders in which the weight can be a kernel."""
  if not 2 <= len(d.shape) <= 4 or batched(d):
    return []
  orders = itertools.permutations(d.axes)
  return [order for order in orders if not d.strict or factors_of_conv(d, order[0], order[1])[0]]


def draw_conv(d):
  out, in_, *spatial = spec = d.one_of(*kernels(d))
  divisors = [n for n in (1, 2, 3) if d.shape[out] % n == 0]
  groups = d.draw(st.sampled_from(divisors)) if not d.strict or factors_of_conv(d, out, in_)[1] else 1
  batch_groups = d.draw(st.sampled_from(divisors)) if groups == 1 and not d.strict else 1
  sizes, padding, strides, lhs_dilation, rhs_dilation = [], [], [], [], []
  for k in spatial:
    size, strides_, left, right = (d.draw(st.integers(1, most)) for most in (4, 2, 2, 2))
    low, high = d.draw(st.integers(0, 2)), d.draw(st.integers(0, 2))
    missing = (d.shape[k] - 1) * right + 1 - ((size - 1) * left + 1 + low + high)
    sizes.append(size)
    padding.append((low, high + max(0, missing)))
    strides.append(strides_)
    lhs_dilation.append(left)
    rhs_dilation.append(right)
  batch = d.draw(st.integers(1, 2)) * batch_groups
  lhs_spec, out_spec = d.order(d.axes), d.order(d.axes)
  by_meaning = (batch, d.shape[in_] * groups, *sizes)
  d.inputs.append(tuple(by_meaning[lhs_spec.index(k)] for k in d.axes))
  options = {
    "window_strides": tuple(strides),
    "padding": tuple(padding),
    "lhs_dilation": tuple(lhs_dilation),
    "rhs_dilation": tuple(rhs_dilation),
    "feature_group_count": groups,
    "batch_group_count": batch_groups,
  }
  return len(d.inputs) - 1, (lhs_spec, spec, out_spec), options


@step("use", kernels, draw_conv, weight=3)
def conv(w, data, number, specs, options):
  x = data["inputs"][number].astype(w.dtype)
  return lax.conv_general_dilated(x, w, dimension_numbers=lax.ConvDimensionNumbers(*specs), **options)


@step(
  "use", lambda d: d.of_role("i") + d.of_role("o"), lambda d: draw_take(d, lambda d: d.of_role("i") + d.of_role("o"))
)
def lookup(w, data, number, axis, mode, hidden):
  return take(w, data, number, axis, mode, hidden)


@step("use", lambda d: not d.strict and not d.in_both)
def whole(w, data):
  return w


ELEMENTWISE = {
  "sin": lambda w, scale: jnp.sin(w),
  "add": lambda w, scale: w + scale,
  "square": lambda w, scale: w * w,
  "under": lambda w, scale: scale / w,
  "sum": lambda w, scale: jnp.sum(w),
  "gram": lambda w, scale: jnp.vdot(w, w),
  "twice": lambda w, scale: jnp.stack([w, w]),
  "where": lambda w, scale: jnp.where(w > scale, w, -w),
}


@step("use", loose, lambda d: (d.one_of(*ELEMENTWISE),))
def elementwise(w, data, name):
  return ELEMENTWISE[name](w, jnp.asarray(data["scale"], w.dtype))


def draw_both(d):
  before = d.shape, d.roles, set(d.seen), d.batched_weight
  d.in_both = True
  first = d.steps(2, 1)
  d.shape, d.roles, d.seen, d.batched_weight = before
  return first, d.steps(2, 1)


@step("use", lambda d: not d.in_both, draw_both)
def both(w, data, first, second):
  """The weight is used twice."""
  return run(first, w, data), run(second, w, data)
