"""Modules and tensors by name, while those of leaves that are no one torch module are renamed."""

from collections.abc import Sequence
import dataclasses

import numpy as np

from jaxlora.peft._conv1d import is_named_conv1d
from jaxlora.peft._records import Module

Index = tuple[int, ...]  # along the stacked axes of a leaf


@dataclasses.dataclass
class Held:
  """Modules and tensors by name, taken out and put in; and what is wrong."""

  modules: dict[str, Module]
  tensors: dict[str, np.ndarray]  # by the name of the parameter
  problems: list[str]
  conv1d: bool = True  # whether modules of GPT-2's names store their weights as (in, out)
  taken: set[str] = dataclasses.field(default_factory=set)  # names of modules and of parameters that went elsewhere

  def module(self, name: str) -> Module | None:
    self.taken |= {name} & self.modules.keys()
    return self.modules.get(name)

  def put(self, module: Module) -> None:
    if module.name in self.modules:
      self.problems.append(f"{module.name}: several leaves or modules have this name. Tell them apart by names=")
    self.modules[module.name] = module

  def tensor(self, module: str, parameter: str) -> np.ndarray | None:
    """A tensor of a module, with its outputs first."""
    tensor = self.tensors.get(name := f"{module}.{parameter}")
    self.taken |= {name} & self.tensors.keys()
    return tensor.T if tensor is not None and self._inputs_first(module, tensor) else tensor

  def put_tensor(self, module: str, parameter: str, tensor: np.ndarray) -> None:
    name = f"{module}.{parameter}"
    if name in self.tensors:
      self.problems.append(f"{name}: several leaves or tensors have this name. Tell them apart by names=")
    self.tensors[name] = tensor.T if self._inputs_first(module, tensor) else tensor

  def _inputs_first(self, module: str, tensor: np.ndarray) -> bool:
    return self.conv1d and tensor.ndim == 2 and is_named_conv1d(module)


def assembled(parts: Sequence[np.ndarray], rows: Sequence[np.ndarray]) -> np.ndarray:
  """A tensor made of its parts' rows."""
  whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), parts[0].dtype)
  for part, own in zip(parts, rows, strict=True):
    if part.shape[1:] != whole.shape[1:]:
      raise ValueError(f"parts of shapes {parts[0].shape} and {part.shape} are no one weight")
    whole[own] = part
  return whole
