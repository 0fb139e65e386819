"""Which leaves of a tree of plain arrays are stacks of layers: no adapter tells it, but norms do."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxlora._base.paths import components
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora.peft._names import scanned_lists
from jaxlora.peft._roles import KnownRoles, roles_of_layer


def with_scanned(leaves: Mapping[str, Any], known: KnownRoles) -> KnownRoles:
  """What is known, and the roles of the leaves of scanned modules.

  A module that has the name of a list in torch, and no index, is scanned where all of its leaves have the same first
  size, and all scales of its norms, which are vectors in a single layer, have two axes.
  """
  stems: dict[str, list[str]] = {}
  for path in leaves:
    parts = components(path)
    if len(lists := scanned_lists(parts)) == 1:
      stems.setdefault("/".join(parts[: lists[0] + 1]), []).append(path)
  given = dict(known.given)
  for paths in stems.values():
    shapes = {path: shape_of_leaf(leaves[path]) for path in paths}
    scales = [shape for path, shape in shapes.items() if components(path)[-1] == "scale"]
    if scales and {len(shape) for shape in scales} == {2} and len({shape[:1] for shape in shapes.values()}) == 1:
      given |= {path: roles for path in paths if path not in given and (roles := _roles(path, shapes[path], known))}
  return dataclasses.replace(known, given=given)


def _roles(path: str, shape: tuple[int, ...], known: KnownRoles) -> str | None:
  """The roles of a stacked leaf; `None` where nothing tells those of a layer, which is said where they are needed."""
  if components(path)[-1] == "bias":
    return "s" + "o" * (len(shape) - 1)
  try:
    return "s" + roles_of_layer(path, shape[1:], known)
  except ValueError:
    return None
