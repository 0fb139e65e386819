"""The second thin product, `h B`, at inference on XLA's CPU backend."""

from collections.abc import Hashable, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._jax.by_platform import Form, by_platform

# Up to this rank XLA's CPU backend does better with a sum of outer products: it computes that sum inside of what comes
# after, and writes no array of the output's size.
_SUMMED_RANK = 16


def expand(x: Labelled, y: Labelled, summed: Sequence[Hashable], result: Result) -> Labelled:
  """`h B`, whichever of the two is on the left; a sum of outer products where that is cheaper at inference."""
  two_matrices = x.array.ndim == y.array.ndim == 2 and len(summed) == 1 and len({*x.labels, *y.labels}) == 3
  if not two_matrices or result.sharding is not None or result.looping:
    return contract(x, y, summed, result)
  (over,) = summed
  if x.array.shape[x.labels.index(over)] > _SUMMED_RANK or not jnp.issubdtype(result.dtype, jnp.floating):
    return contract(x, y, summed, result)
  return _fused(x, y, over, result)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _fused(x: Labelled, y: Labelled, over: Hashable, result: Result) -> Labelled:
  """`sum_r x[:, r] y[r, :]` as one elementwise sum, which fuses; a dot where it is differentiated.

  d(x . y) = dx . y + x . dy
  """
  return by_platform(_Dot(over, result), {"cpu": Form(_Sum(over, result))}, x, y)


@_fused.defjvp
def _(over: Hashable, result: Result, primals: Any, tangents: Any) -> tuple[Labelled, Labelled]:
  return jax.jvp(_Dot(over, result), primals, tangents)


@dataclasses.dataclass(frozen=True)
class _Dot:
  """The product as a dot."""

  over: Hashable
  result: Result

  def __call__(self, x: Labelled, y: Labelled) -> Labelled:
    return contract(x, y, [self.over], self.result)


@dataclasses.dataclass(frozen=True)
class _Sum:
  """The product as a sum of outer products."""

  over: Hashable
  result: Result

  def __call__(self, x: Labelled, y: Labelled) -> Labelled:
    over, result = self.over, self.result
    (row,) = (label for label in x.labels if label != over)
    (column,) = (label for label in y.labels if label != over)
    dtype = wider_dtype(result.dtype, jnp.float32)
    total = _outer_sum(x.ordered((row, over)).astype(dtype), y.ordered((over, column)).astype(dtype))
    return Labelled(total.astype(result.dtype), (row, column))


@functools.partial(jax.jit, inline=True)  # one trace for all products of a shape
def _outer_sum(rows: jax.Array, columns: jax.Array) -> jax.Array:
  terms = (
    lax.slice_in_dim(rows, r, r + 1, axis=1) * lax.slice_in_dim(columns, r, r + 1, axis=0) for r in range(rows.shape[1])
  )
  return functools.reduce(jnp.add, terms)
