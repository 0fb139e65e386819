"""The roles of weights that are plain arrays: told by the user, by the probe, or by shapes, biases and names."""

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

Axes = Mapping[str, str] | None  # regex over paths -> roles, as `LoraConfig.axes`

# Modules that project heads to features: where an axis has size 1, their first axes are the inputs.
_OUTPUT_PROJECTIONS = ("out", "o", "out_proj", "o_proj", "c_proj", "wo", "to_out", "dense")


@dataclasses.dataclass(frozen=True)
class KnownRoles:
  """What a tree tells of its roles before any adapter is looked at.

  Attributes:
    given: roles by path, from `axes` or the probe.
    outputs_first: whether a matrix that is not square is stored as (out, in), by its bias.
    bias_shapes: the shape of the bias beside each weight that has one, by path.
    tied: leaves that the probe shows both looked up and multiplied by: an embedding that is also the head.
  """

  given: dict[str, str]
  outputs_first: bool
  bias_shapes: dict[str, tuple[int, ...]]
  tied: frozenset[str]


def known_roles(leaves: Mapping[str, Any], params: Any, axes: Axes, probe: Any) -> KnownRoles:
  """Collects what is known of the roles in a tree.

  Args:
    leaves: of the tree, by path.
    params: the tree, for the probe.
    axes: as for `load`.
    probe: as for `load`; `None` for none.

  Raises:
    PeftError: where `axes` does not fit the leaves.
    TypeError, ValueError: where it maps no regexes to roles.
  """
  given, tied = {}, set()
  if probe is not None:
    for path, evidence in zip(leaves, study(probe, params), strict=True):
      if (found := evidence.roles()) is not None:
        given[path] = found
      if evidence.looked_up is not None and evidence.contracted is not None:
        tied.add(path)
  given |= _roles_by_axes(leaves, axes)
  biases = _bias_shapes(leaves)
  shapes = [(shape_of_leaf(leaves[path]), bias) for path, bias in biases.items()]
  outputs_first = any(len(shape) == 2 and shape[0] != shape[1] and bias == (shape[0],) for shape, bias in shapes)
  return KnownRoles(given, outputs_first, biases, frozenset(tied))


def _roles_by_axes(leaves: Mapping[str, Any], axes: Axes) -> dict[str, str]:
  """The roles that the user's `axes` gives, by path."""
  checked = LoraConfig(axes=axes).axes
  for pattern in checked or {}:
    if not any(first_match({pattern: True}, path) for path in leaves):
      raise PeftError(
        f"axes: {pattern!r} matches none of the {len(leaves)} leaves (a regex must match the whole path). Nearest:"
        f" {', '.join(nearest(pattern, leaves))}."
      )
  given = {path: roles for path in leaves if (roles := first_match(checked, path)) is not None}
  for path, roles in given.items():
    shape = shape_of_leaf(leaves[path])
    if len(roles) != len(shape):
      raise PeftError(f"axes: {roles!r} has {len(roles)} letters for {path}, whose shape is {shape}.")
  return given


def _bias_shapes(leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
  parameters = {path: split_path(path) for path in leaves}
  by_module = {
    module: shape_of_leaf(leaves[path]) for path, (module, parameter) in parameters.items() if parameter == "bias"
  }
  return {
    path: by_module[module]
    for path, (module, parameter) in parameters.items()
    if parameter == "weight" and module in by_module
  }


def shape_of_leaf(leaf: Any) -> tuple[int, ...]:
  """The shape of a leaf's weight; of an adapted leaf without its base, by its factors or its value."""
  if isinstance(leaf, LoraWeight) and leaf.base is None:
    return _shape_by_factors(leaf)
  if isinstance(leaf, FullWeight) and leaf.base is None:
    return tuple(np.shape(leaf.value))
  return tuple(leaf.base.shape if is_adapted(leaf) else np.shape(leaf))


def _shape_by_factors(node: LoraWeight) -> tuple[int, ...]:
  a, b, stack = list(node.a.shape), list(node.b.shape), node.roles.count("s")
  sizes = {"s": iter(a[:stack]), "i": iter(a[stack + 1 :]), "o": iter(b[stack + 1 :])}
  return tuple(next(sizes[role]) for role in node.roles)


def roles_by_sizes(path: str, shape: Sequence[int], ins: int, outs: int, known: KnownRoles) -> str:
  """The roles of a matrix, split into heads or not, whose numbers of inputs and outputs are known.

  Raises:
    ValueError: if none fit, or if the matrix is square and others of the tree are stored as (out, in).
  """
  fits = [
    "i" * k + "o" * (len(shape) - k)
    for k in range(1, len(shape))
    if math.prod(shape[:k]) == ins and math.prod(shape[k:]) == outs
  ]
  if len(shape) == 2 and known.outputs_first and ins == outs:
    raise ValueError("the tree stores other matrices as (out, in), and a square one does not tell; say axes= or probe=")
  if not fits:
    transposed = len(shape) == 2 and tuple(shape) == (outs, ins)
    raise ValueError(
      f"shape {tuple(shape)}, but the adapter has {ins} inputs and {outs} outputs"
      + ("; if it is stored as (out, in), say axes={pattern: 'oi'} or probe=" if transposed else "")
    )
  # Several fit only where an axis has size 1: the product is the same, and the name tells which is meant.
  projects_heads = split_path(path)[0].split("/")[-1] in _OUTPUT_PROJECTIONS
  return fits[-1 if projects_heads else 0]


def roles_of_layer(path: str, shape: Sequence[int], stacked: int, known: KnownRoles) -> str:
  """The roles of one layer's weight that is trained whole, without its `stacked` stacked axes.

  Raises:
    ValueError: if nothing tells, or if the roles that are given have other stacked axes.
  """
  if len(shape) < 2:
    return "o" * len(shape)
  given = known.given.get(path)
  if given is None:
    return _roles_by_bias_or_name(path, shape, known)
  if given[:stacked] != "s" * stacked or given.count("s") != stacked:
    raise ValueError(f"axes: {given!r} does not begin with {stacked} 's' for the stacked axes")
  return given[stacked:]


def _roles_by_bias_or_name(path: str, shape: Sequence[int], known: KnownRoles) -> str:
  """The roles of a weight by the bias beside it, or by its name."""
  ndim, bias = len(shape), known.bias_shapes.get(path)
  conv = names_a_convolution(*components(path)[-3:])
  if ndim >= 4 or (ndim == 3 and conv):
    return "i" * (ndim - 1) + "o"
  if ndim == 2:
    if shape[0] == shape[1] and known.outputs_first and components(path)[-1] != "embedding":
      raise ValueError("the tree stores other matrices as (out, in), and a square one does not tell; say axes=")
    return "oi" if bias == (shape[0],) and shape[0] != shape[1] else "io"
  fits = ["i" * k + "o" * (ndim - k) for k in range(1, ndim) if bias == tuple(shape[k:])]
  if len(fits) != 1:
    raise ValueError(f"shape {tuple(shape)}: nothing tells which axes are inputs; say axes={{pattern: roles}}")
  return fits[0]
