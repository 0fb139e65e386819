"""Bytes of arrays, those of less than a byte for each element included."""

import math
from typing import Any

import jax
import jax.numpy as jnp


def bytes_of(tree: Any) -> int:
  """What the arrays of a tree take, random keys among them; Python's numbers take nothing."""
  leaves = [leaf for leaf in jax.tree.leaves(tree) if hasattr(leaf, "dtype") and hasattr(leaf, "shape")]
  return sum(-(-math.prod(leaf.shape) * bits_of(leaf.dtype) // 8) for leaf in leaves)


def bits_of(dtype: Any) -> int:
  """The bits of one element. `itemsize` says 1 byte of integers and floats that have 4 bits or fewer."""
  if jnp.issubdtype(dtype, jnp.integer):
    return int(jnp.iinfo(dtype).bits)
  return int(jnp.finfo(dtype).bits) if jnp.issubdtype(dtype, jnp.floating) else 8 * int(dtype.itemsize)
