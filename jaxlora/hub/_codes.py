"""Leaves that stay codes: quantised tensors in the layouts of a tree's leaves, part by part and never in floats.

A leaf's layout only reorders elements, so that a view of a stub tells for every axis of the leaf which elements of the
tensor lie along it. Scales are laid out so with the elements of a block as one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora._base.text import listed
from jaxlora._quant.array import QuantizedArray
from jaxlora.hub._records import HubError, Source
from jaxlora.peft._nodes import Index, layer_from_torch
from jaxlora.peft._roles import KnownRoles

Read = Callable[[str], np.ndarray]


def coded_leaves(
  tensors: Mapping[str, Sequence[str]], source: Source, pattern: str | None
) -> tuple[set[str], list[str]]:
  """The leaves that stay codes, and all that is wrong with them.

  Args:
    tensors: the names of those that make each leaf, by its path.
    source: the model.
    pattern: a regex over paths; `None` for none.
  """
  if pattern is None:
    return set(), []
  asked = [path for path in tensors if re.fullmatch(pattern, path)]
  kinds = {path: {source.tensors[name].kind for name in tensors[path]} for path in asked}
  coded = {path for path, found in kinds.items() if found != {None}}
  if not coded:
    what = f"its tensors for {listed(asked)} are floats" if asked else f"leaves are {listed([*tensors])}"
    return set(), [f"codes={pattern!r} finds no codes: {what}. Leave codes= out"]
  problems = []
  for path in sorted(coded):
    names = tensors[path]
    lacking = [name for name in names if source.tensors[name].kind and source.tensors[name].codes is None]
    if lacking:
      found = source.tensors[lacking[0]].kind
      problems.append(f"{path}: {lacking[0]} is {found}, whose codes are not read here. {in_floats(path)}")
    elif len(kinds[path]) > 1:
      shown = ", ".join(sorted(str(kind or "floats") for kind in kinds[path]))
      problems.append(f"{path}: its tensors are {shown}, and one leaf has one format. {in_floats(path)}")
  return coded, problems


def in_floats(path: str) -> str:
  """The remedy for a leaf whose codes have no place in it."""
  return f"Read this leaf in floats: codes=r'(?!{re.escape(path)}$).*'"


class CodedLeaf(NamedTuple):
  """A leaf of a tree that is to be codes.

  Attributes:
    path, shape, dtype: of the leaf.
    names: the tensor of each index along its stacked axes.
    known: roles and stacks of the tree.
    simple: whether these are tensors of the file; else they are made of rows of such.
  """

  path: str
  shape: tuple[int, ...]
  dtype: Any
  names: Mapping[Index, str]
  known: KnownRoles
  simple: bool


def coded_value(leaf: CodedLeaf, source: Source, layers: Callable[[Read], Iterator[Mapping[str, np.ndarray]]]) -> Any:
  """A leaf as a quantised array of NumPy arrays.

  Args:
    leaf: what it is made of.
    source: the model.
    layers: from how a tensor is read to those of one layer after the other, by the names that the leaf has for them.

  Raises:
    HubError: where blocks do not fit the axes of the leaf, or the layers of a stack differ.
  """
  index_of = {name: index for index, name in leaf.names.items()}
  stacked = len(next(iter(leaf.names)))
  axes = leaf.known.stacked_axes(leaf.path, stacked)
  whole: list[np.ndarray] = []
  form: Any = None
  filled, reader = 0, _Reader(source, leaf)
  for arrays in layers(reader.rows_of):
    for name in index_of.keys() & arrays.keys():
      parts, own = jax.tree.flatten(_laid_out(reader.node(name, arrays[name]), leaf, axes, name))
      whole = whole or [_empty(part, axes, leaf.shape) for part in parts]
      views = [np.moveaxis(value, axes, range(stacked)) for value in whole]
      new = [(part.shape, part.dtype) for part in parts]
      if own != (form or own) or new != [(view.shape[stacked:], view.dtype) for view in views]:
        raise HubError(f"hub.load: {leaf.path}: {name} has blocks of another form than others. {in_floats(leaf.path)}")
      form = own
      for view, part in zip(views, parts, strict=True):
        view[index_of[name]] = part
      filled += 1
  assert filled == len(leaf.names)
  return form.unflatten(whole)


def _empty(part: np.ndarray, axes: Sequence[int], shape: Sequence[int]) -> np.ndarray:
  """A part for all layers, made for that of one."""
  sizes = iter(part.shape)
  return np.empty([size if d in axes else next(sizes) for d, size in enumerate(shape)], part.dtype)


class _Reader:
  """Reads codes of the tensors of a leaf; where it takes rows of several, a number for each row tells which."""

  def __init__(self, source: Source, leaf: CodedLeaf):
    self.source, self.leaf, self.path = source, leaf, leaf.path
    self.first: dict[str, int] = {}  # the number of the first row of a tensor

  def rows_of(self, name: str) -> np.ndarray:
    """An array of the tensor's shape, with the number of its row in place of each element."""
    shape = self.source.tensors[name].shape
    start = self.first.setdefault(name, sum(self.source.tensors[other].shape[0] for other in self.first))
    rows = np.arange(start, start + shape[0], dtype=np.int32)
    return np.broadcast_to(rows.reshape(-1, *[1] * (len(shape) - 1)), shape)

  def node(self, name: str, rows: np.ndarray) -> Any:
    """A tensor of the leaf: of the file, or put together of rows of such."""
    if self.leaf.simple:
      return self._read(name)
    column = rows.reshape(len(rows), -1)
    if not (column == column[:, :1]).all():
      raise HubError(f"hub.load: {self.path}: its part of a module is no rows of it. {in_floats(self.path)}")
    numbers = column[:, 0]
    starts = {other: start for other, start in self.first.items() if self._has(other, numbers)}
    nodes = [self._read(other) for other in starts]
    offsets = np.cumsum([0, *(self.source.tensors[other].shape[0] for other in starts)])
    taken = numbers.copy()
    for start, offset, node in zip(starts.values(), offsets, nodes, strict=False):
      own = (numbers >= start) & (numbers < start + node.shape[0])
      taken[own] = numbers[own] - start + offset
    try:
      return jax.tree.map(lambda *parts: _rows(parts, taken, len(numbers)), *nodes)
    except ValueError as error:
      raise HubError(f"hub.load: {self.path}: {listed([*starts])}: {error}. {in_floats(self.path)}") from error

  def _has(self, name: str, numbers: np.ndarray) -> bool:
    start = self.first[name]
    return bool(((numbers >= start) & (numbers < start + self.source.tensors[name].shape[0])).any())

  def _read(self, name: str) -> Any:
    read = self.source.tensors[name].codes
    assert read is not None
    try:
      node = read(self.leaf.dtype, f"hub.load: {self.path}: {name}")
    except ValueError as error:
      raise HubError(f"{error} {in_floats(self.path)}") from error
    if not isinstance(node, QuantizedArray):
      raise HubError(f"hub.load: {self.path}: {name} has its blocks in another order. {in_floats(self.path)}")
    return node


def _rows(parts: Sequence[np.ndarray], taken: np.ndarray, count: int) -> np.ndarray:
  """Some rows of arrays that lie one after the other."""
  if any(part.shape[0] == 1 for part in parts) and count > 1:
    raise ValueError("blocks run over rows")
  return np.concatenate(parts)[taken]


def _laid_out(node: Any, leaf: CodedLeaf, stacked: Sequence[int], name: str) -> Any:
  """A tensor's parts in the layout of a layer of the leaf."""
  stub = np.empty(node.shape, np.int8)  # never written or read: its pages are not there
  layer = [size for d, size in enumerate(leaf.shape) if d not in stacked]
  view = layer_from_torch(leaf.path, leaf.shape, layer, name, stub, leaf.known)
  if not np.may_share_memory(view, stub):
    raise HubError(f"hub.load: {leaf.path}: {name} is laid out in no way that codes follow. {in_floats(leaf.path)}")
  try:
    return jax.tree.map(lambda part: _part_laid_out(part, node.shape, view), node)
  except ValueError as error:
    raise HubError(f"hub.load: {leaf.path}: {name}: {error}. {in_floats(leaf.path)}") from error


def _part_laid_out(part: np.ndarray, whole: Sequence[int], view: np.ndarray) -> np.ndarray:
  """Codes, or scales of blocks of them, in the order of the axes that a view of the tensor has.

  Args:
    part: with the axes of the tensor; the size of each divides the tensor's.
    whole: the shape of the tensor.
    view: the tensor's elements in the layout of the leaf, a byte each.

  Raises:
    ValueError: where a block is no range along the axes of the leaf.
  """
  sizes, order = list(view.shape), sorted(range(view.ndim), key=lambda d: -view.strides[d])
  span = 1  # elements from one to the next along the tensor's axis
  for n, k in zip(reversed(whole), reversed(part.shape), strict=True):
    block = n // k
    for d in reversed(order):
      if sizes[d] > 1 and span <= view.strides[d] < span * n:
        if block % sizes[d] == 0:
          sizes[d], block = 1, block // sizes[d]
        elif sizes[d] % block == 0:
          sizes[d], block = sizes[d] // block, 1
        else:
          raise ValueError(f"blocks of {n // k} elements do not fit its axes {view.shape}")
    span *= n
  return part.reshape([sizes[d] for d in order]).transpose(np.argsort(order))
