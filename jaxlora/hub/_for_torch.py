"""The tensors of a tree by torch's names, made of one layer of a leaf at a time."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.memory import on_device
from jaxlora._quant.array import QuantizedArray
from jaxlora.peft._for_torch import named_for_torch
from jaxlora.peft._model import TorchModel
from jaxlora.peft._nodes import Index
from jaxlora.peft._roles import KnownRoles
from jaxlora.peft._to_modules import layer_to_torch

Layer = Callable[[str, Index], np.ndarray]  # a layer of the leaf at a path, without the stacked axes


def groups_of(model: TorchModel) -> list[list[str]]:
  """The leaves whose tensors are made together: those that share torch modules."""
  groups: dict[Any, list[str]] = {}
  for path, target in model.targets.items():
    groups.setdefault(target.modules if target.parts else path, []).append(path)
  return list(groups.values())


def tensors_of(
  model: TorchModel, paths: list[str], known: KnownRoles, layer: Layer, problems: list[str]
) -> Iterator[tuple[str, np.ndarray]]:
  """Torch's tensors of some leaves that are made together, those of one layer after the other.

  Args:
    model: the tree.
    paths: a group of its leaves.
    known: roles of the tree.
    layer: what a layer of a leaf holds.
    problems: what does not fit is added to these.
  """
  targets = {path: model.targets[path] for path in paths}
  layers: dict[Index, dict[str, list[tuple[Index, str]]]] = {}
  for path, target in targets.items():
    for index, name in model.layers(path):
      at = index[:-1] if target.over_stack else index
      layers.setdefault(at, {path: [] for path in paths})[path].append((index, name))
  for members in layers.values():
    whole: dict[str, np.ndarray] = {}
    for path, indices in members.items():
      parameter = targets[path].parameter or ("weight" if targets[path].parts else None)
      for index, module in indices:
        value = layer(path, index)
        if parameter is None:
          whole[module] = _as_it_is(path, value, problems)
        elif (tensor := layer_to_torch(path, module, parameter, value, known, problems)) is not None:
          whole[f"{module}.{parameter}"] = tensor
    _, whole = named_for_torch([], whole, model.leaves, members.__getitem__, targets, known.conv1d, problems)
    yield from whole.items()


def _as_it_is(path: str, value: np.ndarray, problems: list[str]) -> np.ndarray:
  """A parameter that is no layer's weight, such as a class token: as the leaf has it."""
  long = [size for size in value.shape if size > 1]
  if len({*long}) < len(long):
    problems.append(
      f"{path}: shape {value.shape} does not tell in which order torch's axes are. If it is a layer's weight, say so:"
      f" names={{{path!r}: 'its.name.weight'}}"
    )
  return value


def shapes_of_layers(model: TorchModel, dtypes: Mapping[str, Any]) -> Layer:
  """Layers of which nothing but shapes and dtypes is there: one element for all."""

  def layer(path: str, index: Index) -> np.ndarray:
    del index
    shape = model.leaves[path].shape
    sizes = [size for d, size in enumerate(shape) if d not in model.stacks[path]]
    return np.broadcast_to(np.zeros((), dtypes[path]), sizes)

  return layer


def values_of_layers(model: TorchModel, paths: list[str]) -> Layer:
  """Layers in NumPy, each read when it is asked for: no leaf of several is there as a whole, nor in floats."""
  leaves = {path: model.leaves[path] for path in paths}
  leaves = {
    path: decoded(leaf) if is_coded(leaf) and not isinstance(leaf, QuantizedArray) else leaf
    for path, leaf in leaves.items()
  }
  return lambda path, index: _in_numpy(leaves[path], model.stacks[path], index)


def _in_numpy(leaf: Any, axes: Index, index: Index) -> np.ndarray:
  if isinstance(leaf, np.ndarray):
    return np.moveaxis(leaf, axes, range(len(index)))[index]
  one = jax.tree.map(lambda part: _one_layer(on_device(part), leaf.shape, axes, index), leaf)
  return np.asarray(decoded(one))


def _one_layer(part: Any, shape: tuple[int, ...], axes: Index, index: Index) -> jax.Array:
  """A layer of a part of a leaf: of an array of its own, which goes with its copy on the host."""
  if not axes:
    return jnp.array(part, copy=True)
  for axis, k in sorted(zip(axes, index, strict=True), reverse=True):
    block = shape[axis] // part.shape[axis]
    part = lax.dynamic_index_in_dim(part, k // block, axis, keepdims=False)
  return part
