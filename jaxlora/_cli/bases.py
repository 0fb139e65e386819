"""A model in any of the formats that JAX users have: safetensors, Flax's msgpack, an orbax checkpoint."""

import os
from pathlib import Path

from jaxlora._cli.orbax_base import checkpoint_folder, orbax_tensors
from jaxlora._files.format import FormatError
from jaxlora._files.msgpack import msgpack_tensors
from jaxlora._files.tensors import TensorFileError, TensorFiles, open_files

_MSGPACK = "flax_model.msgpack"


def open_base(path: str | os.PathLike[str]) -> TensorFiles:
  """Reads what a model holds, without its values.

  Args:
    path: a safetensors file, an index of several, a msgpack file, an orbax checkpoint, or a folder with one of them.

  Raises:
    TensorFileError: naming the file and what is wrong with it.
  """
  place = Path(path)
  if not place.exists() or place.suffix in (".safetensors", ".json"):
    return open_files(place)
  if place.is_file() and place.suffix == ".msgpack":
    return _from_msgpack(place, None)
  if place.is_dir() and not any(place.glob("*.safetensors*")):
    packed = sorted(place.glob("*.msgpack"))
    if packed:
      chosen = [file for file in packed if file.name == _MSGPACK] or packed
      if len(chosen) > 1:
        raise TensorFileError(
          f"{place}: expected {_MSGPACK} or one .msgpack file, found {len(packed)}. Pass one as BASE."
        )
      return _from_msgpack(chosen[0], place)
    if (checkpoint := checkpoint_folder(place)) is not None:
      return TensorFiles(orbax_tensors(checkpoint), (checkpoint,), None, None, "orbax")
  return open_files(place)


def _from_msgpack(file: Path, folder: Path | None) -> TensorFiles:
  try:
    return TensorFiles(dict(msgpack_tensors(file)), (file,), None, folder, "msgpack")
  except (FormatError, OSError) as error:
    raise TensorFileError(str(error)) from error
