"""A tree seen as torch's model: the torch module and parameter that every leaf is, layer by layer of a stack."""

from collections.abc import Callable, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from jaxlora._base.paths import components
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted
from jaxlora.peft._names import Names, Target, default_target, given_target, scanned_lists
from jaxlora.peft._packed import packed_by_habit
from jaxlora.peft._records import Packed, PeftError
from jaxlora.peft._roles import KnownRoles
from jaxlora.peft._stacks import Stack, Stacked, any_axes, axes_by_names, axes_by_roles, lists_of, settle, untold


@dataclasses.dataclass(frozen=True)
class TorchModel:
  """A tree seen as torch's model.

  Attributes:
    leaves: of the tree, by path; adapted nodes are leaves.
    targets: the torch parameter of each leaf that has one, by path.
    stacks: the stacked axes of each leaf with a target.
  """

  leaves: Mapping[str, Any]
  targets: dict[str, Target]
  stacks: dict[str, Stack]

  @classmethod
  def of_leaves(cls, leaves: Mapping[str, Any], names: Names, known: KnownRoles, problems: list[str]) -> "TorchModel":
    """Names the leaves. Adapted leaves that cannot be named are added to `problems`; others are left out."""
    stacked_axes = _stacked_axes(leaves, known)
    targets = {}
    for path, leaf in leaves.items():
      stacked = leaf.roles.count("s") if isinstance(leaf, LoraWeight) else stacked_axes(path)
      try:
        target = given_target(path, names) or default_target(path, stacked)
        target = target.laid_out(getattr(leaf, "roles", None), shape_of_leaf(leaf))
      except PeftError as error:
        if is_adapted(leaf):
          problems.append(str(error))
        continue
      if isinstance(leaf, LoraWeight) and target.stacked != stacked:
        problems.append(
          f"{path}: roles {leaf.roles!r} have {stacked} stacked axes, but names gives {target.module!r} with"
          f" {target.stacked} places for an index"
        )
      elif target.stacked > len(shape_of_leaf(leaf)):
        if is_adapted(leaf):
          problems.append(
            f"{path}: shape {shape_of_leaf(leaf)}, but names gives {target.module!r} more places for an index"
          )
      else:
        targets[path] = target
    stacks = _settled(leaves, targets, known)
    for path in [path for path in targets if path not in stacks]:
      if isinstance(leaves[path], FullWeight):
        problems.append(untold(path, _stacked(path, leaves, targets[path], known)))
      del targets[path]
    return cls(leaves, targets, stacks)

  def layers(self, path: str) -> list[tuple[tuple[int, ...], str]]:
    """The layers of a leaf: the index of each along the stacked axes, and the name of its torch module."""
    target, sizes = self.targets[path], shape_of_leaf(self.leaves[path])
    return [(index, target.name(index)) for index in np.ndindex(*(sizes[d] for d in self.stacks[path]))]

  def sizes(self) -> dict[str, int]:
    """How many elements the weight of each module has, by the module's name."""
    sizes = {}
    for name, held in self.parameters().items():
      path, _ = held.get("weight", next(iter(held.values())))
      sizes[name] = math.prod(shape_of_leaf(self.leaves[path])) // max(1, len(self.layers(path)))
    return sizes

  def module_names(self) -> list[str] | None:
    """The names of all modules of the model; `None` for the trainable half of a tree, which has but some of them."""
    if any(isinstance(leaf, LoraWeight) and leaf.base is None for leaf in self.leaves.values()):
      return None
    return sorted(
      {
        name
        for path, target in self.targets.items()
        for index, _ in self.layers(path)
        for name in target.torch_names(index)
      }
    )

  def packed(self) -> dict[str, Packed]:
    """The torch parameters that hold the experts of adapted leaves, by name: those of `Experts`, and by habit."""
    names = self.module_names()
    adapted = {
      name
      for path in self.targets
      if is_adapted(self.leaves[path])
      for index, _ in self.layers(path)
      for name in self.targets[path].torch_names(index)
    }
    by_habit = packed_by_habit(adapted if names is None else names)
    found = {name: packed for name, packed in by_habit.items() if adapted & set(packed.modules)}
    given: dict[str, list[str]] = {}
    for path, target in self.targets.items():
      if target.packed is not None and is_adapted(self.leaves[path]):
        for index, name in self.layers(path):
          given.setdefault(target.packed.format(*index), []).append(name)
    return found | {name: Packed(tuple(modules)) for name, modules in given.items()}

  def parameters(self) -> dict[str, dict[str, tuple[str, tuple[int, ...]]]]:
    """Module -> parameter -> the leaf that holds it, and the index along its stacked axes."""
    found: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    for path, target in self.targets.items():
      for index, name in self.layers(path):
        found.setdefault(name, {})[target.parameter or "weight"] = (path, index)
    return found


def _settled(leaves: Mapping[str, Any], targets: Mapping[str, Target], known: KnownRoles) -> dict[str, Stack]:
  """The stacked axes of every leaf with a target, as far as they are told."""
  stacked = {path: _stacked(path, leaves, target, known) for path, target in targets.items() if target.stacked}
  return {path: () for path in targets if path not in stacked} | settle(stacked)


def _stacked(path: str, leaves: Mapping[str, Any], target: Target, known: KnownRoles) -> Stacked:
  """A leaf with the axes that may be those of its layers."""
  leaf, lists = leaves[path], lists_of(target.module)
  shape, roles = shape_of_leaf(leaf), leaf.roles if isinstance(leaf, LoraWeight) else known.given.get(path)
  if roles is not None and roles.count("s") == target.stacked:
    return Stacked(shape, lists, [axes_by_roles(roles)])
  named = axes_by_names(known.axis_names.get(path))
  return Stacked(shape, lists, [named] if len(named) == target.stacked else any_axes(len(shape), target.stacked))


def _stacked_axes(leaves: Mapping[str, Any], known: KnownRoles) -> Callable[[str], int]:
  """How many stacked axes a leaf has, by its path: as given, or as the adapted leaves of the same scanned module."""
  scanned: dict[str, int] = {}
  for path, leaf in leaves.items():
    parts = components(path)
    lists = scanned_lists(parts)
    if isinstance(leaf, LoraWeight) and leaf.roles.count("s") == len(lists):
      scanned |= {"/".join(parts[: k + 1]): count for count, k in enumerate(lists, 1)}

  def count_of(path: str) -> int:
    if path in known.given:
      return known.given[path].count("s")
    return max((count for stem, count in scanned.items() if path.startswith(f"{stem}/")), default=0)

  return count_of
