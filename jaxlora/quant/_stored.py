"""From a weight as a file stores it to a base: its codes and scales as they are, never in floats."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._files.codes import Codes, numbers
from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.formats import FORMATS, format_of


def base_of(found: Codes, dtype: Any, said: str) -> QuantizedArray:
  """Codes and scales of a file as a quantised array, of NumPy arrays still.

  Args:
    found: what a format made of a file's tensors.
    dtype: of the array that they stand for.
    said: the start of an error message: which function, which weight.

  Raises:
    ValueError: for scales that are NaN or infinite, a table of values that is none of ours, another dtype.
  """
  number = jnp.dtype(dtype)
  if not jnp.issubdtype(number, jnp.floating) or number.itemsize < 2:
    raise ValueError(f"{said}: dtype is {number.name}, expected that of a float of 16 bits or more.")
  if not all(map(_finite, (found.codes, *found.floats()))):
    raise ValueError(
      f"{said}: found NaN or infinite scales or codes, expected finite ones: each spoils its whole block. The file is"
      " damaged, or its scales overflowed when it was written: read it again, or quantise the original weights"
      " (jaxlora.quantize)."
    )
  return _node(found, number.name, said)


def _finite(part: np.ndarray) -> bool:
  if part.dtype.itemsize > 1:
    return bool(np.isfinite(part).all())
  every = np.isfinite(numbers(np.arange(256, dtype=np.uint8).view(part.dtype)))
  return bool(every.all() or every[np.ascontiguousarray(part).view(np.uint8)].all())


def _node(found: Codes, number: str, said: str) -> QuantizedArray:
  format = found.format or format_of(found.codes.dtype, found.book)
  if format is None or format not in FORMATS:
    raise ValueError(
      f"{said}: found codes of {found.codes.dtype} whose table of values is none of those known here. {IN_FLOATS}"
    )
  part = lambda part: _node(part, "float32", said) if isinstance(part, Codes) else part
  offset = None if found.offset is None else part(found.offset)
  return QuantizedArray(found.codes, part(found.scales), offset, format, number)


def on_device(node: Any) -> Any:
  """A node of NumPy arrays as one of arrays on the default device."""
  return jax.tree.map(jnp.asarray, node)


# What works for every weight that another library can decode.
IN_FLOATS = "Decode it with the library that wrote it, and quantise the floats here (jaxlora.quantize)."
