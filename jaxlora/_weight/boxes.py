"""Flax's boxes around leaves, which name the axes: `flax.linen.Partitioned` and `flax.nnx.Variable`.

Flax is never imported here: where it is not loaded there are no boxes.
"""

from collections.abc import Mapping
import sys
from typing import Any

from jax import tree_util

from jaxlora._weight.weight import is_leaf_node


def box_types() -> tuple[type, ...]:
  """The types of Flax's boxes, as far as Flax is loaded."""
  kinds = (("flax.core.meta", "AxisMetadata"), ("flax.nnx", "Variable"))
  return tuple(getattr(sys.modules[module], kind) for module, kind in kinds if hasattr(sys.modules.get(module), kind))


def names_of_axes(box: Any) -> tuple[Any, ...] | None:
  """The names that a box gives to the axes of its leaf; `None` where it gives none."""
  names = getattr(box, "names", None)
  if names is None and hasattr(box, "get_metadata"):
    metadata = box.get_metadata()
    names = metadata.get("out_sharding", metadata.get("sharding"))
  return tuple(names) if isinstance(names, (tuple, list)) else None


def axis_names(tree: Any, paths: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
  """The names of the axes of boxed leaves, by path.

  Args:
    tree: with or without adapted leaves; `None` where there is none beside its leaves.
    paths: those of its leaves (adapted ones are leaves), in flattening order.
  """
  boxes = box_types()
  if tree is None or not boxes:
    return {}
  is_box = lambda node: isinstance(node, boxes)
  named = {place: names_of_axes(node) for place, node in _flatten(tree, is_box) if is_box(node)}
  places = [place for place, _ in _flatten(tree, is_leaf_node)]
  return {
    path: names for path, place in zip(paths, places, strict=True) if (names := named.get(place[:-1])) is not None
  }


def _flatten(tree: Any, is_leaf: Any) -> list[tuple[Any, Any]]:
  return tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)[0]
