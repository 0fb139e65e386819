"""Writes a merged model, in the format of its base or as safetensors: whole, or not at all."""

from collections.abc import Callable, Sequence
from pathlib import Path

from jaxlora._base.files import replacing
from jaxlora._cli.rewrite import Edit, Progress, write_safetensors
from jaxlora._cli.rewrite_flax import check_layout, write_msgpack, write_orbax
from jaxlora._files.tensors import TensorFileError, TensorFiles


def write_model(
  source: TensorFiles,
  target: Path,
  edits: Sequence[Edit],
  progress: Progress,
  *,
  folder: bool,
  beside: Callable[[Path], object] | None = None,
) -> None:
  """Writes a model with its edits: in the format of its base, or as safetensors where `target` is called so.

  Everything appears at `target` once it is complete, and replaces a file that was there.

  Args:
    source: the model.
    target: a file, or a new folder.
    edits: of its tensors; the others are copied.
    progress: is told the number of bytes done.
    folder: whether `target` is a folder, of files with the model's own names.
    beside: writes other files into that folder.

  Raises:
    TensorFileError: where the copy cannot be written; nothing is left of it then.
  """
  same = source.form != "safetensors" and target.suffix != ".safetensors"
  if same:
    check_layout(source, edits, target)
  try:
    with replacing(target) as new:
      if folder and source.form != "orbax":
        new.mkdir()
      if not same:
        write_safetensors(source, new, edits, progress, folder=folder)
      elif source.form == "msgpack":
        write_msgpack(source, new / source.files[0].name if folder else new, edits, progress)
      else:
        write_orbax(source, new, edits, progress)
      if beside is not None:
        beside(new)
  except OSError as error:
    raise TensorFileError(f"{target}: cannot be written: {error}") from error
