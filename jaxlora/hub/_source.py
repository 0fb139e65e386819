"""Opens a model's files: their headers alone are read."""

import os
from pathlib import Path

import numpy as np

from jaxlora._files.carried import quantisation_of
from jaxlora._files.format import FormatError, Quantised
from jaxlora._files.formats import quantised_weights
from jaxlora._files.named import Neighbours
from jaxlora._files.tensors import Tensor, TensorFileError, TensorFiles, open_files
from jaxlora.hub._gguf import open_gguf
from jaxlora.hub._records import HubError, Source, Stored, failed
from jaxlora.quant._tensors import stored_base

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def open_source(place: str | os.PathLike[str]) -> Source:
  """A model in safetensors files or in a GGUF file.

  Raises:
    HubError: if it cannot be read.
  """
  path = Path(place)
  if path.suffix in _PICKLED or (path.is_dir() and not _holds_tensors(path) and _pickles(path)):
    found = path.name if path.is_file() else ", ".join(_pickles(path))
    raise HubError(
      f"{path}: found {found}, expected safetensors: reading a pickle runs what it holds, and none is read here. Save"
      " the model again where you trust it: model.save_pretrained(folder) of transformers writes safetensors."
    )
  if path.is_dir() and not _holds_tensors(path) and len(files := sorted(path.glob("*.gguf"))) == 1:
    path = files[0]
  if path.suffix == ".gguf":
    return open_gguf(path)
  try:
    return _of_files(str(place), open_files(path))
  except TensorFileError as error:
    raise HubError(str(error)) from error


def _holds_tensors(folder: Path) -> bool:
  return any(folder.glob("*.safetensors*"))


def _pickles(folder: Path) -> list[str]:
  return sorted(file.name for file in folder.iterdir() if file.suffix in _PICKLED)


def _of_files(place: str, files: TensorFiles) -> Source:
  """Plain tensors as they are, and quantised weights as the floats that they mean."""
  try:
    quantised = quantised_weights(files.tensors, quantisation_of(files.config), files.read)
  except FormatError as error:
    raise HubError(f"{place}: {error}") from error
  parts = {part for weight in quantised.values() for part in weight.parts.values()}
  unread = Neighbours(files.tensors).unread(parts)
  if problems := [f"{name}: quantised, in {known}, which is not read here" for name, known in unread]:
    raise failed(f"{place}: load the model's unquantised original", problems)
  plain = {name: _stored(tensor) for name, tensor in files.tensors.items() if name not in parts}
  decoded = {name: _decoded(weight, files) for name, weight in quantised.items()}
  return Source(place, plain | decoded, files.config.get("tie_word_embeddings") is True)


def _stored(tensor: Tensor) -> Stored:
  mapped = getattr(tensor, "mapped", tensor.read)
  return Stored(tensor.shape, mapped)


def _decoded(weight: Quantised, files: TensorFiles) -> Stored:
  def read() -> np.ndarray:
    return weight.format.dequantise(weight.parts_by(files.read), weight.about)

  codes = lambda dtype, said: stored_base(weight, files.read, dtype, said)
  return Stored(weight.shape, read, weight.format.name, codes)
