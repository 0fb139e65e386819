"""Text for people: lists of paths, tables, sizes."""

from collections.abc import Sequence
from typing import Any


def listed(paths: Sequence[str], count: int = 6) -> str:
  """The first few of some paths, for an error message."""
  return ", ".join(paths[:count]) + (f", ... ({len(paths)} in all)" if len(paths) > count else "")


def table(rows: Sequence[Sequence[str]]) -> str:
  """Rows of strings as aligned columns, the first row as the head."""
  widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def size(count: float) -> str:
  """A number of bytes for people."""
  for unit in ("B", "KiB", "MiB", "GiB"):
    if count < 1024:
      return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
    count /= 1024
  return f"{count:.1f} TiB"


def short(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 80 else f"{shown[:80]}..."
