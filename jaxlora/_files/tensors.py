"""Models in safetensors files: the files of a folder, and what they hold. Headers alone are read."""

from collections.abc import Mapping
import dataclasses
import json
import os
from pathlib import Path
import re
from typing import Any, Protocol

import numpy as np

from jaxlora._base.files import StoredTensor, stored_tensors
from jaxlora._base.text import listed

INDEX = ".safetensors.index.json"

_STEMS = ("model", "diffusion_pytorch_model")  # how libraries call the file that they load from a folder


class TensorFileError(ValueError):
  """A safetensors file, or an index of several, that cannot be read or written."""


class Tensor(Protocol):
  """A tensor of a model, that has not been read."""

  @property
  def file(self) -> Path: ...
  @property
  def code(self) -> str: ...
  @property
  def shape(self) -> tuple[int, ...]: ...
  @property
  def dtype(self) -> np.dtype | None: ...
  @property
  def nbytes(self) -> int: ...
  def read(self) -> np.ndarray: ...


@dataclasses.dataclass(frozen=True)
class TensorFiles:
  """A model in one file or several.

  Attributes:
    tensors: by name, in the order of the files.
    files: the files; with `index`, those that it names.
    index: the index file, where there is one.
    folder: the folder of the model, where it was given as one, or by an index in it.
    form: `"safetensors"`, `"msgpack"` or `"orbax"`.
  """

  tensors: Mapping[str, Tensor]
  files: tuple[Path, ...]
  index: Path | None
  folder: Path | None = None
  form: str = "safetensors"

  @property
  def size(self) -> int:
    return sum(tensor.nbytes for tensor in self.tensors.values())

  @property
  def config(self) -> dict[str, Any]:
    """The config.json beside the files; empty where there is none."""
    if self.form == "orbax":
      return {}
    path = self.files[0].parent / "config.json"
    try:
      found = json.loads(path.read_bytes()) if path.is_file() else {}
    except ValueError as error:
      raise TensorFileError(f"{path}: cannot be read as JSON: {error}") from error
    return found if isinstance(found, dict) else {}

  def read(self, name: str) -> np.ndarray:
    """The values of a tensor."""
    return self.tensors[name].read()


def open_files(path: str | os.PathLike[str]) -> TensorFiles:
  """Reads the headers of a safetensors file, of the files of an index, or of a folder that holds either.

  Raises:
    TensorFileError: naming the file and what is wrong with it.
  """
  place = Path(path)
  folder = place if place.is_dir() else None
  if folder is not None:
    found = _files_of_folder(folder)
    if isinstance(found, tuple):
      return TensorFiles(_tensors_of_files(found), found, None, folder)
    place = found
  index = place if place.name.endswith(".json") else None
  indexed = _weight_map(index) if index is not None else {}
  files = _files_of_index(index, indexed) if index is not None else (place,)
  tensors = _tensors_of_files(files)
  if lost := sorted(set(indexed) - set(tensors)):
    raise TensorFileError(f"{index}: names {lost[0]!r}, which none of its files holds ({len(lost)} such).")
  return TensorFiles(tensors, files, index, folder if index is None else index.parent)


def _files_of_folder(folder: Path) -> Path | tuple[Path, ...]:
  """The model of a folder: the index or the file that libraries load, or all the files of a set without an index.

  Beside them may be copies under other names (`consolidated.safetensors`, `model.fp16.safetensors`).
  """
  indexes = sorted(folder.glob(f"*{INDEX}"))
  single = sorted(file for file in folder.glob("*.safetensors") if not _part_of(file))
  parts = sorted(file for file in folder.glob("*.safetensors") if _part_of(file))
  usual = [file for stem in _STEMS for file in (folder / f"{stem}{INDEX}", folder / f"{stem}.safetensors")]
  found = [file for file in usual if file.is_file()]
  if len(found) == 1:
    return found[0]
  other = [file for file in (*indexes, *single) if not file.name.startswith("consolidated")] or [*indexes, *single]
  if not found and len(other) == 1:
    return other[0]
  if not found and not other and parts:
    return _complete(folder, parts)
  inner = sorted(file.parent.name for file in folder.glob("*/*.safetensors"))
  raise TensorFileError(
    f"{folder}: expected model.safetensors, {_STEMS[0]}{INDEX} or one .safetensors file, found"
    f" {listed([file.name for file in found or other]) or 'none'}."
    + (" Pass the one that is meant." if found or other else "")
    + (f" Its folders have some: pass {folder / inner[0]}, for instance." if inner and not other else "")
  )


_PART = re.compile(r"(.+)-(\d+)-of-(\d+)\.safetensors")


def _part_of(file: Path) -> re.Match[str] | None:
  """Whether a file is one of a set: its stem, its number, and how many there are."""
  return _PART.fullmatch(file.name)


def _complete(folder: Path, parts: list[Path]) -> tuple[Path, ...]:
  """The files of a set that has no index, once all are there."""
  matches = [match for file in parts if (match := _part_of(file))]
  sets = {(match[1], int(match[3])) for match in matches}
  if (
    len(sets) > 1
    or {int(match[2]) for match in matches} != set(range(1, len(parts) + 1))
    or sets.pop()[1] != len(parts)
  ):
    raise TensorFileError(
      f"{folder}: expected an index, or all files of one set; found {listed([f.name for f in parts])}."
    )
  return tuple(parts)


def _tensors_of_files(files: tuple[Path, ...]) -> dict[str, StoredTensor]:
  tensors: dict[str, StoredTensor] = {}
  for file in files:
    for name, tensor in _tensors_of_file(file).items():
      if name in tensors:
        raise TensorFileError(f"{file}: {name!r} is in {tensors[name].file.name}, too.")
      tensors[name] = tensor
  return tensors


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
