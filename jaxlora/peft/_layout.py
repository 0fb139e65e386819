"""The kinds and layouts of torch's weights, and of their factors.

`roles` here are those of one layer's weight: `"i"` and `"o"` alone, without stacked axes.
"""

from collections.abc import Sequence
import math
import re

import numpy as np

from jaxlora._base.paths import components
from jaxlora._weight.roles import axes_of, factor_shape
from jaxlora.peft._records import Module


def torch_kind(path: str, module: str, roles: str, table: bool) -> str:
  """The kind of torch module for a leaf, which may be a table: `"embedding"`, `"conv"` or `"linear"`."""
  if roles == "io" and table:
    return "embedding"
  convolution = roles in ("i" * (len(roles) - 1) + "o", "o" + "i" * (len(roles) - 1)) and 3 <= len(roles) <= 5
  named = names_a_convolution(*components(path)[-3:], *module.split(".")[-2:])
  return "conv" if convolution and (named or len(roles) > 3) else "linear"


_CONVOLUTION = re.compile(r"(?:.*_)?conv(?:olution)?(?:[1-3]d)?\d*(?:_.*)?", re.IGNORECASE)


def names_a_convolution(*names: str) -> bool:
  """Whether `Conv_0`, `conv1d`, `temporal_conv` or the like is among some names.

  A kernel with roles `"iio"` is a convolution's, or a projection's from several heads: only the name tells.
  """
  return any(map(_CONVOLUTION.fullmatch, names))


def channels_last(roles: str) -> bool:
  """Whether a convolution's kernel is (*kernel, in, out), as Flax has it, and not (out, in, *kernel)."""
  return roles[0] == "i"


def torch_shapes(shape: Sequence[int], roles: str, kind: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """The shapes of torch's A and B for a weight of `shape`."""
  ins, outs = ([shape[d] for d in axes_of(roles, role)] for role in "io")
  if kind != "conv":
    return (rank, math.prod(ins)), (math.prod(outs), rank)
  if channels_last(roles):
    ins = [ins[-1], *ins[:-1]]
  return (rank, *ins), (math.prod(outs), rank, *(1 for _ in ins[1:]))


def factors_to_torch(a: np.ndarray, b: np.ndarray, roles: str, kind: str) -> tuple[np.ndarray, np.ndarray]:
  """(rank, *in), (rank, *out) -> torch's A and B."""
  matrix = b.reshape(len(b), -1).T
  if kind != "conv":
    return a.reshape(len(a), -1), matrix
  if channels_last(roles):
    a = np.moveaxis(a, -1, 1)
  return a, matrix.reshape(*matrix.shape, *(1 for _ in range(a.ndim - 2)))


def factors_from_torch(module: Module, shape: Sequence[int], roles: str) -> tuple[np.ndarray, np.ndarray]:
  """Torch's A and B -> (rank, *in), (rank, *out)."""
  a = module.a
  if module.kind == "conv" and channels_last(roles):
    a = np.moveaxis(a, 1, -1)
  ins, outs = (factor_shape(tuple(shape), roles, role, module.rank) for role in "io")
  return a.reshape(ins), module.b_matrix.T.reshape(outs)


def weight_to_torch(value: np.ndarray, roles: str, kind: str, inputs_first: bool = False) -> np.ndarray:
  """A weight in the layout of its torch module.

  (out, in) or (out, in, *kernel); (in, out) for GPT-2's Conv1D; embeddings and vectors are the same in both.
  """
  if value.ndim == 1 or kind == "embedding":
    return value
  weight = value.transpose(_torch_order(roles, kind))
  if kind == "conv":
    return weight
  matrix = weight.reshape(math.prod(weight.shape[: roles.count("o")]), -1)
  return matrix.T if inputs_first else matrix


def weight_from_torch(
  tensor: np.ndarray, shape: Sequence[int], roles: str, kind: str, inputs_first: bool = False
) -> np.ndarray | None:
  """A weight of a torch module in the layout of a leaf of `shape`, or `None` where it does not fit."""
  if len(shape) == 1 or kind == "embedding":
    return tensor if tensor.shape == tuple(shape) else None
  order = _torch_order(roles, kind)
  expected = weight_to_torch(np.empty(shape, np.int8), roles, kind).shape
  transposed = kind == "linear" and tensor.ndim == 2 and inputs_first
  for candidate in (tensor.T, tensor) if transposed else (tensor,):
    if candidate.shape == expected:
      return candidate.reshape([shape[d] for d in order]).transpose(np.argsort(order))
  return None


def _torch_order(roles: str, kind: str) -> list[int]:
  """The axes of a leaf in torch's order: outputs, inputs; of a convolution the input channels before the kernel's."""
  ins, outs = axes_of(roles, "i"), axes_of(roles, "o")
  return outs + ([ins[-1], *ins[:-1]] if kind == "conv" and channels_last(roles) else ins)


def magnitude_to_torch(magnitude: np.ndarray, kind: str, ndim: int) -> np.ndarray:
  """(1, *out) -> (out,), or (1, out, 1, ...) for a convolution with an A of `ndim` axes."""
  return magnitude.reshape((1, -1, *(1 for _ in range(ndim - 2))) if kind == "conv" else (-1,))
