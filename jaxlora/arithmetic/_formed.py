"""Sums that act on elements (magnitude, TIES, DARE), and sums at a rank with what that loses."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._base.explicit import placed_by_compiler
from jaxlora._base.keys import leaf_key
from jaxlora._base.matrix import frobenius
from jaxlora._base.programs import one_program
from jaxlora._weight.matrices import matrices
from jaxlora._weight.roles import axes_of
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted
from jaxlora.arithmetic._sums import (
  Term,
  common_dropout,
  dense,
  exact,
  is_nonzero,
  is_one,
  norm_of,
  total,
  weighted,
  widest,
)
from jaxlora.svd._low_rank import low_rank
from jaxlora.svd._truncation import Row
from jaxlora.svd._update import delta_svd, weight_of_svd


@functools.partial(one_program, static_argnums=1)
def _trimmed(x: jax.Array, density: float) -> jax.Array:
  """The elements of each row that are largest in magnitude; zeros elsewhere."""
  size = x.shape[1]
  count = max(1, round(density * size))
  least = jnp.sort(jnp.abs(x), axis=1)[:, size - count :][:, :1]
  return jnp.where(jnp.abs(x) >= least, x, 0)


@functools.partial(one_program, static_argnums=1)
def _dropped(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
  """Each element kept with probability `density` and divided by it, zero otherwise: the mean is `x`."""
  return jnp.where(jax.random.bernoulli(key, density, x.shape), x / jnp.asarray(density, x.dtype), 0)


@one_program
def _elected(deltas: Sequence[jax.Array]) -> jax.Array:
  """For each element the mean of those updates that have the sign of their sum there, and are not zero."""
  each = jnp.stack(list(deltas))
  agrees = (jnp.sign(each) == jnp.sign(each.sum(0))[None]) & (each != 0)
  return jnp.where(agrees, each, 0).sum(0) / jnp.maximum(agrees.sum(0), 1).astype(each.dtype)


class Merging(NamedTuple):
  """How updates are merged element by element.

  Attributes:
    sparse: from an update, (stack, elements), the density and a key to what of it takes part.
    total: from the weighted updates to one.
    random: whether `sparse` uses the key.
  """

  sparse: Callable[[jax.Array, float, Any], jax.Array]
  total: Callable[[Sequence[jax.Array]], jax.Array]
  random: bool = False


# Sums of updates that are formed element by element.
FORMED: dict[str, Merging] = {
  "ties": Merging(lambda x, density, key: _trimmed(x, density), _elected),
  "dare": Merging(_dropped, total, random=True),
  "magnitude": Merging(lambda x, density, key: _trimmed(x, density), total),
}


_PLAIN_SUM = Merging(lambda x, density, key: x, total)  # "svd", where an update is no product of factors

METHODS = ("exact", "svd", *FORMED)


class Plan(NamedTuple):
  """The checked arguments of `combine`."""

  method: str
  rank: int | None
  density: float
  key: jax.Array | None


def to_rank(path: str, terms: Sequence[Term], plan: Plan) -> tuple[Any, Row | None]:
  """The sum of the updates of one leaf at its rank, and its row of the report; `None` for a leaf without an update."""
  adapted = [term for term in terms if is_adapted(term.node)]
  if not adapted:
    return terms[0].node, None
  moved = [term for term in adapted if is_nonzero(term.weight)]
  if plan.method == "svd" and plan.rank is None and len(moved) == 1 and is_one(moved[0].weight):
    return moved[0].node, Row(path, getattr(moved[0].node, "rank", None), norm_of(moved[0].node), 0)
  nonlinear = any(isinstance(term.node, LoraWeight) and not term.node.kind.linear for term in moved)
  if plan.method in FORMED or (plan.method == "svd" and nonlinear):
    total, first = _formed(path, adapted, plan), adapted[0].node
    if any(isinstance(term.node, FullWeight) for term in adapted):
      value = (first.base.astype(total.dtype) + total).astype(first.base.dtype)
      return FullWeight(first.base, value), Row(path, None, jnp.linalg.norm(total.ravel()), 0)
    return _low_rank_sum(path, total, adapted, plan)
  node = exact(path, terms)
  if isinstance(node, FullWeight):
    return node, Row(path, None, jnp.linalg.norm(dense(node).ravel()), 0)
  found = delta_svd(node)
  rank, norm = _target(adapted, plan, found.rank), frobenius(found.s)
  if plan.method == "exact" or node.rank <= rank:
    return node, Row(path, node.rank, norm, 0)
  cut = found.cut(rank)
  return weight_of_svd(node, cut), Row(path, cut.rank, norm, cut.error)


def _target(terms: Sequence[Term], plan: Plan, most: int) -> int:
  """The rank of a leaf's sum: `plan.rank`, or the largest among the adapters."""
  ranks = [
    term.node.factors()[0].shape[term.node.roles.count("s")] for term in terms if isinstance(term.node, LoraWeight)
  ]
  return min(most, plan.rank or max(ranks))


def _formed(path: str, terms: Sequence[Term], plan: Plan) -> jax.Array:
  """The merged update, an array of the base's shape. A stacked leaf is thinned out slice by slice."""
  merging = FORMED.get(plan.method, _PLAIN_SUM)
  key = None if plan.key is None else leaf_key(plan.key, path)
  stack = next((axes_of(term.node.roles, "s") for term in terms if isinstance(term.node, LoraWeight)), [])

  def sparse(x: jax.Array, key: Any) -> jax.Array:
    slices = jnp.moveaxis(x, stack, range(len(stack)))
    flat = slices.reshape(math.prod(slices.shape[: len(stack)]), -1)
    kept = merging.sparse(flat, plan.density, key)
    return jnp.moveaxis(kept.reshape(slices.shape), range(len(stack)), stack)

  keys = (None if key is None else jax.random.fold_in(key, k) for k in range(len(terms)))
  placed = placed_by_compiler(sparse, like=lambda x, key: x)
  return merging.total([placed(*pair) for pair in zip(weighted(terms), keys, strict=True)])


def _low_rank_sum(path: str, total: jax.Array, terms: Sequence[Term], plan: Plan) -> tuple[LoraWeight, Row]:
  node = terms[0].node
  x = matrices(total, node.roles)
  found = low_rank(
    x, _target(terms, plan, min(x.shape[1:])), key=None if plan.key is None else leaf_key(plan.key, path)
  )
  merged = weight_of_svd(node, found, widest([factor for term in terms for factor in (term.node.a, term.node.b)]))
  merged = dataclasses.replace(merged, dropout=common_dropout(terms))
  return merged, Row(path, found.rank, frobenius(x, 2), found.error)
