"""A weight as codes and scales, in NumPy: what every format of files comes to, and its values.

W = value(codes) * scales + offset
"""

from collections.abc import Iterator, Sequence
import dataclasses
import math
from typing import Union

import jax.numpy as jnp
import numpy as np

Part = Union[np.ndarray, "Codes"]


@dataclasses.dataclass(frozen=True)
class Codes:
  """Codes of every element, with a scale for each block of them.

  Attributes:
    codes: in the shape of the weight; integers and floats of 4 and 8 bits.
    scales, offset: of every block: each axis divides that of the codes. Floats, or codes with scales of their own.
    book: the value of each code; `None` where codes are numbers.
    format: its name, as `jaxlora.quantize` has it; `None` where the dtype and the book tell.
    order: where the elements along the last axis are to be taken from, if they lie in another order here, one in which
      blocks are runs.
  """

  codes: np.ndarray
  scales: Part
  offset: Part | None = None
  book: np.ndarray | None = None
  format: str | None = None
  order: np.ndarray | None = None

  @property
  def shape(self) -> tuple[int, ...]:
    return self.codes.shape

  def values(self) -> np.ndarray:
    """The weight in float32."""
    values = numbers(self.codes, self.book)
    values *= spread(_floats(self.scales), self.shape)
    if self.offset is not None:
      values += spread(_floats(self.offset), self.shape)
    return values if self.order is None else values[..., self.order]

  def floats(self) -> Iterator[np.ndarray]:
    """The floats of all levels: those that scale."""
    for part in (self.scales, self.offset):
      if isinstance(part, Codes):
        yield from part.floats()
      elif part is not None:
        yield part


def spread(part: np.ndarray, shape: Sequence[int]) -> np.ndarray:
  """A part with a number for each block as an array that broadcasts to one with a number for each element."""
  for axis, (n, k) in enumerate(zip(shape, part.shape, strict=True)):
    if k not in (1, n):
      part = np.repeat(part, n // k, axis)
  return part


def _floats(part: Part) -> np.ndarray:
  return part.values() if isinstance(part, Codes) else part.astype(np.float32)


def numbers(codes: np.ndarray, book: np.ndarray | None = None) -> np.ndarray:
  """The values of codes of a byte each, by a table of all of them: faster than a cast."""
  bytes_ = np.ascontiguousarray(codes).view(np.uint8)
  if book is not None:
    return book.astype(np.float32)[bytes_]
  return np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)[bytes_]


def in_4_bits(codes: np.ndarray, *, signed: bool = False) -> np.ndarray:
  """Numbers of 4 bits, a byte for each, in the dtype that says so."""
  return codes.view(jnp.int4 if signed else jnp.uint4)


def halves(packed: np.ndarray, *, high_first: bool = False) -> np.ndarray:
  """The two numbers of each byte, beside each other along the last axis."""
  pair = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
  return np.stack(pair, axis=-1).reshape(*packed.shape[:-1], -1)


def in_runs(scales: np.ndarray, size: int, shape: Sequence[int]) -> np.ndarray:
  """The scales of a weight that is flattened and cut into runs, as an array with as many axes as the weight.

  A run that is longer than a row and a multiple of it is some rows; one that ends within a row is cut into pieces that
  fill rows and runs alike, which have its scale each.

  Args:
    scales: one for each run, in order; the last run may be shorter.
    size: elements of a run.
    shape: of the weight.
  """
  *before, columns = shape
  rows = math.prod(before)
  if len(before) == 1 and size % columns == 0 and rows % (size // columns) == 0:
    return scales.reshape(rows // (size // columns), 1)
  piece = math.gcd(size, columns)
  starts = np.arange(0, rows * columns, piece)
  return scales[starts // size].reshape(*before, columns // piece)
