"""Norms of tensors and of products of factors, piece by piece: nothing of a tensor's size is made, no delta formed."""

from collections.abc import Iterator
import math
from typing import NamedTuple

import numpy as np

_PIECE = 1 << 16  # elements in double precision at a time


class Measured(NamedTuple):
  """What one pass over a tensor finds.

  Attributes:
    gram: (stack, rank, rank), the tensor times its own (conjugate) transpose, in double precision.
    nan: how many elements are NaN or infinite.
  """

  gram: np.ndarray
  nan: int


def measured(factor: np.ndarray) -> Measured:
  """Measures a factor, (stack, rank, size) of any dtype."""
  stack, rank, _ = factor.shape
  gram, nan = np.zeros((stack, rank, rank)), 0
  with np.errstate(invalid="ignore", over="ignore"):
    for k in range(stack):
      for piece in _pieces(factor[k]):
        gram[k] += (piece @ piece.conj().T).real
        nan += piece.size - int(np.isfinite(piece).sum())
  return Measured(gram, nan)


def measured_flat(tensor: np.ndarray) -> Measured:
  """Measures any other tensor as one row."""
  return measured(tensor.reshape(1, 1, -1))


def _pieces(matrix: np.ndarray) -> Iterator[np.ndarray]:
  """A matrix in double precision, some columns at a time."""
  wide = np.complex128 if matrix.dtype.kind == "c" else np.float64
  columns = max(1, _PIECE // max(1, len(matrix)))
  for start in range(0, matrix.shape[1], columns):
    yield matrix[:, start : start + columns].astype(wide)


def tensor_norm(factor: Measured) -> float | None:
  """The Frobenius norm of a tensor."""
  return finite(math.sqrt(max(float(np.trace(factor.gram, axis1=1, axis2=2).sum()), 0.0)))


def delta_norm(a: Measured, b: Measured, scale: float) -> float | None:
  """The Frobenius norm of `scale * A B` without the product, which is as large as the weight.

  |A B|² = tr((A Aᵀ) (B Bᵀ))
  """
  with np.errstate(invalid="ignore", over="ignore"):
    square = float(np.sum(a.gram * b.gram))
  return finite(scale * math.sqrt(max(square, 0.0)))


def finite(value: float) -> float | None:
  """`None` for NaN and infinities, which JSON does not have."""
  return value if math.isfinite(value) else None
