"""Arrays of random numbers."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed: int, shape: tuple[int, ...], dtype: Any, width: float = 1.0) -> np.ndarray:
  """Made by numpy: nothing to compile."""
  return (np.random.default_rng(seed).standard_normal(shape) * width).astype(dtype)


def array(seed: int, shape: tuple[int, ...], dtype: Any) -> jax.Array:
  return jnp.asarray(normal(seed, shape, dtype))
