"""Copies of models with some tensors changed, added or left out: one tensor in memory at a time."""

from collections.abc import Callable, Collection, Mapping, Sequence
import contextlib
import dataclasses
import json
from pathlib import Path
from typing import BinaryIO

import numpy as np

from jaxlora._base.files import Spec, StoredTensor, code_of, nbytes_of, new_header, raw_bytes
from jaxlora._files.tensors import TensorFileError, TensorFiles

_PIECE = 1 << 22  # bytes copied at a time

Progress = Callable[[int], object]


@dataclasses.dataclass(frozen=True)
class Edit:
  """Tensors that are computed together.

  Attributes:
    outputs: what is written, by name: tensors of the model, or new ones.
    compute: their values.
    removed: tensors of the model that are left out.
    beside: the tensor of the model in whose file new ones go.
  """

  outputs: Mapping[str, Spec]
  compute: Callable[[], Mapping[str, np.ndarray]]
  removed: tuple[str, ...] = ()
  beside: str | None = None


@dataclasses.dataclass(frozen=True)
class _Layout:
  """A file that is written: its header, and where each tensor begins."""

  name: str
  header: bytes
  sizes: Mapping[str, int]
  begins: Mapping[str, int]
  same: bool  # whether its tensors are those of the model's own file, in shapes and dtypes


def write_safetensors(
  source: TensorFiles, new: Path, edits: Sequence[Edit], progress: Progress, *, folder: bool
) -> None:
  """Writes safetensors: the file `new`, or into that folder.

  A file whose tensors keep their shapes and dtypes keeps its header, byte for byte.
  """
  layouts = _layouts(source, edits)
  edited = {name for edit in edits for name in edit.outputs}
  places: dict[str, tuple[BinaryIO, int]] = {}
  with contextlib.ExitStack() as stack:
    for layout in layouts:
      stream = stack.enter_context(open(new / layout.name if folder else new, "wb"))
      stream.write(layout.header)
      for name, begin in layout.begins.items():
        places[name] = stream, begin
        if name not in edited:
          _copy(source, name, stream, begin, progress)
    for edit in edits:
      _write_edit(edit, places, progress)
  if source.index is not None:
    (new / source.index.name).write_bytes(_index(source.index, layouts))


def _write_edit(edit: Edit, places: Mapping[str, tuple[BinaryIO, int]], progress: Progress) -> None:
  for name, value in values_of(edit).items():
    stream, begin = places[name]
    stream.seek(begin)
    stream.write(raw_bytes(value))
    progress(value.nbytes)


def values_of(edit: Edit) -> dict[str, np.ndarray]:
  """The values of an edit, once they are what it says."""
  values = edit.compute()
  for name, (code, shape) in edit.outputs.items():
    value = values[name]
    if (code_of(value.dtype), value.shape) != (code, shape):
      raise TensorFileError(f"{name}: became {value.dtype}{value.shape}, expected {code}{shape}.")
  return {name: values[name] for name in edit.outputs}


def _layouts(source: TensorFiles, edits: Sequence[Edit]) -> list[_Layout]:
  """The files that are written: those of the model, with what is new and without what is removed."""
  removed = {name for edit in edits for name in edit.removed}
  changed = {name: spec for edit in edits for name, spec in edit.outputs.items()}
  file_of = {name: tensor.file for name, tensor in source.tensors.items()}
  file_of |= {
    name: file_of[edit.beside] for edit in edits if edit.beside for name in edit.outputs if name not in file_of
  }
  if source.form != "safetensors":
    return [_one_layout(source, changed, removed)]
  layouts = []
  for file in source.files:
    old = {name: (t.code, t.shape) for name, t in source.tensors.items() if t.file == file}
    names = [name for name, home in file_of.items() if home == file and name not in removed]
    specs = {name: changed.get(name) or old[name] for name in names}
    sizes = {name: nbytes_of(*changed[name]) if name in changed else source.tensors[name].nbytes for name in names}
    if specs == old:
      header = _old_header(file)
      begins = {name: source.tensors[name].begin for name in old}  # type: ignore[attr-defined]
    else:
      header, begins = new_header(specs, _metadata(file), sizes)
    layouts.append(_Layout(file.name, header, sizes, begins, specs == old))
  return layouts


def _one_layout(source: TensorFiles, changed: Mapping[str, Spec], removed: Collection[str]) -> _Layout:
  """The one safetensors file of a model in another format."""
  specs = {name: (t.code, t.shape) for name, t in source.tensors.items() if name not in removed} | dict(changed)
  sizes = {name: nbytes_of(*spec) for name, spec in specs.items()}
  header, begins = new_header(specs, {"format": "flax"}, sizes)
  return _Layout("model.safetensors", header, sizes, begins, False)


def _old_header(file: Path) -> bytes:
  with open(file, "rb") as stream:
    length = stream.read(8)
    return length + stream.read(int.from_bytes(length, "little"))


def _metadata(file: Path) -> dict[str, str]:
  found = json.loads(_old_header(file)[8:]).get("__metadata__")
  return found if isinstance(found, dict) else {}


def _copy(source: TensorFiles, name: str, new: BinaryIO, begin: int, progress: Progress) -> None:
  """Copies a tensor's bytes."""
  tensor = source.tensors[name]
  new.seek(begin)
  if not isinstance(tensor, StoredTensor):
    new.write(raw_bytes(tensor.read()))
    progress(tensor.nbytes)
    return
  with open(tensor.file, "rb") as old:
    old.seek(tensor.begin)
    copy_bytes(old, new, tensor.nbytes, progress)


def copy_bytes(old: BinaryIO, new: BinaryIO, count: int, progress: Progress) -> None:
  """Copies so many bytes from where one file is to where another is."""
  while count:
    piece = old.read(min(_PIECE, count))
    if not piece:
      raise OSError("the file became shorter while it was read")
    new.write(piece)
    progress(len(piece))
    count -= len(piece)


def _index(index: Path, layouts: Sequence[_Layout]) -> bytes:
  """The index of the new files; the old one, byte for byte, where nothing in it has changed."""
  old = index.read_bytes()
  if all(layout.same for layout in layouts):
    return old
  found = json.loads(old)
  weight_map = {name: layout.name for layout in layouts for name in layout.sizes}
  metadata = found.get("metadata") if isinstance(found.get("metadata"), dict) else {}
  metadata = {**metadata, "total_size": sum(sum(layout.sizes.values()) for layout in layouts)}
  return (json.dumps({**found, "metadata": metadata, "weight_map": weight_map}, indent=2) + "\n").encode()
