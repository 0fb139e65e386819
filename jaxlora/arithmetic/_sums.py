"""Sums of updates: exact, by concatenating factors along the rank; or of formed updates, element by element."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._base.checks import is_known
from jaxlora._base.dtypes import wide, wider_dtype
from jaxlora._base.matrix import frobenius
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, parts, with_parts
from jaxlora.svd._update import check_linear, delta_svd


class Term(NamedTuple):
  """One term of the sum at a leaf: a tree's node there, and the weight of its update."""

  node: Any
  weight: Any


def is_nonzero(weight: Any) -> bool:
  """Whether a weight may be other than zero; a traced one may."""
  return not is_known(weight) or float(weight) != 0


def is_one(weight: Any) -> bool:
  return is_known(weight) and float(weight) == 1


def exact(path: str, terms: Sequence[Term]) -> Any:
  """`base + sum_t w_t delta_t`: factors concatenated along the rank, every scale and weight folded into B.

  sum_t w_t s_t A_t B_t = [A_1; A_2; ...]^T [w_1 s_1 B_1; w_2 s_2 B_2; ...]
  """
  adapted = [term for term in terms if is_adapted(term.node)]
  if not adapted:
    return terms[0].node
  moved = [term for term in adapted if is_nonzero(term.weight)] or [adapted[0]._replace(weight=0.0)]
  if len(moved) == 1 and is_one(moved[0].weight):
    return moved[0].node
  if any(isinstance(term.node, FullWeight) for term in moved):
    return whole_sum(moved, total)
  first = moved[0].node
  stack = first.roles.count("s")
  for term in moved:
    check_linear(path, term.node, "combine")
  factors = [term.node.factors() for term in moved]
  dtype = widest([factor for pair in factors for factor in pair])
  a = jnp.concatenate([a.astype(dtype) for a, _ in factors], axis=stack)
  b = jnp.concatenate(
    [b.astype(dtype) * jnp.asarray(t.weight, dtype) for (_, b), t in zip(factors, moved, strict=True)], axis=stack
  )
  return LoraWeight.from_factors(first.base, a, b, first.roles, dropout=common_dropout(moved), sure=first.sure)


def common_dropout(terms: Sequence[Term]) -> float:
  """The dropout that all terms have; none where they differ."""
  dropouts = {term.node.dropout for term in terms if isinstance(term.node, LoraWeight)}
  return dropouts.pop() if len(dropouts) == 1 else 0.0


def widest(arrays: Sequence[Any]) -> Any:
  dtype = arrays[0].dtype
  for array in arrays[1:]:
    dtype = wider_dtype(dtype, array.dtype)
  return dtype


def dense(node: Any) -> jax.Array:
  """The update as an array of the base's shape."""
  base = base_leaf(node)
  if not is_adapted(node):
    return jnp.zeros(base.shape, wide(base))
  if isinstance(node, FullWeight):
    dtype = wide(base, node.value)
    return node.value.astype(dtype) - base.astype(dtype)
  dtype = wide(*parts(node).values())
  node = with_parts(node, {name: x.astype(dtype) for name, x in parts(node).items()})
  return node.delta() if node.kind.linear else node.materialize() - node.base


def norm_of(node: Any) -> jax.Array:
  """The Frobenius norm of one node's update."""
  if isinstance(node, LoraWeight) and node.kind.linear:
    return frobenius(delta_svd(node).s.ravel())
  return frobenius(dense(node).ravel())


def base_leaf(node: Any) -> Any:
  """The base of an adapted node; a plain leaf is its own."""
  return node.base if is_adapted(node) else node


def whole_sum(terms: Sequence[Term], total: Callable[[list[jax.Array]], jax.Array]) -> FullWeight:
  """A leaf trained whole, with the sum of the updates: exact, as it needs no rank."""
  first = next(term.node for term in terms if isinstance(term.node, FullWeight))
  moved = total(weighted(terms))
  return FullWeight(first.base, (first.base.astype(moved.dtype) + moved).astype(first.value.dtype))


def weighted(terms: Sequence[Term]) -> list[jax.Array]:
  """The update of every term, formed and times its weight, in one dtype."""
  deltas = [dense(term.node) for term in terms]
  dtype = widest(deltas)
  return [x.astype(dtype) * jnp.asarray(term.weight, dtype) for x, term in zip(deltas, terms, strict=True)]


def total(deltas: Sequence[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, deltas)
