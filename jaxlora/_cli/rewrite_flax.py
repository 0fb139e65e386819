"""Copies of Flax's msgpack files and of orbax checkpoints with the values of some leaves changed."""

from collections.abc import Sequence
from pathlib import Path

from jaxlora._base.files import StoredTensor, raw_bytes
from jaxlora._cli.orbax_base import write_tree
from jaxlora._cli.rewrite import Edit, Progress, copy_bytes, values_of
from jaxlora._files.tensors import TensorFileError, TensorFiles


def check_layout(source: TensorFiles, edits: Sequence[Edit], target: Path) -> None:
  """Raises unless the edits keep the leaves' shapes and dtypes, as these formats keep theirs."""
  for edit in edits:
    for name, spec in edit.outputs.items():
      old = source.tensors.get(name)
      if edit.removed or old is None or (old.code, old.shape) != spec:
        raise TensorFileError(
          f"{name}: becomes {spec[0]}{spec[1]}, and a merged {source.form} model keeps shapes and dtypes. Write"
          f" safetensors: {target.with_suffix('.safetensors').name} as OUT."
        )


def write_msgpack(source: TensorFiles, new: Path, edits: Sequence[Edit], progress: Progress) -> None:
  """Writes a copy of a msgpack file, with the bytes of the edited leaves replaced."""
  with open(source.files[0], "rb") as old, open(new, "wb") as stream:
    copy_bytes(old, stream, source.files[0].stat().st_size, progress)
    for edit in edits:
      for name, value in values_of(edit).items():
        tensor, data, at = source.tensors[name], raw_bytes(value), 0
        for piece in [tensor] if isinstance(tensor, StoredTensor) else tensor.pieces:  # type: ignore[attr-defined]
          stream.seek(piece.begin)
          stream.write(data[at : at + piece.nbytes])
          at += piece.nbytes


def write_orbax(source: TensorFiles, new: Path, edits: Sequence[Edit], progress: Progress) -> None:
  """Writes a checkpoint of the same tree. The whole model is in memory, as orbax takes it."""
  values = {name: value for edit in edits for name, value in values_of(edit).items()}
  for name, tensor in source.tensors.items():
    if name not in values:
      values[name] = tensor.read()
    progress(tensor.nbytes)
  write_tree(source.tensors, values, new)
