"""From one module for each leaf to torch's modules, where a leaf holds several modules, or part of one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import math
from typing import Any

import numpy as np

from jaxlora.peft._blocks import join, take, tensor_times, times
from jaxlora.peft._held import Held, Index, assembled
from jaxlora.peft._names import Target
from jaxlora.peft._part_sizes import part_sizes, shown_sizes
from jaxlora.peft._parts import Joined, Split, order_of, rows_of
from jaxlora.peft._records import Module
from jaxlora.peft._roles import shape_of_leaf


def named_for_torch(
  modules: Sequence[Module],
  whole: Mapping[str, np.ndarray],
  leaves: Mapping[str, Any],
  layers: Callable[[str], Sequence[tuple[Index, str]]],
  targets: Mapping[str, Target],
  conv1d: bool,
  problems: list[str],
) -> tuple[list[Module], dict[str, np.ndarray]]:
  """Modules and tensors under torch's names, where some are under names of leaves that are no one torch module.

  Args:
    modules: as `Target.module` names them.
    whole: tensors by parameter, in the same way.
    leaves: of the tree, by path.
    layers: the indices and names of a leaf by its path.
    targets: of the leaves, by path.
    conv1d: whether torch's modules of GPT-2's names are its Conv1D.
    problems: what does not fit is added to these.
  """
  parts = {path: target for path, target in targets.items() if target.parts}
  if not parts:
    return list(modules), dict(whole)
  own = {name for path in parts for _, name in layers(path)}
  old = Held({module.name: module for module in modules if module.name in own}, dict(whole), problems, conv1d)
  new = Held({}, {n: t for n, t in whole.items() if n.rpartition(".")[0] not in own}, problems, conv1d)
  groups: dict[str, dict[tuple[str, int], tuple[str, str]]] = {}  # joined: by parameter and part, the path and own name
  for path, target in parts.items():
    for index, name in layers(path):
      if isinstance(target.parts, Joined):
        (torch_name,) = target.torch_names(index)
        groups.setdefault(torch_name, {})[target.parameter or "weight", target.part] = (path, name)
        continue
      try:
        _split(leaves[path], target, index, name, old, new)
      except ValueError as error:
        problems.append(f"{path}: {error}")
  for torch_name, group in groups.items():
    try:
      for parameter in ("weight", "bias"):
        members = {part: member for (which, part), member in group.items() if which == parameter}
        if members:
          _join(torch_name, parameter, members, leaves, targets, old, new)
    except ValueError as error:
      problems.append(f"{torch_name}: {error}")
  return [*(module for module in modules if module.name not in own), *new.modules.values()], new.tensors


def _split(leaf: Any, target: Target, index: Index, name: str, old: Held, new: Held) -> None:
  """A leaf's modules."""
  record, parameter = target.parts, target.parameter or "weight"
  assert isinstance(record, Split)
  back = None if record.scale is None else 1 / record.scale
  names, module, tensor = target.torch_names(index), old.module(name), old.tensor(name, parameter)
  module = None if module is None else times(module, back)
  tensor = None if tensor is None else tensor_times(tensor, back)
  if target.over_stack:
    if module is not None:
      new.put(take(module, order_of(record, index[-1], len(module.b)), names[0]))
    if tensor is not None:
      new.put_tensor(names[0], parameter, tensor[order_of(record, index[-1], len(tensor))])
    return
  shown = shown_sizes(record, shape_of_leaf(leaf), target, getattr(leaf, "roles", None))
  if module is not None:
    sizes = part_sizes(record, len(module.b), [None] * len(names), shown)
    for part, rows in zip(names, rows_of(record, sizes), strict=True):
      new.put(take(module, rows, part))
  if tensor is not None:
    sizes = part_sizes(record, len(tensor), [None] * len(names), shown)
    for part, rows in zip(names, rows_of(record, sizes), strict=True):
      new.put_tensor(part, parameter, tensor[rows])


def _join(
  torch_name: str,
  parameter: str,
  members: Mapping[int, tuple[str, str]],
  leaves: Mapping[str, Any],
  targets: Mapping[str, Target],
  old: Held,
  new: Held,
) -> None:
  """The torch module of some leaves."""
  record = targets[next(iter(members.values()))[0]].parts
  assert isinstance(record, Joined)
  number = range(len(record.parts))
  modules = [old.module(members[k][1]) if k in members and parameter == "weight" else None for k in number]
  tensors = [old.tensor(members[k][1], parameter) if k in members else None for k in number]
  held = [module for module in modules if module is not None]
  if held:
    inputs = math.prod(held[0].a.shape[1:])
    sibling = next(leaves[members[k][0]] for k in number if modules[k] is not None)
    layers = math.prod(sibling.a.shape[: sibling.roles.count("s")])
    lengths = [
      len(module.b) if module is not None else _outputs_of_other(members.get(k), inputs * layers, leaves)
      for k, module in enumerate(modules)
    ]
    count = sum(size or 0 for size in lengths) if None not in lengths else _whole_by_sizes(record, lengths)
    sizes = part_sizes(record, count, lengths, None)
    new.put(join(list(zip(modules, rows_of(record, sizes), strict=True)), count, torch_name))
  if any(tensor is not None for tensor in tensors):
    parts = [tensor for tensor in tensors if tensor is not None]
    if len(parts) < len(tensors):
      missing = [part for part, tensor in zip(record.parts, tensors, strict=True) if tensor is None]
      raise ValueError(f"PEFT saves its {parameter} whole, and that of {', '.join(missing)} is not known")
    sizes = part_sizes(record, sum(map(len, parts)), list(map(len, parts)), None)
    new.put_tensor(torch_name, parameter, assembled(parts, rows_of(record, sizes)))


def _outputs_of_other(member: tuple[str, str] | None, inputs: int, leaves: Mapping[str, Any]) -> int | None:
  """The outputs of a leaf that is not adapted, with so many inputs in all layers; `None` where the tree lacks it."""
  if member is None:
    return None
  shape = shape_of_leaf(leaves[member[0]])
  if math.prod(shape) % inputs:
    raise ValueError(f"{member[0]} has shape {shape}, which does not hold {inputs} inputs")
  return math.prod(shape) // inputs


def _whole_by_sizes(record: Joined, lengths: Sequence[int | None]) -> int:
  """The outputs of a joined module of which some parts are not in the tree, by `sizes` and a part that is.

  Raises:
    ValueError: without `sizes`.
  """
  if record.sizes is None:
    missing = [part for part, length in zip(record.parts, lengths, strict=True) if length is None]
    raise ValueError(
      f"its parts {', '.join(map(repr, missing))} are no leaves of the tree, and nothing tells how many outputs they"
      " have; say sizes= in names"
    )
  unit, length = next((u, n) for u, n in zip(record.sizes, lengths, strict=True) if n is not None)
  return length * sum(record.sizes) // unit


def joined_names(
  targets: Mapping[str, Target], layers: Callable[[str], Sequence[tuple[Index, str]]]
) -> Iterator[list[str]]:
  """The own names of the leaves that are one torch module together."""
  groups: dict[str, dict[str, None]] = {}
  for path, target in targets.items():
    if isinstance(target.parts, Joined):
      for index, name in layers(path):
        groups.setdefault(target.torch_names(index)[0], {})[name] = None
  yield from map(list, groups.values())
