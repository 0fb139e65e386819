"""Roles of weights that no `LoraWeight` tells of."""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import numpy as np

from jaxlora._adapt.config import LoraConfig
from jaxlora._adapt.probe import study
from jaxlora._base.paths import components
from jaxlora._base.patterns import first_match, nearest
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted
from jaxlora.peft._layout import names_a_convolution
from jaxlora.peft._names import split_path
from jaxlora.peft._records import PeftError

Axes = Mapping[str, str] | None

_OUTPUTS = ("out", "o", "out_proj", "o_proj", "c_proj", "wo", "to_out", "dense")


@dataclasses.dataclass(frozen=True)
class Roles:
  """Roles as far as they are known before a file is read.

  Attributes:
    said: by path, from `axes` or the probe.
    outputs_first: whether the biases of the tree tell that its matrices are stored (out, in).
    biases: shape of the bias beside each leaf.
    tied: leaves that the probe shows looked up and multiplied by: an embedding that is the head, too.
  """

  said: dict[str, str]
  outputs_first: bool
  biases: dict[str, tuple[int, ...]]
  tied: frozenset[str]


def known_roles(leaves: Mapping[str, Any], params: Any, axes: Axes, probe: Any) -> Roles:
  said, tied = {}, set()
  if probe is not None:
    for path, evidence in zip(leaves, study(probe, params), strict=True):
      if (found := evidence.roles()) is not None:
        said[path] = found
      if evidence.looked_up is not None and evidence.contracted is not None:
        tied.add(path)
  checked = LoraConfig(axes=axes).axes  # says what is wrong with them
  for pattern in checked or {}:
    if not any(first_match({pattern: True}, path) for path in leaves):
      raise PeftError(
        f"axes: {pattern!r} matches none of the {len(leaves)} leaves (a regex must match the whole path). Nearest:"
        f" {', '.join(nearest(pattern, leaves))}."
      )
  for path, leaf in leaves.items():
    if (given := first_match(checked, path)) is not None:
      if len(given) != len(shape_of_leaf(leaf)):
        raise PeftError(f"axes: {given!r} has {len(given)} letters for {path}, whose shape is {shape_of_leaf(leaf)}.")
      said[path] = given
  biases = _biases(leaves)
  sides = [(shape_of_leaf(leaves[path]), bias) for path, bias in biases.items()]
  first = any(len(shape) == 2 and shape[0] != shape[1] and bias == (shape[0],) for shape, bias in sides)
  return Roles(said, first, biases, frozenset(tied))


def _biases(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  """The shape of the bias beside each weight that has one."""
  parameters = {path: split_path(path) for path in leaves}
  of_module = {
    module: shape_of_leaf(leaves[path]) for path, (module, parameter) in parameters.items() if parameter == "bias"
  }
  return {path: of_module[module] for path, (module, p) in parameters.items() if p == "weight" and module in of_module}


def shape_of_leaf(leaf: Any) -> tuple[int, ...]:
  if isinstance(leaf, LoraWeight) and leaf.base is None:
    return _shape_of_factors(leaf)
  if isinstance(leaf, FullWeight) and leaf.base is None:
    return tuple(np.shape(leaf.value))
  return tuple(leaf.base.shape if is_adapted(leaf) else np.shape(leaf))


def _shape_of_factors(node: LoraWeight) -> tuple[int, ...]:
  a, b, stack = list(node.a.shape), list(node.b.shape), node.roles.count("s")
  sides = {"s": iter(a[:stack]), "i": iter(a[stack + 1 :]), "o": iter(b[stack + 1 :])}
  return tuple(next(sides[role]) for role in node.roles)


def roles_by_sizes(path: str, shape: Sequence[int], ins: int, outs: int, roles: Roles) -> str:
  """The roles of a matrix, split into heads or not, of which the flat sizes are known.

  Raises:
    ValueError: if none fit, or if a square matrix lies in a tree of matrices stored the other way round.
  """
  fits = [
    "i" * k + "o" * (len(shape) - k)
    for k in range(1, len(shape))
    if math.prod(shape[:k]) == ins and math.prod(shape[k:]) == outs
  ]
  if len(shape) == 2 and roles.outputs_first and ins == outs:
    raise ValueError("the tree stores other matrices as (out, in), and a square one does not tell; say axes= or probe=")
  if not fits:
    other = len(shape) == 2 and tuple(shape) == (outs, ins)
    raise ValueError(
      f"shape {tuple(shape)}, but the adapter has {ins} inputs and {outs} outputs"
      + ("; if it is stored as (out, in), say axes={pattern: 'oi'} or probe=" if other else "")
    )
  # Several fit only where an axis has size 1: the product is the same, and the name tells which is meant.
  outputs = split_path(path)[0].split("/")[-1] in _OUTPUTS
  return fits[-1 if outputs else 0]


def roles_of_whole(path: str, shape: Sequence[int], roles: Roles) -> str:
  """The roles of a weight trained whole, told by `axes` or the probe, by its bias, or by its name.

  Raises:
    ValueError: if nothing tells.
  """
  ndim, bias = len(shape), roles.biases.get(path)
  conv = names_a_convolution(*components(path)[-3:])
  if ndim >= 4 or (ndim == 3 and conv):
    return "i" * (ndim - 1) + "o"
  if ndim == 2:
    if shape[0] == shape[1] and roles.outputs_first and components(path)[-1] != "embedding":
      raise ValueError("the tree stores other matrices as (out, in), and a square one does not tell; say axes=")
    return "oi" if bias == (shape[0],) and shape[0] != shape[1] else "io"
  fits = ["i" * k + "o" * (ndim - k) for k in range(1, ndim) if bias == tuple(shape[k:])]
  if len(fits) != 1:
    raise ValueError(f"shape {tuple(shape)}: nothing tells which axes are inputs; say axes={{pattern: roles}}")
  return fits[0]


def own_roles(path: str, shape: Sequence[int], stacked: int, roles: Roles) -> str:
  """The roles of one layer's weight, trained whole."""
  if len(shape) < 2:
    return "o" * len(shape)
  said = roles.said.get(path)
  if said is None:
    return roles_of_whole(path, shape, roles)
  if said[:stacked] != "s" * stacked or said.count("s") != stacked:
    raise ValueError(f"axes: {said!r} does not begin with {stacked} 's' for the stacked axes")
  return said[stacked:]
