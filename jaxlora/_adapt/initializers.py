"""Initialisers: those that draw A, and those that make both factors of the weight."""

from collections.abc import Callable
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._base.explicit import placed_by_compiler
from jaxlora._base.matrix import matmul, orthonormal, randomised, svd
from jaxlora._base.programs import one_program
from jaxlora._weight.start import Initializer


def kaiming(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int, rank: int) -> jax.Array:
  """Draws A uniformly in ±1/sqrt(fan_in): `kaiming_uniform_(a=sqrt(5))`, the default of PEFT and of torch's layers.

  Args:
    key: a random key.
    shape: of A, `(*stack, rank, *in)`.
    dtype: of A.
    fan_in: the product of the contracted axes, without the stack.
    rank: number of terms; not used.

  Returns:
    A.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> kaiming(jax.random.key(0), (2, 16), jnp.float32, fan_in=16, rank=2).shape
    (2, 16)

  Source: He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852, with the negative slope sqrt(5).
  """
  del rank
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def he_uniform(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int, rank: int) -> jax.Array:
  """Draws A uniformly in ±sqrt(6/fan_in), so that Var(A) = 2/fan_in.

  Args:
    key: a random key.
    shape: of A, `(*stack, rank, *in)`.
    dtype: of A.
    fan_in: the product of the contracted axes, without the stack.
    rank: number of terms; not used.

  Returns:
    A.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> he_uniform(jax.random.key(0), (2, 16), jnp.float32, fan_in=16, rank=2).shape
    (2, 16)

  Source: He et al., "Delving Deep into Rectifiers", 2015, arXiv:1502.01852, eq. 10.
  """
  del rank
  bound = math.sqrt(6 / fan_in)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key: jax.Array, shape: tuple[int, ...], dtype: Any, fan_in: int, rank: int) -> jax.Array:
  """Draws A from a normal distribution of standard deviation 1/rank: LoRA's Gaussian with PEFT's width.

  Args:
    key: a random key.
    shape: of A, `(*stack, rank, *in)`.
    dtype: of A.
    fan_in: the product of the contracted axes, without the stack.
    rank: number of terms.

  Returns:
    A.

  Example:
    >>> import jax, jax.numpy as jnp
    >>> gaussian(jax.random.key(0), (2, 16), jnp.float32, fan_in=16, rank=2).shape
    (2, 16)

  Source: Hu et al., "LoRA", 2021, arXiv:2106.09685, section 4.1.
  """
  del fan_in
  return jax.random.normal(key, shape, dtype) / jnp.asarray(rank, dtype)


INITIALIZERS: dict[str, Initializer] = {
  "kaiming": kaiming,
  "he_uniform": he_uniform,
  "gaussian": gaussian,
}


class FromWeight(NamedTuple):
  """An initialiser of both factors.

  Attributes:
    make: `(key, w, rank, scale) -> (a, b)` for a stack of matrices w, (stack, in, out): a (stack, rank, in) and
      b (stack, rank, out), without the scale.
    cancels: whether `a^T b` is zero but for rounding, so that nothing has to be subtracted.
  """

  make: Callable[[jax.Array, jax.Array, int, float], tuple[jax.Array, jax.Array]]
  cancels: bool = False


@placed_by_compiler
@functools.partial(one_program, static_argnums=2)
def orthogonal(key, w, rank, scale):
  """Factors in orthogonal halves of the space of the rank: both are random, their product is zero.

      Q orthogonal, (rank, rank);    A = Q_odd^T G / 10,  B = Q_even^T H / 10,  G and H standard normal, rank / 2 rows

  The rows of Q are orthogonal, so that A^T B = G^T Q_odd Q_even^T H / 100 = 0. As in PEFT, after datta0, "Rethinking
  LoRA initialisation" (2024); the rank must be even.
  """
  del scale
  stack, fan_in, fan_out = w.shape
  keys = jax.random.split(key, 3)
  q = orthonormal(jax.random.normal(keys[0], (stack, rank, rank), w.dtype))
  first, second = (
    jax.random.normal(k, (stack, rank // 2, size), w.dtype) / 10
    for k, size in zip(keys[1:], (fan_in, fan_out), strict=True)
  )
  return matmul(q[:, 0::2].mT, first), matmul(q[:, 1::2].mT, second)


@placed_by_compiler
@functools.partial(jax.jit, static_argnums=2, static_argnames="iterations")
def pissa(key, w, rank, scale, iterations=None):
  """The principal part of the weight: A = sqrt(S / scale) U^T, B = sqrt(S / scale) V^T for W = U S V^T cut at the rank.

  Meng, Wang and Zhang, "PiSSA" (arXiv:2404.02948), eq. 2 and 3. With `iterations` the decomposition is randomised
  (their section 4), which is what large weights want.
  """
  found = svd(w).cut(rank) if iterations is None else randomised(w, rank, key, rank, iterations)
  a, b = found.factors()
  root = jnp.sqrt(jnp.asarray(scale, w.dtype))
  return a / root, b / root


@placed_by_compiler
@functools.partial(jax.jit, static_argnums=2)
def olora(key, w, rank, scale):
  """The first columns of Q and rows of R for W^T = Q R: B = Q[:, :rank]^T, orthonormal, and A = R[:rank].

  Büyükakyüz, "OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models" (arXiv:2406.01775), algorithm 1. The
  weight is taken as (out, in), as there.
  """
  del key, scale
  q, r = jnp.linalg.qr(w.mT)
  return r[:, :rank], q[:, :, :rank].mT


FROM_WEIGHT = {
  "orthogonal": FromWeight(orthogonal, cancels=True),
  "pissa": FromWeight(pissa),
  "olora": FromWeight(olora),
}


_PISSA_FAST = re.compile(r"pissa_niter_(\d+)")
_LOFTQ = re.compile(r"loftq_niter_([1-9]\d*)")
_LOFTQ_STEPS = 5  # as the paper's experiments have it

INITS = (
  *(*INITIALIZERS, *FROM_WEIGHT, "residual", "loftq"),
  *("pissa_niter_[number of iterations]", "loftq_niter_[number of iterations]"),
)


def from_weight(name: Any) -> FromWeight | None:
  """The initialiser of both factors of that name; `None` for those that draw A alone, as a user's function does."""
  if not isinstance(name, str):
    return None
  if fast := _PISSA_FAST.fullmatch(name):
    return FromWeight(functools.partial(pissa, iterations=int(fast[1])))
  return FROM_WEIGHT.get(name)


def steps_of(name: Any) -> int | None:
  """How often an init writes the codes of its base again that starts from what they lost; `None` for any other init."""
  if not isinstance(name, str):
    return None
  if loftq := _LOFTQ.fullmatch(name):
    return int(loftq[1])
  return {"residual": 0, "loftq": _LOFTQ_STEPS}.get(name)


def gives_both(name: Any) -> bool:
  """Whether an init makes both factors."""
  return from_weight(name) is not None or steps_of(name) is not None
