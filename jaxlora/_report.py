"""`summary` and `explain`: what is adapted, what it costs, and which path each weight takes through a function."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths, _transform
from jaxlora._adapt import check_adapted
from jaxlora._bank import Bank, recorded
from jaxlora._transform import Record, Use
from jaxlora._weight import LoraWeight, is_adapted, parts, trained_parts

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
  """

  leaves: tuple[LeafSummary, ...]
  total_parameters: int
  trainable_parameters: int
  adapted_parameters: int
  base_bytes: int
  trainable_bytes: int
  optimizer_bytes: int
  full_optimizer_bytes: int

  @property
  def saved(self) -> float:
    """The share of the adapted weights' parameters that need not be trained; negative where more are."""
    return _saved(self.trainable_parameters, self.adapted_parameters)

  def __str__(self) -> str:
    rows = [("leaf", "shape", "roles", "rank", "scale", "A", "B", "trained", "of", "change")]
    for leaf in self.leaves:
      rows.append(
        (
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
      )
    share = 1 - _saved(self.trainable_parameters, self.total_parameters)
    return "\n".join(
      [
        table(rows),
        f"trainable {self.trainable_parameters:,} of {self.total_parameters:,} parameters ({share:.2%});"
        f" {_fewer(self.saved)} than the {self.adapted_parameters:,} of the leaves above",
        f"base {size(self.base_bytes)}, adapter {size(self.trainable_bytes)}, Adam's moments"
        f" {size(self.optimizer_bytes)} (full fine-tuning: {size(self.full_optimizer_bytes)})",
      ]
    )


def _saved(trained: int, of: int) -> float:
  return 1 - trained / of if of else 0.0  # leaves of size zero save nothing


def _fewer(saved: float) -> str:
  return f"{saved:.0%} fewer" if saved >= 0 else f"{-saved:.0%} more"


def table(rows: Sequence[Sequence[str]]) -> str:
  """Rows of strings as aligned columns, the first row as the head."""
  widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def size(count: float) -> str:
  """A number of bytes for people."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} TiB"


def _elements(*arrays: Any) -> int:
  return sum(math.prod(jnp.shape(array)) for array in arrays)


def _bytes(*arrays: Any) -> int:
  # Random keys have a size, too; Python numbers among the leaves have none worth counting.
  return sum(math.prod(array.shape) * array.dtype.itemsize for array in arrays if hasattr(array, "dtype"))


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
  check_adapted(tree, "summary")
  nodes, _ = _paths.flatten(tree, is_leaf=is_adapted)
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
    base_bytes=_bytes(*bases),
    trainable_bytes=_bytes(*trained),
    optimizer_bytes=_ADAM_MOMENTS * _bytes(*trained),
    full_optimizer_bytes=_ADAM_MOMENTS * _bytes(*bases),
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


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What `explain` found; prints as a table.

  Attributes:
    uses: every product of an adapted weight, and every place where one was materialised, in program order.
    unused: paths of adapted weights that the function never multiplies by.
  """

  uses: tuple[Use, ...]
  unused: tuple[str, ...]

  @property
  def materialized(self) -> tuple[Use, ...]:
    """The uses that need the weight as one array."""
    return tuple(use for use in self.uses if not use.factored)

  def __str__(self) -> str:
    rows = [("leaf", "path taken", "primitive", "source", "why")]
    for use in self.uses:
      taken = ("factored" + (f", {use.way}" if use.way else "")) if use.factored else "MATERIALISED"
      rows.append((use.path, taken, use.primitive, use.source, use.reason or "x W + s (x A) B"))
    rows.extend((path, "unused", "-", "-", "the function never multiplies by it") for path in self.unused)
    return table(rows)


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
  """Says which path each adapted weight takes through `fn`, and why, without running it.

  Args:
    fn: the function that `wrap` would wrap, unwrapped; or what `route` returned: the report then says how the rows of
      the mixed batch are computed.
    *args, **kwargs: what it would be called with; arrays may be `jax.ShapeDtypeStruct`s.

  Returns:
    An `Explanation`: fields to compute with, a table when printed.

  Raises:
    ValueError: if no argument holds an adapted weight.
  """
  record = Record("ignore", set())
  routed = recorded(fn, record)
  record.of_rows = routed is not None
  nodes, treedef = _transform.argument_leaves(args, kwargs)
  if routed is not None:
    paths = [path for bank in args if isinstance(bank, Bank) for path in bank.low_rank]
  else:
    paths = [path for path, node in nodes if isinstance(node, LoraWeight)]
  if not paths:
    raise ValueError("explain: no argument holds an adapted weight. Make one with jaxlora.adapt(params, config, key).")
  leaves, inner = jax.tree_util.tree_flatten([node for _, node in nodes])
  abstract = [k for k, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

  def traced(arrays):
    full = list(leaves)
    for k, array in zip(abstract, arrays, strict=True):
      full[k] = array
    call_args, call_kwargs = jax.tree_util.tree_unflatten(treedef, jax.tree_util.tree_unflatten(inner, full))
    if routed is not None:
      out = routed(*call_args, **call_kwargs)
    else:
      out = _transform.call(fn, record, None, call_args, call_kwargs)
    return [leaf for leaf in jax.tree_util.tree_leaves(out) if isinstance(leaf, jax.Array)]

  jax.eval_shape(traced, [leaves[k] for k in abstract])
  used = {use.path for use in record.uses}
  return Explanation(tuple(record.uses), tuple(path for path in paths if path not in used))
