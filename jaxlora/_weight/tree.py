"""Trees that hold adapted leaves."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlora._base.paths import flatten
from jaxlora._weight.checks import check_parts
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, is_leaf_node


def is_half_leaf(node: Any) -> bool:
  return node is None or is_leaf_node(node)


def map_adapted(lora: Callable[[Any], Any], full: Callable[[Any], Any], plain: Callable[[Any], Any], tree: Any) -> Any:
  """Maps the nodes of a combined tree by kind."""

  def one(node):
    if isinstance(node, LoraWeight):
      return lora(node)
    return full(node) if isinstance(node, FullWeight) else plain(node)

  return jax.tree_util.tree_map(one, tree, is_leaf=is_leaf_node)


def adapted_leaves(tree: Any) -> list[tuple[str, Any]]:
  """The adapted nodes of a tree with their paths."""
  nodes, _ = flatten(tree, is_leaf=is_leaf_node)
  return [(path, node) for path, node in nodes if is_adapted(node)]


def check_adapted(tree: Any, what: str) -> None:
  """Raises unless the tree has an adapted leaf, and all of them are whole."""
  leaves = adapted_leaves(tree)
  if not leaves:
    raise ValueError(f"{what}: the tree has no adapted leaf. Make one with jaxlora.adapt(params, config, key).")
  for path, node in leaves:
    check_parts(node, f"{what}: {path}")


def base_tree(tree: Any) -> Any:
  """The tree with the base of every adapted node in its place, `None` in a trainable half."""
  return jax.tree_util.tree_map(lambda node: node.base if is_adapted(node) else node, tree, is_leaf=is_leaf_node)
