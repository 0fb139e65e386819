"""Flax's msgpack files (`flax_model.msgpack`): where each leaf's bytes are, without reading them.

A nested map of names ends in arrays, each an extension of type 1 that holds [shape, dtype, bytes]. An array of more
than 2^30 bytes is a map of pieces, `__msgpack_chunked_array__`.

Source: flax.serialization, `_ndarray_to_bytes` and `_chunk`.
"""

from collections.abc import Iterator
import dataclasses
import mmap
from pathlib import Path
import struct
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._base.files import StoredTensor, code_of
from jaxlora._files.format import FormatError

_ARRAY = 1  # the type of Flax's extension for arrays
_CHUNKED = "__msgpack_chunked_array__"
_DEEPEST = 100


@dataclasses.dataclass(frozen=True)
class ChunkedTensor:
  """A tensor whose bytes are in several places of a file, one after the other."""

  file: Path
  code: str
  shape: tuple[int, ...]
  pieces: tuple[StoredTensor, ...]

  @property
  def dtype(self) -> np.dtype | None:
    return self.pieces[0].dtype

  @property
  def nbytes(self) -> int:
    return sum(piece.nbytes for piece in self.pieces)

  def read(self) -> np.ndarray:
    """Its values, in memory."""
    return np.concatenate([piece.read().reshape(-1) for piece in self.pieces]).reshape(self.shape)


@dataclasses.dataclass(frozen=True)
class _Item:
  """The head of one value: its kind, its length or value, and where its content begins."""

  kind: str
  value: Any
  begin: int


_SIZED = {  # first byte -> kind, format of the length
  0xC4: ("bytes", ">B"), 0xC5: ("bytes", ">H"), 0xC6: ("bytes", ">I"),
  0xC7: ("ext", ">B"), 0xC8: ("ext", ">H"), 0xC9: ("ext", ">I"),
  0xD9: ("str", ">B"), 0xDA: ("str", ">H"), 0xDB: ("str", ">I"),
  0xDC: ("list", ">H"), 0xDD: ("list", ">I"), 0xDE: ("map", ">H"), 0xDF: ("map", ">I"),
}  # fmt: skip

_NUMBERS = {
  0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q",
  0xD0: ">b", 0xD1: ">h", 0xD2: ">i", 0xD3: ">q",
}  # fmt: skip

_CONSTANTS = {0xC0: None, 0xC2: False, 0xC3: True}


def msgpack_tensors(file: Path) -> dict[str, StoredTensor | ChunkedTensor]:
  """The arrays of a file by path, joined by "/", in their order.

  Raises:
    FormatError: where it is no file of Flax's.
    OSError: where it cannot be read.
  """
  if file.stat().st_size == 0:
    raise FormatError(f"{file}: is empty")
  with open(file, "rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
    try:
      found = dict(_Scan(file, data).tensors(0, ()))
    except (struct.error, IndexError, UnicodeDecodeError, ValueError, KeyError, TypeError) as error:
      raise FormatError(f"{file}: cannot be read as Flax's msgpack ({type(error).__name__}: {error})") from error
  if not found:
    raise FormatError(f"{file}: holds no arrays")
  return found


class _Scan:
  """A walk over the heads of a file's values."""

  def __init__(self, file: Path, data: mmap.mmap):
    self.file, self.data = file, data

  def item(self, at: int) -> _Item:
    """The head of the value at a position."""
    first = self.data[at]
    if first in _SIZED:
      kind, form = _SIZED[first]
      (value,) = struct.unpack_from(form, self.data, at + 1)
      return _Item(kind, value, at + 1 + struct.calcsize(form))
    if first in _NUMBERS:
      (value,) = struct.unpack_from(_NUMBERS[first], self.data, at + 1)
      return _Item("number", value, at + 1 + struct.calcsize(_NUMBERS[first]))
    if first in _CONSTANTS:
      return _Item("constant", _CONSTANTS[first], at + 1)
    if 0xD4 <= first <= 0xD8:
      return _Item("ext", 1 << (first - 0xD4), at + 1)
    for mask, low, kind in ((0xE0, 0xA0, "str"), (0xF0, 0x90, "list"), (0xF0, 0x80, "map")):
      if first & mask == low:
        return _Item(kind, first & ~mask & 0xFF, at + 1)
    if first < 0x80 or first >= 0xE0:
      return _Item("number", first if first < 0x80 else first - 256, at + 1)
    raise ValueError(f"byte {first:#x} at {at}")

  def simple(self, at: int) -> tuple[Any, int]:
    """A string, number, constant or list of such, and the position behind it."""
    item = self.item(at)
    if item.kind == "str":
      return self.data[item.begin : item.begin + item.value].decode("utf-8"), item.begin + item.value
    if item.kind == "list":
      values, at = [], item.begin
      for _ in range(item.value):
        value, at = self.simple(at)
        values.append(value)
      return values, at
    if item.kind in ("number", "constant"):
      return item.value, item.begin
    raise ValueError(f"a {item.kind} at {at}")

  def end(self, at: int) -> int:
    """The position behind the value at a position."""
    item = self.item(at)
    if item.kind in ("str", "bytes"):
      return int(item.begin + item.value)
    if item.kind == "ext":
      return int(item.begin + 1 + item.value)
    position = item.begin
    for _ in range(item.value * (2 if item.kind == "map" else 1) if item.kind in ("map", "list") else 0):
      position = self.end(position)
    return position

  def tensors(self, at: int, path: tuple[str, ...]) -> Iterator[tuple[str, StoredTensor | ChunkedTensor]]:
    """The arrays below the value at a position."""
    item = self.item(at)
    if item.kind == "ext" and self.data[item.begin] == _ARRAY:
      yield "/".join(path), self.array(item.begin + 1)
    if item.kind != "map" or len(path) > _DEEPEST:
      return
    entries, position = {}, item.begin
    for _ in range(item.value):
      name, begin = self.simple(position)
      entries[str(name)] = begin
      position = self.end(begin)
    if _CHUNKED in entries:
      yield "/".join(path), self.chunked(entries)
      return
    for name, begin in entries.items():
      yield from self.tensors(begin, (*path, name))

  def array(self, at: int) -> StoredTensor:
    """The array whose [shape, dtype, bytes] is at a position."""
    head = self.item(at)
    shape, at = self.simple(head.begin)
    dtype, at = self.simple(at)
    content = self.item(at)
    code = code_of(jnp.dtype("bfloat16" if dtype == "V2" else dtype))
    stored = StoredTensor(self.file, code, tuple(shape), content.begin, content.begin + content.value)
    assert stored.dtype is not None
    if (head.kind, head.value, content.kind) != ("list", 3, "bytes") or stored.end > len(self.data):
      raise ValueError(f"no array at {at}")
    if stored.nbytes != int(np.prod(shape, dtype=np.int64)) * stored.dtype.itemsize:
      raise ValueError(f"{stored.nbytes} bytes for {code}{shape}")
    return stored

  def chunked(self, entries: dict[str, int]) -> ChunkedTensor:
    """The array whose pieces a map holds."""
    shape = [self.simple(begin)[0] for begin in self._by_number(entries["shape"])]
    pieces = [self.array(self.item(begin).begin + 1) for begin in self._by_number(entries["chunks"])]
    if not pieces or sum(piece.nbytes for piece in pieces) != np.prod(shape) * pieces[0].dtype.itemsize:  # type: ignore[union-attr]
      raise ValueError(f"pieces that are no array of shape {shape}")
    return ChunkedTensor(self.file, pieces[0].code, tuple(shape), tuple(pieces))

  def _by_number(self, at: int) -> list[int]:
    """The positions of the values of a map from numbers, or of a list, in their order."""
    item, found, position = self.item(at), {}, self.item(at).begin
    for k in range(item.value):
      if item.kind == "map":
        name, position = self.simple(position)
      found[int(name) if item.kind == "map" else k] = position
      position = self.end(position)
    return [found[k] for k in sorted(found)]
