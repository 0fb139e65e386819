"""The tensors of leaves, one layer after the other: of leaves that are no one torch module, by names of their own."""

from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from jaxlora.hub._plan import Plan
from jaxlora.hub._records import Source
from jaxlora.peft._for_leaves import named_for_leaves
from jaxlora.peft._nodes import Index
from jaxlora.peft._places import index_of, index_pattern
from jaxlora.peft._records import Adapter

Read = Callable[[str], np.ndarray]


def together(plan: Plan, path: str) -> list[str]:
  """A leaf, and those that share its torch modules: they are read together."""
  if path not in plan.parts:
    return [path]
  modules = plan.parts[path].modules
  return [other for other in plan.names if other in plan.parts and plan.parts[other].modules == modules]


def tensors_of(plan: Plan, source: Source, path: str) -> list[str]:
  """The names of the tensors that a leaf is made of."""
  if path not in plan.parts:
    return [*plan.names[path].values()]
  parameter = plan.parts[path].parameter or "weight"
  names = [name for layer in _layers(plan.parts[path].modules, source) for name in layer]
  return [name for name in names if name.endswith(f".{parameter}")]


def layers_of(plan: Plan, source: Source, path: str, read: Read) -> Iterator[Mapping[str, np.ndarray]]:
  """The tensors of a leaf, and of those beside it, by the names that `plan.names` has: of a layer each time.

  Args:
    plan: how the leaves are made.
    source: the model.
    path: of the leaf.
    read: an array in place of a tensor, whose rows are those of the tensor.
  """
  if path not in plan.parts:
    for name in plan.names[path].values():
      yield {name: read(name)}
    return
  modules = plan.parts[path].modules
  targets = {other: target for other, target in plan.parts.items() if target.modules == modules}
  leaves = {other: plan.leaves[other] for other in targets}
  for layer in _layers(modules, source):
    adapter = Adapter({}, {name: read(name) for name in layer}, {}, {})
    yield named_for_leaves(adapter, leaves, targets, plan.known, []).whole


def _layers(modules: Sequence[str], source: Source) -> list[list[str]]:
  """The tensors of some torch modules, those of one layer together."""
  found: dict[Index, dict[str, None]] = {}
  for module in modules:
    regex, order = index_pattern(module)
    for name in source.tensors:
      if match := regex.fullmatch(name.rpartition(".")[0]):
        found.setdefault(index_of(match, order), {})[name] = None
  return [[*names] for names in found.values()]
