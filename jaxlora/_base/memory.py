"""Memories: arrays may rest in the host's, where nothing is computed with arrays that are elsewhere."""

from typing import Any

import jax

Space = jax.memory.Space


def space_of(x: Any) -> Any:
  """The memory space of an array, as its type says; of a leaf of several arrays, that of the first."""
  first = x if jax.tree_util.all_leaves([x]) else jax.tree.leaves(x)[0]
  return getattr(jax.typeof(first), "memory_space", Space.Device)


def moved(x: Any, space: Any) -> Any:
  """The array in a memory space; the very array where it is there, or where it is known by its type alone."""
  if not jax.tree_util.all_leaves([x]):
    return jax.tree.map(lambda part: moved(part, space), x)
  if not isinstance(x, jax.Array) or space_of(x) == space:
    return x
  return jax.device_put(x, space, src=space_of(x))  # where the cotangent goes back to


def on_device(x: Any) -> Any:
  """The array where it can be computed with, sharded as it is."""
  return moved(x, Space.Device)
