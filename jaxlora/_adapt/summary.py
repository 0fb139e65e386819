"""`summary`: what is adapted, what trains, and what that costs."""

from collections.abc import Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.coded import type_of_leaf
from jaxlora._base.paths import flatten, opened
from jaxlora._base.sizes import bytes_of
from jaxlora._base.text import folded, size, table
from jaxlora._weight.tree import check_adapted
from jaxlora._weight.weight import LoraWeight, is_adapted, is_leaf_node, parts, trained_parts

_ADAM_MOMENTS = 2


@dataclasses.dataclass(frozen=True)
class LeafSummary:
  """One leaf that trains.

  Attributes:
    path: its path.
    shape: the weight's shape.
    roles: its role string; empty for a leaf trained whole.
    rank, alpha, scale: of its update; `None` for a leaf trained whole.
    base_parameters: elements of the weight.
    a_parameters, b_parameters: elements of the factors; for a leaf trained whole, all of it counts as `trainable`.
    trainable_parameters: elements that train.
  """

  path: str
  shape: tuple[int, ...]
  roles: str
  rank: int | None
  alpha: float | None
  scale: float | None
  base_parameters: int
  a_parameters: int
  b_parameters: int
  trainable_parameters: int


@dataclasses.dataclass(frozen=True)
class Summary:
  """What `summary` found; prints as a table.

  Attributes:
    leaves: the leaves that train.
    total_parameters: elements of the original tree.
    trainable_parameters: elements that train.
    adapted_parameters: elements of the adapted weights, those that full fine-tuning would train in their place.
    base_bytes, trainable_bytes: sizes in memory.
    optimizer_bytes: two moments (Adam) of the trainable leaves.
    full_optimizer_bytes: the same for full fine-tuning.
    host_bytes: those of NumPy arrays, which every call of a compiled function copies to the device.
  """

  leaves: tuple[LeafSummary, ...]
  total_parameters: int
  trainable_parameters: int
  adapted_parameters: int
  base_bytes: int
  trainable_bytes: int
  optimizer_bytes: int
  full_optimizer_bytes: int
  host_bytes: int = 0

  @property
  def saved(self) -> float:
    """The share of the adapted weights' parameters that need not be trained; negative where more are."""
    return _saved(self.trainable_parameters, self.adapted_parameters)

  def __str__(self) -> str:
    return self.text()

  def text(self, *, fold: bool = True) -> str:
    """The table.

    Args:
      fold: whether layers that are alike are one row, `layers_{0-29}/...`, with the figures of each.
    """
    return "\n".join([table(self.rows(fold=fold)), *self.totals()])

  def rows(self, *, fold: bool = True) -> list[Sequence[str]]:
    """The table's rows, the first of which is the head; `fold` is that of `text`."""
    head = ("leaf", "shape", "roles", "rank", "scale", "A", "B", "trained", "of", "change")
    rows = [_row(leaf) for leaf in self.leaves]
    return [head, *(folded(rows) if fold else rows)]

  def totals(self) -> list[str]:
    """The lines below the table."""
    share = 1 - _saved(self.trainable_parameters, self.total_parameters)
    return [
      f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2%});"
      f" {_fewer(self.saved)} than the {self.adapted_parameters:,} of the leaves above",
      f"base {size(self.base_bytes)}, adapter {size(self.trainable_bytes)}, Adam's moments"
      f" {size(self.optimizer_bytes)} (full fine-tuning: {size(self.full_optimizer_bytes)})",
      *_on_the_host(self.host_bytes),
    ]


def _row(leaf: LeafSummary) -> tuple[str, ...]:
  return (
    leaf.path,
    " x ".join(map(str, leaf.shape)),
    leaf.roles or "whole",
    "-" if leaf.rank is None else str(leaf.rank),
    "-" if leaf.scale is None else f"{leaf.scale:g}",
    f"{leaf.a_parameters:,}",
    f"{leaf.b_parameters:,}",
    f"{leaf.trainable_parameters:,}",
    f"{leaf.base_parameters:,}",
    _fewer(_saved(leaf.trainable_parameters, leaf.base_parameters)),
  )


def _on_the_host(count: int) -> list[str]:
  """What is said of arrays that are NumPy's."""
  return [f"{size(count)} are NumPy arrays, copied to the device by every call: jax.device_put(tree)"] if count else []


def _saved(trained: int, of: int) -> float:
  return 1 - trained / of if of else 0.0  # no parameters at all: nothing is saved


def _fewer(saved: float) -> str:
  return f"{saved:.0%} fewer" if saved >= 0 else f"{-saved:.0%} more"


def _elements(*arrays: Any) -> int:
  return sum(math.prod(jnp.shape(array)) for array in arrays)


def summary(tree: Any) -> Summary:
  """Counts what is adapted, what trains, and what that costs in memory.

  Args:
    tree: what `adapt` returned; arrays or `jax.ShapeDtypeStruct`s.

  Returns:
    A `Summary`: fields to compute with, a table when printed.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.zeros((64, 512))}  # Hu et al.'s 512 x 64 weight, as Flax stores it
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=8), jax.random.key(0))
    >>> report = jaxlora.summary(tree)
    >>> report.leaves[0].a_parameters, report.leaves[0].b_parameters, report.trainable_parameters
    (512, 4096, 4608)
    >>> f"{report.saved:.0%} fewer than {report.adapted_parameters:,}"
    '86% fewer than 32,768'

  Raises:
    ValueError: if the tree has no adapted leaf, or is a half.
  """
  tree = opened(tree)
  check_adapted(tree, "summary")
  nodes, _ = flatten(tree, is_leaf=is_leaf_node)
  leaves: list[LeafSummary] = []
  bases: list[Any] = []
  trained: list[Any] = []
  for path, node in nodes:
    if not is_adapted(node):
      bases.append(node)
      continue
    leaf = _leaf_summary(path, node)
    leaves.append(leaf)
    bases.append(node.base)
    trained.extend(_trained(node))
  return Summary(
    leaves=tuple(leaves),
    total_parameters=_elements(*bases),
    trainable_parameters=_elements(*trained),
    adapted_parameters=sum(leaf.base_parameters for leaf in leaves),
    base_bytes=bytes_of(bases),
    trainable_bytes=bytes_of(trained),
    optimizer_bytes=_ADAM_MOMENTS * bytes_of(trained),
    full_optimizer_bytes=_ADAM_MOMENTS * bytes_of([*map(type_of_leaf, bases)]),
    host_bytes=sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if isinstance(leaf, np.ndarray)),
  )


def _leaf_summary(path: str, node: Any) -> LeafSummary:
  lora = isinstance(node, LoraWeight)
  a, b = (_elements(node.a), _elements(node.b)) if lora else (0, 0)
  return LeafSummary(
    path=path,
    shape=tuple(node.base.shape),
    roles=node.roles if lora else "",
    rank=node.rank if lora else None,
    alpha=node.alpha if lora else None,
    scale=node.scale if lora else None,
    base_parameters=_elements(node.base),
    a_parameters=a,
    b_parameters=b,
    trainable_parameters=_elements(*_trained(node)),
  )


def _trained(node: Any) -> list[Any]:
  """The arrays of a node that train."""
  held = parts(node)
  return [held[name] for name in trained_parts(node)]
