"""What an adapter's own shapes tell of the leaves that it belongs to: the axes of stacked layers, and the roles."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from jaxlora._weight.shapes import shape_of_leaf
from jaxlora.peft._layout import torch_shapes
from jaxlora.peft._names import Names, default_target, given_target
from jaxlora.peft._records import Module, PeftError
from jaxlora.peft._roles import KnownRoles, roles_for_module
from jaxlora.peft._stacks import Stacked, any_axes, axes_by_names, axes_by_roles, lists_of, settle, untold

Index = tuple[int, ...]  # along the stacked axes of a leaf

Tensors = Mapping[Index, tuple[str, np.ndarray]]  # by the index of the layer: name and value


def with_layers(
  known: KnownRoles,
  leaves: Mapping[str, Any],
  modules: Mapping[str, Mapping[Index, Module]],
  whole: Mapping[str, Tensors],
  names: Names,
) -> tuple[KnownRoles, dict[str, str]]:
  """What is known, with what modules and tensors tell; and by path what is wrong where the stacked axes are not told.

  Args:
    known: of the tree.
    leaves: by path.
    modules: those of every leaf that they adapt, by path and index of the layer.
    whole: the tensors of every leaf that they replace, in the same way.
    names: as for `load`.
  """
  stacked = {}
  for path, layers in [*modules.items(), *whole.items()]:
    if (count := len(next(iter(layers)))) > 0:
      stacked[path] = _stacked(path, shape_of_leaf(leaves[path]), count, layers, known, names)
  stacks = settle(stacked)
  layers_of = {**modules, **whole}
  problems = {
    path: untold(path, leaf) if leaf.candidates else _none_fits(path, leaf.shape, layers_of[path])
    for path, leaf in stacked.items()
    if path not in stacks
  }
  known = dataclasses.replace(known, stacks=stacks)
  return dataclasses.replace(known, layouts=known.layouts.beside(_told(known, leaves, modules))), problems


def _stacked(
  path: str, shape: tuple[int, ...], count: int, layers: Mapping[Index, Any], known: KnownRoles, names: Names
) -> Stacked:
  """A leaf with the axes that may be those of its layers, by what fits."""
  given, named = known.given.get(path), axes_by_names(known.axis_names.get(path))
  lists = _lists(path, names, count)
  if given is not None and given.count("s") == count:
    return Stacked(shape, lists, [axes_by_roles(given)])
  if len(named) == count:
    return Stacked(shape, lists, [named])
  most = [max(index[k] for index in layers) for k in range(count)]
  fitting = []
  for axes in any_axes(len(shape), count):
    layer = [size for d, size in enumerate(shape) if d not in axes]
    enough = all(shape[d] > last for d, last in zip(axes, most, strict=True))
    if enough and all(_fits(layer, held) for held in layers.values()):
      fitting.append(axes)
  return Stacked(shape, lists, fitting)


def _lists(path: str, names: Names, count: int) -> list[str]:
  """The lists in torch that the layers of a leaf are in; none where nothing says where torch's name has the index."""
  try:
    found = lists_of((given_target(path, names) or default_target(path, count)).module)
  except PeftError:
    return []
  return found if len(found) == count else []


def _fits(layer: Sequence[int], held: Module | tuple[str, np.ndarray]) -> bool:
  """Whether a module or a tensor of torch's can be one layer, by its sizes alone."""
  if isinstance(held, Module):
    if held.kind == "conv":
      last, first = "i" * (len(layer) - 1) + "o", "o" + "i" * (len(layer) - 1)
      found = (held.a.shape, held.b.shape)
      return len(layer) >= 2 and any(torch_shapes(layer, roles, "conv", held.rank) == found for roles in (last, first))
    return _splits(layer, held.a.shape[1], held.b.shape[0])
  name, tensor = held
  if name.endswith(".bias") or tensor.ndim < 2:
    return math.prod(layer) == tensor.size and (len(layer) == 1 or name.endswith(".bias"))
  if tensor.ndim == 2:
    return _splits(layer, *tensor.shape)
  return sorted(layer) == sorted(tensor.shape)


def _none_fits(path: str, shape: Sequence[int], layers: Mapping[Index, Any]) -> str:
  """For an error message: that no axis of a leaf can be that of its layers."""
  index = max(layers)
  held = layers[index]
  name, found = (held.name, f"weights {held.shape}") if isinstance(held, Module) else (held[0], held[1].shape)
  last = " and ".join(map(str, index))
  return f"{path} ({name}): shape {tuple(shape)} has no axis for {found} of the layers up to {last}"


def _splits(layer: Sequence[int], one: int, other: int) -> bool:
  """Whether the axes are those of one side, and behind them those of the other."""
  sides = [(math.prod(layer[:k]), math.prod(layer[k:])) for k in range(1, len(layer))]
  return (one, other) in sides or (other, one) in sides


def _told(
  known: KnownRoles, leaves: Mapping[str, Any], modules: Mapping[str, Mapping[Index, Module]]
) -> dict[str, str]:
  """The layouts of matrices that are not square, by their adapters."""
  told = {}
  for path, layers in modules.items():
    index, module = next(iter(layers.items()))
    shape = shape_of_leaf(leaves[path])
    try:
      axes = known.stacked_axes(path, len(index))
      layer = [size for d, size in enumerate(shape) if d not in axes]
      if module.kind == "linear" and len(layer) == 2 and layer[0] != layer[1]:
        told[path] = roles_for_module(path, layer, module, known).roles
    except ValueError:  # said where the leaf is adapted
      continue
  return told
