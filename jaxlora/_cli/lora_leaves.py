"""Trees in files in which another JAX library left factors beside the weights."""

from typing import Any

import jax
import numpy as np

from jaxlora._cli.bases import open_base
from jaxlora._cli.sources import flax_paths, is_checkpoint, is_peft
from jaxlora._files.tensors import TensorFileError
from jaxlora.peft._lora_leaves import has_lora_leaves


def lora_leaves(source: str) -> dict[str, Any] | None:
  """The leaves of a tree in which another JAX library left factors, those read, the weights as shapes; else `None`.

  A safetensors file is one where its factors are called after their weights, as qwix' are: `lora_a` alone is mlx-lm's.
  """
  if is_checkpoint(source) or (is_peft(source) and not source.endswith(".safetensors")):
    return None
  try:
    files = open_base(source)
  except TensorFileError:
    return None
  paths = flax_paths(files.tensors)
  alone = files.form == "safetensors" and not any(path.endswith("_lora_a") for path in paths.values())
  if alone or not has_lora_leaves(paths.values()):
    return None
  return {
    path: tensor.read() if has_lora_leaves([path]) else jax.ShapeDtypeStruct(tensor.shape, tensor.dtype or np.uint8)
    for path, tensor in zip(paths.values(), files.tensors.values(), strict=True)
  }
