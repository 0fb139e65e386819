"""`low_rank`: the best approximation of a matrix by one of lower rank."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import check_finite
from jaxlora._base.dtypes import wide
from jaxlora._base.keys import typed_key
from jaxlora._base.matrix import LowRank, randomised, svd
from jaxlora.svd._ranks import check_rank, rank_of_energy, rank_or_energy


def low_rank(
  x: Any,
  rank: int | None = None,
  *,
  energy: float | None = None,
  key: jax.Array | None = None,
  oversample: int = 10,
  iterations: int = 4,
) -> LowRank:
  """The best approximation of a matrix by one of lower rank, as factors, with its error.

      x ~ u diag(s) vt = sum_{k <= rank} s_k u_k v_k^T,    error = sqrt(sum_{k > rank} s_k^2) / ||x||_F

  No matrix of that rank is nearer in the Frobenius or the spectral norm (Eckart and Young, 1936). With a key it is
  the randomised algorithm: the range of x is found from `rank + oversample` random combinations of its columns,
  with `iterations` steps of subspace iteration, and x is decomposed inside that range. Its cost is that of a few
  products with thin matrices; its error is measured on x itself, and a little above the best one.

  Args:
    x: `(..., m, n)`, real; leading axes are a stack of matrices, each decomposed by itself.
    rank: number of terms, from 1 to min(m, n).
    energy: instead of a rank: the share of `||x||_F^2` to keep, in (0, 1]; the smallest rank that does, for every
      matrix of a stack. Needs values, so it cannot be used under `jit`, and the exact decomposition.
    key: a random key, for the randomised algorithm; `None` for the exact one.
    oversample: random combinations beyond `rank`; for the randomised algorithm.
    iterations: steps of subspace iteration; more where the singular values fall slowly.

  Returns:
    A `LowRank`: `u`, `s`, `vt` and `error`; `.array()` is the approximation.

  Raises:
    ValueError: if x is no matrix or not finite, or on a rank that x cannot have: no rank is changed silently.

  Example:
    >>> import jax.numpy as jnp, jaxlora
    >>> x = jnp.outer(jnp.arange(4.0), jnp.arange(3.0)) + 0.1 * jnp.eye(4, 3)
    >>> approximation = jaxlora.low_rank(x, 1)
    >>> approximation.array().shape, bool(approximation.error < 0.02)
    ((4, 3), True)

  Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv:0909.4061), algorithms 4.4 and 5.1.
  """
  x = jnp.asarray(x)
  if x.ndim < 2 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"low_rank: found shape {x.shape}, dtype {x.dtype}; expected a real floating matrix (..., m, n).")
  check_finite([("x", x)], "low_rank")
  x = x.astype(wide(x))
  if energy is not None and key is not None:
    raise ValueError(
      "low_rank: energy needs every singular value, which the randomised algorithm never has; pass a"
      " rank with the key, or energy alone."
    )
  rank = rank_or_energy(rank, energy, "low_rank")
  if rank is None:
    whole = svd(x)
    return whole.cut(rank_of_energy(whole.s, energy, max(x.shape[-2:])))
  check_rank(rank, x.shape[-2:], "low_rank")
  if key is None:
    return svd(x).cut(rank)
  return randomised(x, rank, typed_key(key, "low_rank: key"), oversample, iterations)
