"""Coded leaves: array-like nodes whose values are made of codes, with `shape`, `dtype` and `dequantize()`."""

from typing import Any

import jax


def is_coded(x: Any) -> bool:
  """Whether a node of a tree stands for an array that is not there as floats."""
  return callable(getattr(type(x), "dequantize", None))


def decoded(x: Any) -> Any:
  """The array that a coded leaf stands for; anything else as it is."""
  return x.dequantize() if is_coded(x) else x


def type_of_leaf(x: Any) -> Any:
  """The shape and dtype of the array that a coded leaf stands for; anything else as it is."""
  return jax.ShapeDtypeStruct(x.shape, x.dtype) if is_coded(x) else x
