"""The layout of an array within a program."""

from typing import Any

try:
  from jax.experimental.layout import Layout, with_layout_constraint
except ImportError:  # a JAX that moved them: the compiler's own choice stands
  Layout = None  # type: ignore[assignment,misc]


def row_major(x: Any) -> Any:
  """`x`, laid out with its last axis as the fastest."""
  return x if Layout is None else with_layout_constraint(x, Layout(tuple(range(x.ndim))))


def column_major(x: Any) -> Any:
  """`x`, laid out with its first axis as the fastest."""
  return x if Layout is None else with_layout_constraint(x, Layout(tuple(reversed(range(x.ndim)))))
