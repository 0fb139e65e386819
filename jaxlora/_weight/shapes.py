"""Shapes of weights, of leaves of any kind."""

from typing import Any

import numpy as np

from jaxlora._weight.variant import TOKENS
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted


def shape_of_leaf(leaf: Any) -> tuple[int, ...]:
  """The shape of a leaf's weight; of an adapted leaf without its base, by its factors or its value."""
  if isinstance(leaf, LoraWeight) and leaf.base is None:
    return _shape_by_factors(leaf)
  if isinstance(leaf, FullWeight) and leaf.base is None:
    return tuple(np.shape(leaf.value))
  return tuple(leaf.base.shape if is_adapted(leaf) else np.shape(leaf))


def _shape_by_factors(node: LoraWeight) -> tuple[int, ...]:
  if node.variant == TOKENS:
    raise ValueError(
      "rows of tokens do not say how long their table is, and this half of a tree has no table: pass the whole tree,"
      " jaxlora.join(frozen, trainable)."
    )
  a, b, stack = list(node.a.shape), list(node.b.shape), node.roles.count("s")
  sizes = {"s": iter(a[:stack]), "i": iter(a[stack + 1 :]), "o": iter(b[stack + 1 :])}
  return tuple(next(sizes[role]) for role in node.roles)
