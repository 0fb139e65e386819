"""A node of codes as another library might have one."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Eighths:
  """Whole numbers of eighths."""

  codes: Any
  dtype: Any = dataclasses.field(default=jnp.dtype(jnp.float32), metadata={"static": True})

  shape = property(lambda self: self.codes.shape)
  ndim = property(lambda self: self.codes.ndim)

  def dequantize(self) -> jax.Array:
    """The array in floats."""
    return jnp.asarray(self.codes).astype(self.dtype) / 8
