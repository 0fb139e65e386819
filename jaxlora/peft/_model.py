"""A tree seen as torch's model: the torch module and parameter that every leaf is, layer by layer of a stack."""

from collections.abc import Callable, Mapping
import dataclasses
from typing import Any

import numpy as np

from jaxlora._base.paths import components
from jaxlora._weight.weight import LoraWeight, is_adapted
from jaxlora.peft._names import Names, Target, default_target, given_target, scanned_lists
from jaxlora.peft._packed import packed_by_habit
from jaxlora.peft._records import Packed, PeftError
from jaxlora.peft._roles import shape_of_leaf


@dataclasses.dataclass(frozen=True)
class TorchModel:
  """A tree seen as torch's model.

  Attributes:
    leaves: of the tree, by path; adapted nodes are leaves.
    targets: the torch parameter of each leaf that has one, by path.
  """

  leaves: Mapping[str, Any]
  targets: dict[str, Target]

  @classmethod
  def of_leaves(cls, leaves: Mapping[str, Any], names: Names, problems: list[str]) -> "TorchModel":
    """Names the leaves. Adapted leaves that cannot be named are added to `problems`; others are left out."""
    stacked_axes = _stacked_axes(leaves)
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
    return cls(leaves, targets)

  def layers(self, path: str) -> list[tuple[tuple[int, ...], str]]:
    """The layers of a leaf: the index of each along the stacked axes, and the name of its torch module."""
    target, leaf = self.targets[path], self.leaves[path]
    sizes = shape_of_leaf(leaf)
    if isinstance(leaf, LoraWeight):
      sizes = tuple(size for size, role in zip(sizes, leaf.roles, strict=True) if role == "s")
    return [(index, target.name(index)) for index in np.ndindex(*sizes[: target.stacked])]

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


def _stacked_axes(leaves: Mapping[str, Any]) -> Callable[[str], int]:
  """How many stacked axes a leaf has, by its path: as many as the adapted leaves of the same scanned module."""
  scanned: dict[str, int] = {}
  for path, leaf in leaves.items():
    parts = components(path)
    lists = scanned_lists(parts)
    if isinstance(leaf, LoraWeight) and leaf.roles.count("s") == len(lists):
      scanned |= {"/".join(parts[: k + 1]): count for count, k in enumerate(lists, 1)}
  return lambda path: max((count for stem, count in scanned.items() if path.startswith(f"{stem}/")), default=0)
