"""Models in safetensors files: what they hold, and copies with some tensors changed, one tensor in memory at a time."""

from collections.abc import Callable, Mapping
import dataclasses
import json
import os
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxlora._base.files import StoredTensor, replacing, stored_tensors

INDEX = "model.safetensors.index.json"

_PIECE = 1 << 22  # bytes copied at a time

Change = Callable[[np.ndarray], np.ndarray]


class TensorFileError(ValueError):
  """A safetensors file, or an index of several, that cannot be read or written."""


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """A model in one file or several.

  Attributes:
    tensors: by name, in the order of the files.
    files: the files; with `index`, those that it names.
    index: the index file, where there is one.
  """

  tensors: dict[str, StoredTensor]
  files: tuple[Path, ...]
  index: Path | None

  @property
  def size(self) -> int:
    return sum(tensor.nbytes for tensor in self.tensors.values())


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
  indexed = _weight_map(index) if index is not None else {}
  files = _files_of_index(index, indexed) if index is not None else (place,)
  tensors: dict[str, StoredTensor] = {}
  for file in files:
    for name, tensor in _tensors_of_file(file).items():
      if name in tensors:
        raise TensorFileError(f"{file}: {name!r} is in {tensors[name].file.name}, too.")
      tensors[name] = tensor
  if lost := sorted(set(indexed) - set(tensors)):
    raise TensorFileError(f"{index}: names {lost[0]!r}, which none of its files holds ({len(lost)} such).")
  return TensorFiles(tensors, files, index)


def _weight_map(index: Path) -> dict[str, str]:
  """The file of each tensor, by an index."""
  try:
    found = json.loads(index.read_text("utf-8"))["weight_map"]
  except (OSError, ValueError, KeyError, TypeError) as error:
    raise TensorFileError(f"{index}: cannot be read as an index: {type(error).__name__}: {error}") from error
  if not isinstance(found, dict) or not all(isinstance(file, str) for file in found.values()):
    raise TensorFileError(f"{index}: expected weight_map to map names to files.")
  return found


def _files_of_index(index: Path, indexed: Mapping[str, str]) -> tuple[Path, ...]:
  names = sorted(set(indexed.values()))
  if outside := [name for name in names if Path(name).name != name]:
    raise TensorFileError(f"{index}: names {outside[0]!r}; expected files in its own folder.")
  return tuple(index.parent / name for name in names)


def _tensors_of_file(file: Path) -> dict[str, StoredTensor]:
  import safetensors  # an extra: jaxlora[peft]

  try:
    return stored_tensors(file)
  except (OSError, ValueError, safetensors.SafetensorError) as error:
    raise TensorFileError(f"{file}: cannot be read as safetensors: {type(error).__name__}: {error}") from error


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
  if source.index is not None and target.exists():
    raise TensorFileError(f"{target}: exists; expected a new folder, as the base has several files.")
  try:
    with replacing(target) as new:
      if source.index is None:
        _rewrite_file(source, source.files[0], new, changes, progress)
        return
      new.mkdir()
      for file in source.files:
        _rewrite_file(source, file, new / file.name, changes, progress)
      (new / INDEX).write_bytes(source.index.read_bytes())
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
        value = np.ascontiguousarray(changes[name](tensor.read()))
        if (value.dtype, value.shape) != (tensor.dtype, tensor.shape):
          raise TensorFileError(f"{name}: became {value.dtype}{value.shape}, was {tensor.dtype}{tensor.shape}.")
        new.write(value.reshape(-1).view(np.uint8).data)
        progress(tensor.nbytes)
        position = tensor.end
    _copy(old, new, position, os.fstat(old.fileno()).st_size, progress)


def _copy(old: BinaryIO, new: BinaryIO, begin: int, end: int, progress: Callable[[int], None]) -> None:
  """Copies a range of bytes to the end of another file."""
  old.seek(begin)
  while begin < end:
    piece = old.read(min(_PIECE, end - begin))
    if not piece:
      raise OSError("the file became shorter while it was read")
    new.write(piece)
    progress(len(piece))
    begin += len(piece)
