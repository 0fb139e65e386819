"""The layout of an array, within a program and at rest."""

from typing import Any

try:
  from jax.experimental.layout import Format, Layout, with_layout_constraint
except ImportError:  # a JAX that moved them: the compiler's own choice stands
  Layout = None  # type: ignore[assignment,misc]


def row_major(x: Any) -> Any:
  """`x`, laid out with its last axis as the fastest."""
  return x if Layout is None else with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def column_major(x: Any) -> Any:
  """`x`, laid out with its first axis as the fastest."""
  return x if Layout is None else with_layout_constraint(x, Layout(tuple(reversed(range(x.ndim)))))


def in_short_tiles(sharding: Any, ndim: int, bits: int) -> Any:
  """A sharding of an array of 4 or 8 bits that lies along its rows on a TPU, in tiles of 8 of them.

  Such arrays have tiles of 64 or of 32 rows by default, and a loop would have the whole laid out anew to slice it.
  """
  if Layout is None:
    return sharding
  tiles = (8, 128), (32 // bits, 1)
  return Format(Layout(tuple(range(ndim)), tiles, bits if bits < 8 else 0), sharding)
