"""Teaches `flax.serialization` our nodes, without importing flax where the user has not."""

import sys
from typing import Any

from jaxlora._weight.weight import FullWeight, LoraWeight, parts, with_parts


def register_with_flax() -> None:
  """Registers our nodes if flax is loaded; state dicts hold their arrays, the target holds what is static."""
  serialization = sys.modules.get("flax.serialization")
  if serialization is not None:
    for kind in (LoraWeight, FullWeight):
      serialization.register_serialization_state(kind, parts, _from_state(serialization), override=True)


def _from_state(serialization: Any) -> Any:
  def restore(target: Any, state: dict[str, Any]) -> Any:
    names = list(parts(target))
    if sorted(state) != sorted(names):
      raise ValueError(f"{type(target).__name__}: found {sorted(state)} in the state, expected {sorted(names)}.")
    held = parts(target)
    return with_parts(target, {n: serialization.from_state_dict(held[n], state[n], name=n) for n in names})

  return restore
