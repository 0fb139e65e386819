"""Decompositions of matrices: pure functions at full precision, in no less than 32 bits, without checks."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._base.dtypes import wide
from jaxlora._base.explicit import einsum, explicit_mesh, placed_by_compiler
from jaxlora._base.programs import one_program


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """The product at full precision: accelerators would round its operands."""
  if explicit_mesh(x, y) is None:
    return jnp.matmul(x, y, precision="highest")
  stack = list(range(x.ndim - 2))
  m, k, n = range(x.ndim - 2, x.ndim + 1)
  return einsum(x, [*stack, m, k], y, [*stack, k, n], [*stack, m, n])


class LowRank(NamedTuple):
  """A truncated singular value decomposition, `x ~ u diag(s) vt`; what `low_rank` returns.

  Attributes:
    u: `(..., m, rank)`, orthonormal columns.
    s: `(..., rank)`, the singular values, falling.
    vt: `(..., rank, n)`, orthonormal rows.
    error: `(...)`, the Frobenius norm of what is left out over that of `x`; 0 for `x = 0`.
  """

  u: jax.Array
  s: jax.Array
  vt: jax.Array
  error: jax.Array

  @property
  def rank(self) -> int:
    return self.s.shape[-1]

  def array(self) -> jax.Array:
    """The approximation as one array of the shape of `x`."""
    return matmul(self.u * self.s[..., None, :], self.vt)

  def factors(self) -> tuple[jax.Array, jax.Array]:
    """`(a, b)` with the rank leading, `x ~ a^T b`, the singular values shared evenly between them."""
    return _shared_evenly(self)

  def cut(self, rank: int) -> "LowRank":
    """The first `rank` terms; the error is that of the terms left out here, without any earlier one."""
    return _cut(self, rank)


@one_program
def _shared_evenly(found: LowRank) -> tuple[jax.Array, jax.Array]:
  root = jnp.sqrt(found.s)[..., :, None]
  return root * found.u.mT, root * found.vt


@functools.partial(one_program, static_argnums=1)
def _cut(found: LowRank, rank: int) -> LowRank:
  gone, every = frobenius(found.s[..., rank:]), frobenius(found.s)
  return LowRank(found.u[..., :rank], found.s[..., :rank], found.vt[..., :rank, :], ratio(gone, every))


@placed_by_compiler
@one_program
def svd(x: jax.Array) -> LowRank:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return LowRank(u, s, vt, jnp.zeros(s.shape[:-1], s.dtype))


@placed_by_compiler
@functools.partial(one_program, static_argnums=(1, 3, 4))
def randomised(x: jax.Array, rank: int, key: jax.Array, oversample: int, iterations: int) -> LowRank:
  count = min(rank + oversample, *x.shape[-2:])
  q = orthonormal(matmul(x, jax.random.normal(key, (*x.shape[:-2], x.shape[-1], count), x.dtype)))
  for _ in range(iterations):
    q = orthonormal(matmul(x, orthonormal(matmul(x.mT, q))))
  inside = svd(matmul(q.mT, x)).cut(rank)
  found = inside._replace(u=matmul(q, inside.u))
  return found._replace(error=ratio(frobenius(x - found.array(), 2), frobenius(x, 2)))


def orthonormal(columns: jax.Array) -> jax.Array:
  """Orthonormal columns that span those given."""
  return jnp.linalg.qr(columns)[0]


@functools.partial(one_program, static_argnums=1)
def frobenius(x: jax.Array, axes: int = 1) -> jax.Array:
  """The norm over the last axes."""
  return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(-axes, 0))))


def ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


@placed_by_compiler
@one_program
def product_svd(a: jax.Array, b: jax.Array) -> LowRank:
  """The decomposition of `a^T b`, (stack, in, out), for thin `a` (stack, rank, in) and `b` (stack, rank, out).

      a^T = Qa Ra,  b^T = Qb Rb,  Ra Rb^T = U S V^T   =>   a^T b = (Qa U) S (Qb V)^T

  Nothing larger than a factor is formed.
  """
  dtype = wide(a, b)
  (qa, ra), (qb, rb) = (jnp.linalg.qr(factor.astype(dtype).mT) for factor in (a, b))
  core = svd(matmul(ra, rb.mT))
  return core._replace(u=matmul(qa, core.u), vt=matmul(core.vt, qb.mT))
