"""Safetensors files tensor by tensor: what they hold, and copies with some tensors changed, in bounded memory."""

from collections.abc import Callable, Iterator, Mapping
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import jax.numpy as jnp
import numpy as np

INDEX = "model.safetensors.index.json"

_PIECE = 1 << 22  # bytes copied at a time


_DTYPES = {
  "F64": "float64",
  "F32": "float32",
  "F16": "float16",
  "BF16": "bfloat16",
  "F8_E4M3": "float8_e4m3fn",
  "F8_E5M2": "float8_e5m2",
  "I64": "int64",
  "I32": "int32",
  "I16": "int16",
  "I8": "int8",
  "U64": "uint64",
  "U32": "uint32",
  "U16": "uint16",
  "U8": "uint8",
  "BOOL": "bool",
}


Change = Callable[[np.ndarray], np.ndarray]


class TensorFileError(ValueError):
  """A safetensors file, or an index of several, that cannot be read or written."""


@dataclasses.dataclass(frozen=True)
class Tensor:
  """Where a tensor is.

  Attributes:
    file: the file.
    dtype: as NumPy has it; `None` where it has none.
    shape: its shape.
    begin, end: its bytes in the file.
  """

  file: Path
  dtype: Any
  shape: tuple[int, ...]
  begin: int
  end: int


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """A model in one file or several.

  Attributes:
    tensors: by name, in the order of the files.
    files: the files; with `index`, those that it names.
    index: the index file, where there is one.
  """

  tensors: dict[str, Tensor]
  files: tuple[Path, ...]
  index: Path | None

  @property
  def size(self) -> int:
    return sum(tensor.end - tensor.begin for tensor in self.tensors.values())


def open_files(path: str | os.PathLike[str]) -> TensorFiles:
  """Reads the headers of a safetensors file, of the files of an index, or of a folder that holds either.

  Raises:
    TensorFileError: naming the file and what is wrong with it.
  """
  place = Path(path)
  if place.is_dir():
    single = sorted(place.glob("*.safetensors"))
    if not (place / INDEX).exists() and len(single) != 1:
      raise TensorFileError(f"{place}: expected {INDEX} or one .safetensors file, found {len(single)} files.")
    place = place / INDEX if (place / INDEX).exists() else single[0]
  index = place if place.name.endswith(".json") else None
  files = _indexed(place) if index is not None else (place,)
  tensors: dict[str, Tensor] = {}
  for file in files:
    for name, tensor in _header(file):
      if name in tensors:
        raise TensorFileError(f"{file}: {name!r} is in {tensors[name].file.name}, too.")
      tensors[name] = tensor
  if index is not None and (lost := sorted(set(_weight_map(index)) - set(tensors))):
    raise TensorFileError(f"{index}: names {lost[0]!r}, which none of its files holds ({len(lost)} such).")
  return TensorFiles(tensors, files, index)


def _weight_map(index: Path) -> dict[str, str]:
  try:
    found = json.loads(index.read_text("utf-8"))["weight_map"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise TensorFileError(f"{index}: cannot be read as an index: {type(error).__name__}: {error}") from error
  if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
    raise TensorFileError(f"{index}: expected weight_map to map names to files.")
  return found


def _indexed(index: Path) -> tuple[Path, ...]:
  names = sorted(set(_weight_map(index).values()))
  if outside := [name for name in names if Path(name).name != name]:
    raise TensorFileError(f"{index}: names {outside[0]!r}; expected files in its own folder.")
  return tuple(index.parent / name for name in names)


def _header(file: Path) -> Iterator[tuple[str, Tensor]]:
  """The tensors of a file, once the safetensors library has found it sound."""
  import safetensors  # an extra: jaxlora[peft]

  try:
    with safetensors.safe_open(file, framework="np"):
      pass
    with open(file, "rb") as stream:
      length = int.from_bytes(stream.read(8), "little")
      header = json.loads(stream.read(length))
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise TensorFileError(f"{file}: cannot be read as safetensors: {type(error).__name__}: {error}") from error
  entries = [(name, about) for name, about in header.items() if name != "__metadata__"]
  for name, about in sorted(entries, key=lambda item: item[1]["data_offsets"]):
    begin, end = (8 + length + offset for offset in about["data_offsets"])
    dtype = _DTYPES.get(about["dtype"])
    yield name, Tensor(file, None if dtype is None else jnp.dtype(dtype), tuple(about["shape"]), begin, end)


def read(tensor: Tensor) -> np.ndarray:
  """The values of one tensor."""
  with open(tensor.file, "rb") as stream:
    return _array(stream, tensor)


def _array(stream: BinaryIO, tensor: Tensor) -> np.ndarray:
  stream.seek(tensor.begin)
  return np.frombuffer(stream.read(tensor.end - tensor.begin), tensor.dtype).reshape(tensor.shape)


def rewrite(source: TensorFiles, target: Path, changes: Mapping[str, Change], progress: Callable[[int], None]) -> None:
  """Copies a model, with some tensors changed and all in their places: one tensor in memory at a time.

  A file appears at `target` once it is complete, and replaces one that was there; with an index `target` is a folder.

  Args:
    source: the model.
    target: a file, or a new folder for a model with an index.
    changes: functions of the values by name, that keep shape and dtype.
    progress: is told the number of bytes done.

  Raises:
    TensorFileError: where the copy cannot be written; nothing is left of it then.
  """
  if source.index is None:
    _replace(target, lambda new: _rewrite_file(source, source.files[0], new, changes, progress))
    return
  if target.exists():
    raise TensorFileError(f"{target}: exists; expected a new folder, as the base has several files.")

  def write(folder: Path) -> None:
    folder.mkdir()
    for file in source.files:
      _rewrite_file(source, file, folder / file.name, changes, progress)
    assert source.index is not None
    (folder / INDEX).write_bytes(source.index.read_bytes())

  _replace(target, write)


def _replace(target: Path, write: Callable[[Path], None]) -> None:
  """Has the target written beside its place, and puts it there."""
  new = target.with_name(f"{target.name}.{os.getpid()}.partial")
  try:
    try:
      target.parent.mkdir(parents=True, exist_ok=True)
      write(new)
      os.replace(new, target)
    finally:
      for leftover in (*(new.iterdir() if new.is_dir() else ()), new):
        if leftover.is_dir():
          leftover.rmdir()
        elif leftover.exists():
          leftover.unlink()
  except OSError as error:
    raise TensorFileError(f"{target}: cannot be written: {error}") from error


def _rewrite_file(
  source: TensorFiles, file: Path, target: Path, changes: Mapping[str, Change], progress: Callable[[int], None]
) -> None:
  with open(file, "rb") as old, open(target, "wb") as new:
    position = 0
    for name, tensor in source.tensors.items():
      if tensor.file == file and name in changes:
        _copy(old, new, position, tensor.begin, progress)
        value = np.ascontiguousarray(changes[name](_array(old, tensor)))
        if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
          raise TensorFileError(f"{name}: became {value.dtype}{value.shape}, was {tensor.dtype}{tensor.shape}.")
        new.write(value.reshape(-1).view(np.uint8).data)
        progress(tensor.end - tensor.begin)
        position = tensor.end
    _copy(old, new, position, os.fstat(old.fileno()).st_size, progress)
    new.flush()
    os.fsync(new.fileno())


def _copy(old: BinaryIO, new: BinaryIO, begin: int, end: int, progress: Callable[[int], None]) -> None:
  old.seek(begin)
  while begin < end:
    piece = old.read(min(_PIECE, end - begin))
    if not piece:
      raise OSError("the file became shorter while it was read")
    new.write(piece)
    progress(len(piece))
    begin += len(piece)
