"""How the factor A starts. B always starts at zero, so that the adapted model is the base, bit for bit."""

from collections.abc import Callable, Sequence
import hashlib
import math

import jax
import jax.numpy as jnp

# (key, shape of A, dtype, fan_in, rank) -> A. `fan_in` is the product of the contracted axes alone, never the stack.
Initializer = Callable[[jax.Array, Sequence[int], jnp.dtype, int, int], jax.Array]


def leaf_key(key: jax.Array, path: str) -> jax.Array:
  """A key that depends on the leaf's path alone: other targets come and go without changing it."""
  digest = hashlib.sha256(path.encode()).digest()
  for k in range(0, 8, 4):
    key = jax.random.fold_in(key, int.from_bytes(digest[k : k + 4], "big"))
  return key


def kaiming(key, shape, dtype, fan_in, rank):
  """Uniform in ±1/sqrt(fan_in): `kaiming_uniform_(a=sqrt(5))`, the default of PEFT and of torch's linear layers."""
  del rank
  bound = 1 / math.sqrt(fan_in)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def he_uniform(key, shape, dtype, fan_in, rank):
  """Uniform in ±sqrt(6/fan_in), so that Var(A) = 2/fan_in (He et al., 2015, arXiv:1502.01852, eq. 10)."""
  del rank
  bound = math.sqrt(6 / fan_in)
  return jax.random.uniform(key, shape, dtype, -bound, bound)


def gaussian(key, shape, dtype, fan_in, rank):
  """Normal with standard deviation 1/rank: the original paper's Gaussian with PEFT's width."""
  del fan_in
  return jax.random.normal(key, shape, dtype) / jnp.asarray(rank, dtype)


INITIALIZERS: dict[str, Initializer] = {
  "kaiming": kaiming,
  "he_uniform": he_uniform,
  "gaussian": gaussian,
}
