"""Sizes of axes, which are no numbers where a program is exported for several of them (`jax.export.symbolic_shape`)."""

from collections.abc import Sequence
import math
from typing import Any

_NOMINAL = 1009  # a symbolic size, for estimates: large, as batches and sequences are, and a prime


def estimated(size: Any) -> int:
  """A size as a number, to compare with others where that decides how something is done, and never what."""
  if isinstance(size, int):
    return size
  try:
    return int(size)
  except Exception:  # symbolic: JAX has an error of its own for it
    pass
  try:
    return int(size._evaluate(dict.fromkeys(size._get_vars(), _NOMINAL)))
  except Exception:  # a JAX that evaluates symbols in another way
    return _NOMINAL


def elements(shape: Sequence[Any]) -> int:
  """How many elements an array of this shape has; an estimate where it is symbolic."""
  return math.prod(map(estimated, shape))
