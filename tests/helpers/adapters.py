"""Adapted trees."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from tests.helpers.arrays import normal


def trained(tree: Any, seed: int = 11) -> Any:
  """A tree whose factors have moved, as if by training."""
  frozen, trainable = jaxlora.split(tree)
  leaves, treedef = jax.tree.flatten(trainable)
  moved = [np.asarray(leaf) + normal(seed + k, leaf.shape, leaf.dtype, 0.3) for k, leaf in enumerate(leaves)]
  return jaxlora.join(frozen, jax.tree.unflatten(treedef, [jnp.asarray(leaf) for leaf in moved]))
