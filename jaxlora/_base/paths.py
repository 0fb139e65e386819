"""Paths of leaves: "/"-joined keys, such as `encoder/layer_0/query/kernel`."""

import collections
from collections.abc import Callable, Sequence
import sys
from typing import Any

from jax import tree_util

ROOT = "root"  # the path of a tree that is one leaf


def flatten(tree: Any, is_leaf: Callable[[Any], bool] | None = None) -> tuple[list[tuple[str, Any]], Any]:
  """The leaves with their "/"-joined paths, such as `encoder/layer_0/query/kernel`, and the tree's structure.

  Boxes that hold one array in their `value` attribute (`flax.nnx.Param`, `flax.linen.Partitioned`) are not part of
  the path: the same pattern then serves boxed and plain trees. Paths that would be alike, as keys may hold a "/", are
  written as `jax.tree_util.keystr` writes them; no other path changes for it.
  """
  nodes, treedef = tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
  boxed = _boxed(tree)
  names = [path_string(path[:-1] if path[:-1] in boxed else path) for path, _ in nodes]
  count = collections.Counter(names)
  return [
    (name if count[name] == 1 else tree_util.keystr(path), leaf)
    for name, (path, leaf) in zip(names, nodes, strict=True)
  ], treedef


def path_string(path: Sequence[Any]) -> str:
  return "/".join(map(_component, path)) or ROOT


def _boxed(tree: Any) -> set[Any]:
  """The key paths of Flax's boxes; none where Flax is not loaded, which this never imports."""
  kinds = (("flax.core.meta", "AxisMetadata"), ("flax.nnx", "Variable"))
  boxes = tuple(getattr(sys.modules[module], kind) for module, kind in kinds if module in sys.modules)
  if not boxes:
    return set()
  nodes, _ = tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: isinstance(node, boxes))
  return {path for path, node in nodes if isinstance(node, boxes)}


def unboxed(tree: Any) -> Any:
  """An `nnx.State` with the values of its Variables in their places; any other tree as it is."""
  nnx = sys.modules.get("flax.nnx")
  return nnx.as_pure(tree) if nnx is not None and isinstance(tree, nnx.State) else tree


def opened(tree: Any) -> Any:
  """A module of `jaxlora.nnx` as the tree with adapted leaves that it stands for; any other tree as it is."""
  nnx = sys.modules.get("jaxlora.nnx")
  return tree if nnx is None else nnx.opened(tree)


def _component(key: Any) -> str:
  for field in ("key", "idx", "name"):
    if hasattr(key, field):
      return str(getattr(key, field))
  return str(key)


def components(path: str) -> list[str]:
  return path.split("/")
