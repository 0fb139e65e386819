"""Runs of several processes (`jax.distributed`): arrays that they share, and keys that have to be the same on all."""

from typing import Any

import jax


def spans_processes(leaf: Any) -> bool:
  """Whether an array has shards that other processes hold."""
  return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and not leaf.is_fully_addressable


def not_here(leaf: Any) -> bool:
  """Whether this process cannot have all of an array: others hold shards of it, and not each of them the whole."""
  return spans_processes(leaf) and not leaf.is_fully_replicated


GATHER = (
  "Gather the tree on every process, whole = jax.experimental.multihost_utils.process_allgather(tree, tiled=True), and"
  " save that on one of them, or on each to a path of its own; jaxlora.checkpoint.save writes shards where they are."
)


def check_same_on_all(key: jax.Array, what: str) -> None:
  """Raises where processes have different random keys: each would draw the shards of another array."""
  from jax.experimental import multihost_utils

  try:
    multihost_utils.assert_equal(jax.random.key_data(key))
  except AssertionError as error:
    raise ValueError(
      f"{what}: the {jax.process_count()} processes have different ones, and parameters that lie on all of them: each"
      " would draw parts of another array. Make the key of one seed on all (jax.random.key(0)), or share process 0's:"
      " jax.experimental.multihost_utils.broadcast_one_to_all(jax.random.key_data(key))."
    ) from error
