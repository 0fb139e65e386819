"""From torch's modules to one module for each leaf, where a leaf holds several modules, or part of one.

Such a leaf has a name of its own, `Target.module`: whatever comes after this sees one module for one leaf.
"""

from collections.abc import Collection, Mapping
import dataclasses
import math
from typing import Any

import numpy as np

from jaxlora.peft._blocks import join, take, tensor_times, times
from jaxlora.peft._held import Held, Index, assembled
from jaxlora.peft._names import Names, Target, given_target
from jaxlora.peft._part_sizes import part_sizes, shown_sizes
from jaxlora.peft._parts import Joined, Split, order_of, rows_of
from jaxlora.peft._places import index_of, index_pattern
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import KnownRoles, shape_of_leaf


def targets_of_parts(leaves: Mapping[str, Any], names: Names, known: KnownRoles) -> dict[str, Target]:
  """The targets of the leaves that are no one torch module, by path."""
  found = {path: target for path in leaves if (target := given_target(path, names)) is not None and target.parts}
  return {path: found[path].laid_out(known.given.get(path), shape_of_leaf(leaves[path])) for path in found}


def named_for_leaves(
  adapter: Adapter,
  leaves: Mapping[str, Any],
  targets: Mapping[str, Target],
  known: KnownRoles,
  problems: list[str],
) -> Adapter:
  """An adapter with the modules and tensors of some leaves under the leaves' own names, as `Target.module` has them.

  Args:
    adapter: with torch's names.
    leaves: of the tree, by path.
    targets: as `targets_of_parts` returns them.
    known: roles of the tree.
    problems: what does not fit is added to these.
  """
  if not targets:
    return adapter
  old = Held(dict(adapter.modules), {**adapter.bases, **adapter.whole}, problems, known.conv1d)
  new = Held({}, {}, problems, known.conv1d)
  groups: dict[tuple[str, str], tuple[Index, dict[int, str]]] = {}  # of a joined parameter: the leaf of each part
  for path, target in targets.items():
    for index in _indices(target, [*old.modules, *(name.rpartition(".")[0] for name in old.tensors)]):
      if isinstance(target.parts, Joined):
        (torch_name,) = target.torch_names(index)
        group = groups.setdefault((torch_name, target.parameter or "weight"), (index, {}))[1]
        if target.part in group:
          problems.append(f"{path}, {group[target.part]}: are one part of {torch_name}. Tell them apart by names=")
        group[target.part] = path
        continue
      try:
        _gather(path, leaves[path], target, index, old, new, known)
      except ValueError as error:
        problems.append(f"{path}: {error}")
  for (torch_name, parameter), (index, paths) in groups.items():
    try:
      _scatter(torch_name, parameter, paths, index, leaves, targets, old, new, known)
    except ValueError as error:
      problems.append(f"{torch_name}: {error}")
  rest = lambda held: {name: value for name, value in held.items() if name not in old.taken}
  saved = adapter.config.get("modules_to_save")
  own = sorted({name.rpartition(".")[0] for name in new.tensors})
  return dataclasses.replace(
    adapter,
    modules=rest(adapter.modules) | new.modules,
    whole=rest(adapter.whole) | new.tensors,
    bases=rest(adapter.bases),
    config=adapter.config | ({"modules_to_save": [*saved, *own]} if isinstance(saved, list) else {}),
  )


def _indices(target: Target, names: Collection[str]) -> list[Index]:
  """The indices along the stacked axes at which torch has a module of a target."""
  found: dict[Index, None] = {}
  for module in target.modules:
    regex, order = index_pattern(module)
    found |= {index_of(match, order): None for name in names if (match := regex.fullmatch(name))}
  return list(found)


def _gather(path: str, leaf: Any, target: Target, index: Index, old: Held, new: Held, known: KnownRoles) -> None:
  """Torch's modules of a leaf that holds several."""
  record, parameter = target.parts, target.parameter or "weight"
  assert isinstance(record, Split)
  if target.over_stack:
    for k in range(len(target.modules)):
      (name,) = target.torch_names((*index, k))
      module = old.module(name) if parameter == "weight" else None
      tensor, own = old.tensor(name, parameter), target.name((*index, k))
      if module is not None:
        new.put(times(take(module, np.argsort(order_of(record, k, len(module.b))), own), record.scale))
      if tensor is not None:
        rows = np.argsort(order_of(record, k, len(tensor)))
        new.put_tensor(own, parameter, tensor_times(tensor[rows], record.scale))
    return
  names, name = target.torch_names(index), target.name(index)
  modules = [old.module(part) if parameter == "weight" else None for part in names]
  if any(modules):
    inputs = math.prod(next(module for module in modules if module is not None).a.shape[1:])
    count = _outputs(path, leaf, target, inputs, known)
    lengths = [None if module is None else len(module.b) for module in modules]
    sizes = part_sizes(record, count, lengths, shown_sizes(record, shape_of_leaf(leaf), target, known.given.get(path)))
    joined = join(list(zip(modules, rows_of(record, sizes), strict=True)), count, name)
    new.put(times(joined, record.scale))
  tensors = [old.tensor(part, parameter) for part in names]
  found = [tensor for tensor in tensors if tensor is not None]
  if found:
    if len(found) < len(names):
      raise ValueError(f"the file holds a {parameter} for {len(found)} of {', '.join(names)}, and the leaf is all")
    sizes = part_sizes(record, sum(map(len, found)), list(map(len, found)), None)
    new.put_tensor(name, parameter, tensor_times(assembled(found, rows_of(record, sizes)), record.scale))


def _scatter(
  name: str,
  parameter: str,
  paths: Mapping[int, str],
  index: Index,
  leaves: Mapping[str, Any],
  targets: Mapping[str, Target],
  old: Held,
  new: Held,
  known: KnownRoles,
) -> None:
  """One torch module's part for each of some leaves, which are its weight or its bias together."""
  module, tensor = old.module(name) if parameter == "weight" else None, old.tensor(name, parameter)
  whole = module.b if module is not None else tensor
  if whole is None:
    return
  record = targets[next(iter(paths.values()))].parts
  assert isinstance(record, Joined)
  if missing := [part for k, part in enumerate(record.parts) if k not in paths]:
    raise ValueError(
      f"its parts {', '.join(map(repr, missing))} are no leaves of the tree: nothing may be lost of an adapter. Name"
      " them by names=, too"
    )
  own = [paths[k] for k in range(len(record.parts))]
  inputs = math.prod(module.a.shape[1:]) if module is not None else whole.size // len(whole)
  counts = [_outputs(path, leaves[path], targets[path], inputs, known) for path in own]
  sizes = part_sizes(record, len(whole), counts, None)
  for path, rows in zip(own, rows_of(record, sizes), strict=True):
    if module is not None:
      new.put(take(module, rows, targets[path].name(index)))
    if tensor is not None:
      new.put_tensor(targets[path].name(index), parameter, tensor[rows])


def _outputs(path: str, leaf: Any, target: Target, inputs: int, known: KnownRoles) -> int:
  """The number of outputs of one layer of a leaf with so many inputs."""
  shape, roles = shape_of_leaf(leaf), known.given.get(path)
  if roles is not None:
    return math.prod(size for size, role in zip(shape, roles, strict=True) if role == "o")
  size = math.prod(shape[target.stacked :])
  if size % inputs:
    raise ValueError(f"shape {shape} does not hold {inputs} inputs")
  return size // inputs
