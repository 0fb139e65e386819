"""The second thin product."""

from collections.abc import Hashable, Sequence
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._weight.roles import RANK

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
