"""Arrays of random numbers."""

from typing import Any

import jax
import numpy as np


def normal(seed: int, shape: tuple[int, ...], dtype: Any, width: float = 1.0) -> np.ndarray:
  """Made by numpy: nothing to compile."""
  return (np.random.default_rng(seed).standard_normal(shape) * width).astype(dtype)


def array(seed: int, shape: tuple[int, ...], dtype: Any, width: float = 1.0) -> jax.Array:
  """On the device, by no more than a transfer: `jnp.asarray` compiles a copy for each shape."""
  return jax.device_put(normal(seed, shape, dtype, width))
