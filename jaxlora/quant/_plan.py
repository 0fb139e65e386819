"""Which leaves are quantised, and along which of their axes blocks run; every check that needs no values."""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from jaxlora._adapt.config import LoraConfig
from jaxlora._adapt.layouts import Layouts
from jaxlora._adapt.probe import study
from jaxlora._adapt.targets import select
from jaxlora._base.coded import is_coded
from jaxlora._base.paths import flatten
from jaxlora._base.patterns import first_match
from jaxlora._weight.roles import axes_of
from jaxlora._weight.weight import is_adapted, is_leaf_node


@dataclasses.dataclass(frozen=True)
class Axes:
  """The axes of a leaf, each group in the order in which blocks fill it.

  Attributes:
    along: those that blocks run along.
    across: the others but the stacked ones, along which scales share a scale of their own.
  """

  along: tuple[int, ...]
  across: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `quantize` does with every leaf of a tree.

  Attributes:
    leaves: all leaves by path, in order.
    treedef: their nesting.
    axes: path -> the axes of those that are quantised.
  """

  leaves: dict[str, Any]
  treedef: Any
  axes: dict[str, Axes]


def plan_tree(
  params: Any, targets: Any, exclude: Any, axes: Mapping[str, str] | None, probe: Callable[[Any], Any] | None
) -> Plan:
  """The plan of a tree, checked; see `quantize` for the arguments and the errors."""
  config = LoraConfig(targets=targets, exclude=exclude, axes=axes)
  nodes, treedef = flatten(params, is_leaf=is_leaf_node)
  if not nodes:
    raise ValueError("quantize: the tree has no leaves; pass the model's parameters.")
  leaves = dict(nodes)
  if adapted := [path for path, leaf in nodes if is_adapted(leaf)]:
    raise ValueError(
      f"quantize: {adapted[0]} is adapted already. Quantise first and adapt what that gives: the base alone"
      " (jaxlora.strip), or with its update (jaxlora.merge)."
    )
  given = {path: roles for path in leaves if (roles := first_match(config.axes, path)) is not None}
  seen = None if probe is None else dict(zip(leaves, study(probe, params), strict=True))
  layouts = Layouts.of_tree(params, leaves, given, seen)
  picked, _ = select(config, leaves, layouts)
  return Plan(leaves, treedef, {path: _axes(path, leaves[path], layouts) for path in leaves if path in picked})


def _axes(path: str, leaf: Any, layouts: Layouts) -> Axes:
  remedy = f"Leave it out (exclude={re.escape(path)!r}), or narrow targets"
  if is_coded(leaf):
    raise ValueError(
      f"quantize: {path} is quantised already: {leaf!r}. {remedy}; to write it in another format, go back to floats"
      " first (jaxlora.dequantize)."
    )
  dtype = getattr(leaf, "dtype", type(leaf).__name__)
  if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"quantize: {path}: dtype {dtype}, expected a real floating dtype. {remedy}.")
  shape = tuple(leaf.shape)
  if len(shape) < 2 or 0 in shape:
    raise ValueError(f"quantize: {path}: shape {shape}, expected two axes or more, none of them empty. {remedy}.")
  if path in layouts.given and len(layouts.given[path]) != len(shape):
    raise ValueError(
      f"quantize: axes: {layouts.given[path]!r} has {len(layouts.given[path])} letters for {path}, whose shape {shape}"
      f" has {len(shape)} axes; expected one letter per axis."
    )
  roles = _roles(path, shape, layouts, remedy)
  along, across = ([*reversed(axes_of(roles, role))] for role in "io")
  looked_up = layouts.seen is not None and layouts.seen[path].looked_up is not None
  if path not in layouts.given and (looked_up or layouts.is_table(path)):  # rows are looked up: blocks within each
    along, across = across, along
  return Axes(tuple(along), tuple(across))


def _roles(path: str, shape: tuple[int, ...], layouts: Layouts, remedy: str) -> str:
  """The roles of a leaf. They only say where blocks run: a matrix of which nothing tells is taken for (in, out)."""
  if (clue := layouts.clue(path, len(shape))) is not None and {*clue.roles} >= {"i", "o"}:
    return clue.roles
  if len(shape) == 2:
    return "io"
  raise ValueError(
    f"quantize: {path}: shape {shape} has {len(shape)} axes, and nothing tells which are contracted, along which blocks"
    f" run. Say it: axes={{{re.escape(path)!r}: 'one of i, o, s per axis'}}, or pass probe=lambda p:"
    f" model.apply({{'params': p}}, x), which learns it from one abstract trace. {remedy}."
  )
