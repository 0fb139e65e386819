"""The adapted product as XLA's TPU backend likes it: each way through the weight is one product.

    y = [x, h] [W; B],    dx = [dy, g] [W^T; A],    g = dy B^T

A sum of two products would be two passes over an array of the size of y. The matrix units add up along what is summed
at no cost, and a few more rows of it are a small part of the pass. Arrays keep their token axes apart: flattened, they
would be laid out anew. Where tokens are few (`Policy.few_tokens`), `[W; B]` itself would be laid out ahead of the
product, which costs more than a pass over the result: the two products stay apart.

Reading order: the matrices -> forward -> transpose.
"""

from collections.abc import Hashable, Sequence
import dataclasses
import functools
from typing import Any

from jax import lax
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._jax.sizes import elements
from jaxlora._platform.layouts import along_rows

Weight = tuple[Any, Any, Any]  # base, A, B

_UNIT = 128  # rows of a matrix unit


@dataclasses.dataclass(frozen=True)
class Matrices:
  """An adapted product, of which the weight and its factors are matrices.

  Attributes:
    labels: of the input: axes of its own, and `k`.
    w: the base, `(k, n)`.
    a, b: the factors, `(r, k)` and `(r, n)`.
    k, n, r: the labels of the summed axis, of the weight's free one, and of the rank.
  """

  labels: tuple[Hashable, ...]
  w: Labelled
  a: Labelled
  b: Labelled
  k: Hashable
  n: Hashable
  r: Hashable


def joined(first: Labelled, along: Hashable, others: Sequence[Labelled], at: Sequence[Hashable]) -> Labelled:
  """Arrays side by side along an axis, which has the label of the first one's; theirs may have labels of their own."""
  parts = [first.array]
  for other, label in zip(others, at, strict=True):
    parts.append(other.ordered([label if own == along else own for own in first.labels]))
  return Labelled(lax.concatenate(parts, first.labels.index(along)), first.labels)


def beside_norm(wider: Labelled, along: Hashable, h: Labelled, rank: Hashable) -> Labelled:
  """`[x, h]` of an `x` that is wider by the rank of `h` already (`widened.py`)."""
  axis = wider.labels.index(along)
  thin = h.ordered([rank if own == along else own for own in wider.labels])
  width = wider.array.shape[axis] - thin.shape[axis]
  placed = lax.pad(thin, jnp.zeros((), thin.dtype), [(width if k == axis else 0, 0, 0) for k in range(thin.ndim)])
  column = lax.broadcasted_iota(jnp.int32, placed.shape, axis)
  return Labelled(jnp.where(column < width, wider.array, placed), wider.labels)


def own_thin_and_second(m: Matrices, thin: Sequence[Labelled], place: int) -> tuple[Labelled, Labelled]:
  """`h` and B of one product of an input that has several."""
  return thin[place], m.b


def whole_thin_and_second(m: Matrices, thin: Sequence[Labelled], place: int) -> tuple[Labelled, Labelled]:
  """The same, both with the other products' ranks, where those are free.

  `[h_1, h_2, ..]` is made as one array, and where a backward pass reads that again, to part it here takes a pass more.
  The rows of B that meet the other products' parts are zeros, and cost nothing where all ranks together take no more of
  the matrix units' rows than one does.
  """
  ranks = [one.array.shape[one.labels.index(m.r)] for one in thin]
  inputs = m.w.array.shape[m.w.labels.index(m.k)]
  alike = len({one.labels for one in thin}) == 1 and len({one.array.dtype for one in thin}) == 1
  if not alike or -(-(inputs + sum(ranks)) // _UNIT) > -(-(inputs + ranks[place]) // _UNIT):
    return own_thin_and_second(m, thin, place)
  axis, before = m.b.labels.index(m.r), sum(ranks[:place])
  after = sum(ranks) - before - ranks[place]
  edges = [(before, after, 0) if k == axis else (0, 0, 0) for k in range(m.b.array.ndim)]
  padded = lax.pad(m.b.array, jnp.zeros((), m.b.array.dtype), edges)
  return joined(thin[0], m.r, thin[1:], [m.r] * len(thin[1:])), Labelled(padded, m.b.labels)


def forward(m: Matrices, u: Labelled, weight_first: bool, result: Result) -> Labelled:
  """`[x, h] [W; B]`, of the first."""
  v = joined(m.w, m.k, [m.b], [m.r])
  return contract(*((v, u) if weight_first else (u, v)), [m.k], result)


def as_large_as_result(x: Labelled, summed: Hashable) -> bool:
  """Whether a weight has as many elements as its product with `x`: no less are summed than `x` has rows.

  In a loop over stacked layers, what is joined to a weight costs a copy of that layer's slice; a product apart, a pass
  over the result.
  """
  return elements(x.array.shape) <= x.array.shape[x.labels.index(summed)] ** 2


def forward_apart(m: Matrices, x: Labelled, h: Labelled, weight_first: bool, result: Result) -> Labelled:
  """`x W + h B`, of the first."""
  in_order = lambda u, v: (v, u) if weight_first else (u, v)
  y = contract(*in_order(x, m.w), [m.k], result)
  return Labelled(y.array + contract(*in_order(h, m.b), [m.r], result).ordered(y.labels), y.labels)


def transpose_input(each: Sequence[Matrices], cotangents: Sequence[Labelled], thin: Sequence[Labelled]) -> Labelled:
  """`dx = sum_k dy_k W_k^T + g_k A_k`, where the last product takes all the thin ones along.

  Args:
    each: the products of one input.
    cotangents: `dy` of each, whose axis of the weight is `n`.
    thin: `g` of each.
  """
  *before, last = zip(each, cotangents, strict=True)
  terms = [contract(dy, m.w, [m.n], Result(dy.array.dtype)) for m, dy in before]
  m, dy = last
  ranks = [one.r for one in each]
  factors = [
    dataclasses.replace(one.a, labels=tuple(m.k if own == one.k else own for own in one.a.labels)) for one in each
  ]
  u, v = joined(dy, m.n, thin, ranks), joined(m.w, m.n, factors, ranks)
  v = dataclasses.replace(v, array=along_rows(v.array))
  terms.append(contract(u, v, [m.n], Result(dy.array.dtype)))
  laid_out = [term.ordered(one.labels) for one, term in zip(each, terms, strict=True)]
  return Labelled(functools.reduce(jnp.add, laid_out), m.labels)


def transpose_input_apart(
  each: Sequence[Matrices], cotangents: Sequence[Labelled], thin: Sequence[Labelled]
) -> Labelled:
  """The same, of which all thin products together are one, beside those of the weights."""
  first = each[0]
  terms = [contract(dy, m.w, [m.n], Result(dy.array.dtype)) for m, dy in zip(each, cotangents, strict=True)]
  h = joined(thin[0], first.r, thin[1:], [m.r for m in each[1:]])
  factors = [m.a.ordered([m.r, m.k]) for m in each]
  a = Labelled(lax.concatenate(factors, 0), (first.r, first.k))
  terms.append(contract(h, a, [first.r], Result(h.array.dtype)))
  laid_out = [term.ordered(m.labels) for m, term in zip([*each, first], terms, strict=True)]
  return Labelled(functools.reduce(jnp.add, laid_out), first.labels)


def transpose_second(m: Matrices, h: Labelled, cotangent: Labelled) -> Labelled:
  """`dB = h^T dy`."""
  tokens = [label for label in h.labels if label != m.r]
  return contract(h, cotangent, tokens, Result(m.b.array.dtype))
