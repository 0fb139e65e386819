"""What a weight is in torch: kind and layout."""

from collections.abc import Sequence
import math
import re

import numpy as np

from jaxlora._base.paths import components
from jaxlora._weight.roles import factor_shape
from jaxlora.peft._records import CONV1D, Module


def kind_of(path: str, module: str, own: str) -> str:
  """The torch layer that holds a weight with these roles, the stacked ones left out."""
  if own == "io" and components(path)[-1] == "embedding":
    return "embedding"
  convolution = own in ("i" * (len(own) - 1) + "o", "o" + "i" * (len(own) - 1)) and 3 <= len(own) <= 5
  named = names_a_convolution(*components(path)[-3:], *module.split(".")[-2:])
  return "conv" if convolution and (named or len(own) > 3) else "linear"


_CONVOLUTION = re.compile(r"(?:.*_)?conv(?:olution)?(?:[1-3]d)?\d*(?:_.*)?", re.IGNORECASE)


def names_a_convolution(*parts: str) -> bool:
  """Whether `Conv_0`, `conv1d`, `temporal_conv` or the like is among some names: (i, i, o) may be heads as well."""
  return any(map(_CONVOLUTION.fullmatch, parts))


def channels_last(own: str) -> bool:
  return own[0] == "i"


def torch_shapes(shape: Sequence[int], own: str, kind: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of torch's A and B for a weight of `shape`."""
  ins = [size for size, role in zip(shape, own, strict=True) if role == "i"]
  outs = [size for size, role in zip(shape, own, strict=True) if role == "o"]
  if kind != "conv":
    return (rank, math.prod(ins)), (math.prod(outs), rank)
  if channels_last(own):
    ins = [ins[-1], *ins[:-1]]
  return (rank, *ins), (math.prod(outs), rank, *(1 for _ in ins[1:]))


def factors_to_torch(a: np.ndarray, b: np.ndarray, own: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """(rank, *in), (rank, *out) -> torch's A and B."""
  matrix = b.reshape(len(b), -1).T
  if kind != "conv":
    return a.reshape(len(a), -1), matrix
  if channels_last(own):
    a = np.moveaxis(a, -1, 1)
  return a, matrix.reshape(*matrix.shape, *(1 for _ in range(a.ndim - 2)))


def factors_from_torch(module: Module, shape: Sequence[int], own: str) -> tuple[np.ndarray, np.ndarray]:
  """Torch's A and B -> (rank, *in), (rank, *out)."""
  a = module.a
  if module.kind == "conv" and channels_last(own):
    a = np.moveaxis(a, 1, -1)
  ins, outs = (factor_shape(tuple(shape), own, role, module.rank) for role in "io")
  return a.reshape(ins), module.b_matrix.T.reshape(outs)


def whole_to_torch(value: np.ndarray, own: str, kind: str, name: str) -> np.ndarray:
  """A weight in the layout of torch's layer: (out, in), (out, in, *kernel); GPT-2's Conv1D, embeddings: as it is."""
  if value.ndim == 1 or kind == "embedding":
    return value
  outs = [d for d, role in enumerate(own) if role == "o"]
  ins = [d for d, role in enumerate(own) if role == "i"]
  if kind == "conv":
    return value.transpose(outs + ([ins[-1], *ins[:-1]] if channels_last(own) else ins))
  matrix = value.transpose(outs + ins).reshape(math.prod(value.shape[d] for d in outs), -1)
  return matrix.T if name.rpartition(".")[2] in CONV1D else matrix


def whole_from_torch(tensor: np.ndarray, shape: Sequence[int], own: str, kind: str, name: str) -> np.ndarray | None:
  """A weight of torch's in the layout of a leaf, or `None` where it does not fit."""
  if len(shape) == 1 or kind == "embedding":
    return tensor if tensor.shape == tuple(shape) else None
  example = np.empty(shape, np.int8)
  outs = [d for d, role in enumerate(own) if role == "o"]
  ins = [d for d, role in enumerate(own) if role == "i"]
  order = outs + ([ins[-1], *ins[:-1]] if kind == "conv" and channels_last(own) else ins)
  turned = kind == "linear" and tensor.ndim == 2 and name.rpartition(".")[2] in CONV1D
  for candidate in (tensor.T, tensor) if turned else (tensor,):
    if candidate.shape == whole_to_torch(example, own, kind, "").shape:
      return candidate.reshape([shape[d] for d in order]).transpose(np.argsort(order))
  return None


def magnitude_to_torch(magnitude: np.ndarray, kind: str, ndim: int) -> np.ndarray:
  """(1, *out) -> (out,), or (1, out, 1, ...) for a convolution."""
  return magnitude.reshape((1, -1, *(1 for _ in range(ndim - 2))) if kind == "conv" else (-1,))
