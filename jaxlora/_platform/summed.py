"""The adapted product in a loop over stacked layers, as XLA's TPU backend likes it there.

    y = x W + sum_r h[:, r] B[r, :],    dx = dy W^T + sum_r g[:, r] A[r, :]

What is joined to a weight (`joint.py`) is an array, and so a copy of that layer's slice of the stack. A product by
itself reads the slice where it lies, and what is added to its result elementwise is part of its one pass. So is a short
sum of outer products, which the vector units make while the matrix units work. A longer one would hold them up.
"""

from collections.abc import Hashable, Sequence
import functools

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._platform.joint import Matrices

MOST_TERMS = 8


def is_short(h: Labelled, rank: Hashable) -> bool:
  """Whether so few outer products are summed that they hide behind the product of the weight."""
  return h.array.shape[h.labels.index(rank)] <= MOST_TERMS


def forward(m: Matrices, x: Labelled, h: Labelled, weight_first: bool, result: Result) -> Labelled:
  """`x W + h B`, of the first."""
  y = contract(*((m.w, x) if weight_first else (x, m.w)), [m.k], result._replace(dtype=_sums_in(result)))
  return _with(y, h, m.b, m.r, result)


def transpose_input(each: Sequence[Matrices], cotangents: Sequence[Labelled], thin: Sequence[Labelled]) -> Labelled:
  """`dx = sum_k dy_k W_k^T + g_k A_k`, each term rounded once."""
  terms = []
  for m, dy, g in zip(each, cotangents, thin, strict=True):
    result = Result(dy.array.dtype)
    along = contract(dy, m.w, [m.n], result._replace(dtype=_sums_in(result)))
    terms.append(_with(along, g, m.a, m.r, result))
  labels = each[0].labels
  laid_out = [term.ordered(m.labels) for m, term in zip(each, terms, strict=True)]
  return Labelled(functools.reduce(jnp.add, laid_out), labels)


def _sums_in(result: Result) -> jnp.dtype:
  return wider_dtype(result.dtype, jnp.float32)


def _with(y: Labelled, h: Labelled, factor: Labelled, rank: Hashable, result: Result) -> Labelled:
  """`y + sum_r h[r] factor[r]`, rounded to the result's dtype."""
  terms = [_spread(y, h, rank, r) * _spread(y, factor, rank, r) for r in range(h.array.shape[h.labels.index(rank)])]
  return Labelled(functools.reduce(jnp.add, terms, y.array).astype(result.dtype), y.labels)


def _spread(y: Labelled, thin: Labelled, rank: Hashable, r: int) -> jax.Array:
  """One of a thin array's parts along the rank, as an array of the shape and dtype of `y`."""
  own = [label for label in y.labels if label in thin.labels]
  part = lax.index_in_dim(thin.ordered([rank, *own]), r, 0, keepdims=False)
  return lax.broadcast_in_dim(part, y.array.shape, [y.labels.index(label) for label in own]).astype(y.array.dtype)
