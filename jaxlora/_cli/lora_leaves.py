"""Trees in files in which another JAX library left factors beside the weights."""

from typing import Any

import jax
import numpy as np

from jaxlora._cli.bases import open_base
from jaxlora._cli.sources import flax_paths
from jaxlora._cli.tensors import TensorFileError
from jaxlora.peft._lora_leaves import has_lora_leaves


def lora_leaves(source: str) -> dict[str, Any] | None:
  """The leaves of a tree in which another JAX library left factors, those read, the weights as shapes; else `None`."""
  try:
    files = open_base(source)
  except TensorFileError:
    return None
  paths = flax_paths(files.tensors)
  if not has_lora_leaves(paths.values()):
    return None
  return {
    path: tensor.read() if has_lora_leaves([path]) else jax.ShapeDtypeStruct(tensor.shape, tensor.dtype or np.uint8)
    for path, tensor in zip(paths.values(), files.tensors.values(), strict=True)
  }
