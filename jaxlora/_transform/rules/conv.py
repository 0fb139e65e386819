"""Convolutions: A is a kernel of `rank` output features, and B acts on that axis alone."""

from collections.abc import Sequence
from typing import Any

from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._platform.policy import Policy
from jaxlora._transform.factored import TracedWeight, Unfactorable, dropped
from jaxlora._transform.pairing import matched_roles
from jaxlora._transform.rule import Op, rule
from jaxlora._transform.rules.dot import gained_after
from jaxlora._weight.roles import RANK


@rule("conv_general_dilated")
def _conv(op: Op, args: Sequence[Any]) -> list[Any]:
  """A convolution: A is a kernel of `rank` output features, and B acts on that axis alone.

  Where the kernel is used backwards (its `o` axis is contracted, as in the gradient of a convolution), B acts first and
  A is a kernel of `rank` input features. With feature groups every group has its own output features but shares A: the
  A kernel is laid out once per group.
  """
  x, w = args
  if not isinstance(w, TracedWeight) or isinstance(x, TracedWeight):
    raise Unfactorable("a convolution that has an adapted weight as its input")
  if op.params["batch_group_count"] != 1:
    raise Unfactorable("a convolution with batch groups")
  numbers, groups = op.params["dimension_numbers"], op.params["feature_group_count"]
  out_axis, in_axis, *spatial = numbers.rhs_spec
  if any(w.roles[d] == "o" for d in spatial if w.shape[d] != 1):
    w = w.flipped()
  backwards = w.roles[in_axis] == "o" and w.shape[in_axis] != 1 and w.roles[out_axis] != "o"
  thin = in_axis if backwards else out_axis  # the axis that B holds
  others = [d for d in range(len(w.roles)) if d != thin]
  w = w.with_roles(matched_roles(w.shape, w.roles, [((thin,), "o"), (others, "i")]))
  if w.roles != "".join("o" if d == thin else "i" for d in range(len(w.roles))) or (backwards and groups > 1):
    raise Unfactorable(f"a convolution with {groups} feature groups and a kernel of roles {w.roles!r}")
  if w.gain is not None and (w.gained == "i" or backwards):
    raise Unfactorable("a convolution that contracts the axes along which its variant scales the weight")
  base = op.bind(x, w.base)[0]
  u, recipe = dropped(x, w, op.use, op.recipe(x))
  thin_result = Result(base.dtype, op.params["precision"], looping=op.looping)

  def convolve(u, a):
    kernel = jnp.moveaxis(a, 0, thin)
    dtype = wider_dtype(u.dtype, base.dtype)
    return lax.conv_general_dilated(
      u.astype(dtype),
      (jnp.concatenate([kernel] * groups, axis=thin) if groups > 1 else kernel).astype(dtype),
      window_strides=op.params["window_strides"],
      padding=op.params["padding"],
      lhs_dilation=op.params["lhs_dilation"],
      rhs_dilation=op.params["rhs_dilation"],
      dimension_numbers=numbers,
      feature_group_count=groups,
      precision=op.params["precision"],
    )

  if backwards:
    u = _along_features(u, Labelled(w.b, (RANK, "in")), numbers.lhs_spec[1], thin_result)
    return [op.policy.sum(base, convolve(u, w.a), op.looping)]
  h = op.shrink(convolve, u, w.a, recipe)
  feature = numbers.out_spec[1]
  if groups > 1:
    delta = _per_group(h, w.b, feature, groups, thin_result)
  else:
    delta = _rank_to_features(h, w.b, feature, thin_result, op.policy)
  result = op.policy.sum(base, delta, op.looping)
  if w.gain is None:
    return [result]
  before, after = _around(result, feature)
  return [gained_after(result, w, [*before, thin, *after])]


def _around(array: Any, feature: int) -> tuple[list[Any], list[Any]]:
  """Labels for the axes before and after the feature axis."""
  labels: list[Any] = [("x", k) for k in range(array.ndim)]
  return labels[:feature], labels[feature + 1 :]


def _along_features(x: Any, matrix: Labelled, feature: int, result: Result) -> Any:
  """`x M^T` along one axis of `x`."""
  before, after = _around(x, feature)
  out, summed = matrix.labels
  return contract(Labelled(x, (*before, summed, *after)), matrix, [summed], result).ordered([*before, out, *after])


def _rank_to_features(h: Any, b: Any, feature: int, result: Result, policy: Policy) -> Any:
  """`h B` along one axis of `h`, all other axes flattened to one where they are adjacent."""
  before, after = _around(h, feature)
  flat = Labelled(h, (*before, RANK, *after)).flattened(before).flattened(after)
  out = policy.expand(flat, Labelled(b, (RANK, "out")), [RANK], result)
  return out.expanded().ordered([*before, "out", *after])


def _per_group(h: Any, b: Any, feature: int, groups: int, result: Result) -> Any:
  """`h B` along the feature axis, each group of `h` with its own slice of B's columns."""
  before, after = _around(h, feature)
  rank = b.shape[0]
  spread = h.reshape(*h.shape[:feature], groups, rank, *h.shape[feature + 1 :])
  columns = Labelled(b.reshape(rank, groups, -1), (RANK, "group", "out"))
  out = contract(Labelled(spread, (*before, "group", RANK, *after)), columns, [RANK], result)
  laid_out = out.ordered([*before, "group", "out", *after])
  return laid_out.reshape(*h.shape[:feature], b.shape[1], *h.shape[feature + 1 :])
