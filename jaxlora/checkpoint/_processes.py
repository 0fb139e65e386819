"""Runs of several processes (`jax.distributed`): what all of them have to do together."""

from typing import Any

import jax

from jaxlora._jax.processes import all_meet
from jaxlora.checkpoint._errors import CheckpointError

PATIENCE = 120.0  # seconds that a process waits for the others


def together(what: str) -> None:
  """Raises unless every process of the run calls the same."""
  if jax.process_count() == 1 or all_meet(f"jaxlora: {what}", PATIENCE):
    return
  raise CheckpointError(
    f"{what}: process {jax.process_index()} of {jax.process_count()} waited {PATIENCE:.0f} s for the others. A lone"
    " process may not do this: each one holds shards of its own. Call it on every process, with the same path and step"
    " and without `if jax.process_index() == 0`. What one process may do alone is to read: checkpoint.contents(path)."
  )


def check_shared(folder: Any, file: Any, what: str) -> None:
  """Raises where this process does not see what all have written together."""
  if jax.process_count() > 1 and not file.exists():
    raise CheckpointError(
      f"{what}: {folder}: process {jax.process_index()} of {jax.process_count()} does not see what the others wrote"
      " there. Expected a folder that all processes share: one on a network file system, or a gs:// path."
    )
