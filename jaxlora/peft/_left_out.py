"""Weights that `target_modules` names, and for which an adapter has no factors."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import math
from typing import Any
import warnings

import numpy as np

from jaxlora._base.text import listed
from jaxlora._weight.weight import LoraWeight
from jaxlora.peft._names import name_ends_with, name_parts
from jaxlora.peft._records import Adapter, PeftWarning
from jaxlora.peft._roles import shape_of_leaf


@dataclasses.dataclass(frozen=True)
class LeftOut:
  """A weight without factors, or a stack some of whose layers have none.

  Attributes:
    path: of the leaf.
    found: what `target_modules` says, and what the adapter holds, as a sentence.
    partial: whether others of its kind have factors, in other layers: then it is likely that the file is not whole.
  """

  path: str
  found: str
  partial: bool


def left_out(
  adapter: Adapter, leaves: Mapping[str, Any], new: Mapping[str, Any], held: Mapping[str, Collection[Any]]
) -> list[LeftOut]:
  """The weights that `target_modules` names and the adapter does not adapt.

  Args:
    adapter: with its configuration.
    leaves: of the tree, by path.
    new: the leaves that the adapter changes, by path.
    held: what the adapter has for each leaf: one thing, or one for each layer of a stack.
  """
  config = adapter.config
  targets = config.get("target_modules")
  if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
    return []
  kinds = {_kind(path) for path in held}
  missing = []
  for path, leaf in leaves.items():
    ending = next((t for t in targets if isinstance(t, str) and name_ends_with(path, t)), None)
    if ending is None or len(shape_of_leaf(leaf)) < 2:
      continue
    node = new.get(path)
    said = f"{path}: target_modules names {ending!r}, but the file holds"
    if node is None and path not in held:
      missing.append(LeftOut(path, f"{said} no factors for it", _kind(path) in kinds))
    elif isinstance(node, LoraWeight):
      layers = math.prod(node.a.shape[: node.roles.count("s")])
      if len(held[path]) < layers:
        missing.append(LeftOut(path, f"{said} {len(held[path])} of {layers} layers", partial=True))
  return missing


def _kind(path: str) -> tuple[str, ...]:
  """The components of a path without the numbers of layers."""
  return tuple(part for part in name_parts(path) if not part.isdecimal())


def problems_of(missing: Collection[LeftOut], *, strict: bool) -> list[str]:
  """What is an error of the weights without factors.

  The adapter of a model that has no such module is whole without it: PEFT starts the missing factors at an update of
  zero, with a warning. Where other layers have theirs, the file has lost some: an error, unless it is not `strict`.
  """
  return [
    f"{one.found}. If it is meant so, pass strict=False: what has no factors then stays the base's"
    for one in missing
    if one.partial and strict
  ]


def warn_of(missing: Collection[LeftOut]) -> None:
  """Warns of weights without factors, once nothing is an error: they stay the base's."""
  if missing:
    warnings.warn(
      f"target_modules names {listed([one.path for one in missing])}, and the file holds no factors for them, or not"
      " for all layers. They stay as they are in the base.",
      PeftWarning,
      stacklevel=4,
    )


def warn_of_tensors(adapter: Adapter, shapes: Mapping[str, Sequence[int]], changed: Collection[str]) -> None:
  """Warns of a torch model's weights that `target_modules` names and an adapter does not change.

  Args:
    adapter: with its configuration.
    shapes: of the model's tensors, by name.
    changed: the names of those that it changes.
  """
  path = lambda name: name.replace(".", "/")
  leaves = {path(name): np.broadcast_to(np.int8(0), shape) for name, shape in shapes.items()}
  warn_of(left_out(adapter, leaves, {}, {path(name): (name,) for name in changed}))
