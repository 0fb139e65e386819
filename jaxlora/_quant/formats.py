"""Formats: how the floats of a block become a scale and codes. `W = value(code) * scale`.

A format with a book looks the values of its codes up in it; the codes of any other are their own values. Some formats
are only found in files: nothing here writes them.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._quant.books import DYNAMIC8, E2M1, FP4, NF4

Blocks = jax.Array  # with every blocked axis as two: which block, which element of it


class Writing(NamedTuple):
  """How floats become codes.

  Attributes:
    scale: from blocks and the axes of their elements to a scale for each, those axes kept with size 1.
    encode: from blocks over their scales to codes.
    public: whether weights are written so, and not only the scales of others.
  """

  scale: Callable[[Blocks, Sequence[int]], jax.Array]
  encode: Callable[[jax.Array], jax.Array]
  public: bool = True


class Format(NamedTuple):
  """One kind of codes.

  Attributes:
    codes: their dtype.
    book: the value of each; `None` where codes are numbers.
    writing: how floats become codes; `None` for codes that are only found in files.
  """

  codes: Any
  book: tuple[float, ...] | None = None
  writing: Writing | None = None


def _largest(divisor: float) -> Callable[[Blocks, Sequence[int]], jax.Array]:
  """The largest magnitude of a block, over a constant."""

  def scale(blocks: Blocks, axes: Sequence[int]) -> jax.Array:
    largest = jnp.max(jnp.abs(blocks), axis=tuple(axes), keepdims=True)
    return largest if divisor == 1 else largest / divisor

  return scale


def _signed_largest(blocks: Blocks, axes: Sequence[int]) -> jax.Array:
  """The element of the largest magnitude, over -8: it then has the code -8, as all others have one up to 7."""
  high = jnp.max(blocks, axis=tuple(axes), keepdims=True)
  low = jnp.min(blocks, axis=tuple(axes), keepdims=True)
  return jnp.where(high > -low, high, low) / -8


def _nearest_in(book: Sequence[float]) -> Callable[[jax.Array], jax.Array]:
  """The number of the nearest value in a book; halfway between two, that of the lower one."""
  values = np.asarray(book, np.float32)
  middles = (values[:-1] + values[1:]) / np.float32(2)

  def encode(x: jax.Array) -> jax.Array:
    if len(middles) > 16:
      return jnp.searchsorted(jnp.asarray(middles), x, side="left")
    return sum((x > middle).astype(jnp.uint8) for middle in middles)

  return encode


def _rounded(low: int, high: int) -> Callable[[jax.Array], jax.Array]:
  return lambda x: jnp.clip(jnp.round(x), low, high)


_FP8 = jnp.float8_e4m3fn

FORMATS: dict[str, Format] = {
  "nf4": Format(jnp.uint4, NF4, Writing(_largest(1), _nearest_in(NF4))),
  "int8": Format(jnp.int8, None, Writing(_largest(127), _rounded(-127, 127))),
  "int4": Format(jnp.int4, None, Writing(_largest(7), _rounded(-7, 7))),
  "q4_0": Format(jnp.int4, None, Writing(_signed_largest, _rounded(-8, 7))),
  "fp8": Format(_FP8, None, Writing(_largest(float(jnp.finfo(_FP8).max)), lambda x: x)),
  "dynamic8": Format(jnp.uint8, DYNAMIC8, Writing(_largest(1), _nearest_in(DYNAMIC8), public=False)),
  "uint4": Format(jnp.uint4),
  "uint8": Format(jnp.uint8),
  "fp8_e5m2": Format(jnp.float8_e5m2),
  "fp4": Format(jnp.uint4, FP4),
  "e2m1": Format(jnp.uint4, E2M1),
}
PUBLIC = tuple(name for name, format in FORMATS.items() if format.writing is not None and format.writing.public)


def format_of(codes: Any, book: Any) -> str | None:
  """The format of codes of a dtype with a table of values; `None` where there is none."""
  known = None if book is None else tuple(float(value) for value in np.asarray(book, np.float32))
  for name, format in FORMATS.items():
    own = None if format.book is None else tuple(float(value) for value in np.asarray(format.book, np.float32))
    if own == known and jnp.dtype(format.codes) == jnp.dtype(codes):
      return name
  return None
