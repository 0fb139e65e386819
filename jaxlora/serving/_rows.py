"""The arguments and results of a batch, as what rows share and what each has of its own."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import path_string
from jaxlora._jax.batched_call import batched_call


class Rows:
  """The arguments of a batch, as what rows share and what each has of its own."""

  def __init__(self, args: tuple[Any, ...], axes: Any, count: int):
    nodes, self.treedef = jax.tree_util.tree_flatten_with_path(args)
    self.leaves = [leaf for _, leaf in nodes]
    self.place: dict[int, int] = {}  # leaf -> its axis of rows
    for k, ((path, leaf), axis) in enumerate(zip(nodes, _axis_of_each(axes, args, "in_axes"), strict=True)):
      if axis is None or not isinstance(leaf, (jax.Array, np.ndarray)) or leaf.ndim == 0:
        continue
      if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != count:
        raise ValueError(
          f"route: argument {path_string(path)} has shape {tuple(leaf.shape)}, expected {count} rows along axis"
          f" {axis}, one for each id. Say where its rows are, or that they share it: route(fn, in_axes=...)."
        )
      self.place[k] = axis % leaf.ndim
    self.axes = tuple(self.place.values())
    self.mapped = [self.leaves[k] for k in self.place]

  def of_one(self, mapped: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of one row, a batch of one."""
    leaves = list(self.leaves)
    for (k, axis), value in zip(self.place.items(), mapped, strict=True):
      leaves[k] = jnp.expand_dims(value, axis)
    return jax.tree.unflatten(self.treedef, leaves)


def _axis_of_each(axes: Any, tree: Any, what: str) -> list[int | None]:
  """For each leaf of a tree what a prefix of it says."""
  found: list[int | None] = []

  def note(axis: Any, part: Any) -> None:
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
      raise ValueError(f"route: {what} holds {axis!r}, expected numbers of axes, or None.")
    found.extend([axis] * len(jax.tree.leaves(part)))

  if isinstance(axes, list):
    axes = tuple(axes)
  try:
    jax.tree.map(note, axes, tree, is_leaf=lambda node: node is None)
  except (ValueError, TypeError) as error:
    if str(error).startswith("route:"):
      raise
    raise ValueError(f"route: {what}={axes!r} does not fit what it is for: {error}") from error
  return found


class Results:
  """The results of one row, and of what they make up for all."""

  def __init__(self, axes: Any):
    self.axes = axes

  def take(self, out: Any) -> list[jax.Array]:
    """One row's arrays, without the axes of size 1 that rows go along."""
    nodes, self.treedef = jax.tree_util.tree_flatten_with_path(out)
    self.leaves = [leaf for _, leaf in nodes]
    self.place: dict[int, int | None] = {}  # array -> its axis of rows; none where rows may share it
    self.varies: dict[int, Callable[[], bool]] = {}
    arrays = []
    for k, ((path, leaf), axis) in enumerate(zip(nodes, _axis_of_each(self.axes, out, "out_axes"), strict=True)):
      if not isinstance(leaf, (jax.Array, np.ndarray)):
        continue
      name = path_string(path)
      if axis is None or leaf.ndim == 0:
        self.place[k], self.varies[k] = None, _differs_by_row(leaf)
        if axis is None and self.varies[k]():
          raise ValueError(
            f"route: out_axes says that rows share the result {name}, but it differs from row to row. Name its axis."
          )
        arrays.append(jnp.asarray(leaf))
        continue
      if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != 1:
        raise ValueError(
          f"route: the result {name} of a batch of one row has shape {tuple(leaf.shape)}, expected size 1 along axis"
          f" {axis}. Say where its rows are, or that they share it: route(fn, out_axes=...)."
        )
      self.place[k] = axis % leaf.ndim
      arrays.append(jnp.squeeze(jnp.asarray(leaf), self.place[k]))
    return arrays

  def of_all(self, arrays: Sequence[jax.Array]) -> Any:
    """All rows' results, from arrays that lead with the rows."""
    leaves = list(self.leaves)
    for (k, axis), array in zip(self.place.items(), arrays, strict=True):
      if axis is not None:
        leaves[k] = jnp.moveaxis(array, 0, axis)
      else:
        leaves[k] = array if self.varies[k]() else array[0]
    return jax.tree.unflatten(self.treedef, leaves)


def _differs_by_row(value: Any) -> Callable[[], bool]:
  """Whether the `vmap` around this maps a value, or all of its rows share it."""
  seen = False

  def rule(batched: Sequence[bool], args: Sequence[jax.Array]) -> None:
    nonlocal seen
    del batched, args
    seen = True

  batched_call(lambda value: value, rule, lax.stop_gradient(value))
  return lambda: seen
