"""Text for people: lists of paths, tables, sizes."""

from collections.abc import Sequence
import re
from typing import Any


def listed(paths: Sequence[str], count: int = 6) -> str:
  """The first few of some paths, for an error message."""
  return ", ".join(paths[:count]) + (f", ... ({len(paths)} in all)" if len(paths) > count else "")


def table(rows: Sequence[Sequence[str]]) -> str:
  """Rows of strings as aligned columns, the first row as the head."""
  widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
  lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def folded(rows: Sequence[Sequence[str]]) -> list[Sequence[str]]:
  """Rows that begin with a path, those of layers that are alike as one: `layers_{0-29}/q/kernel`.

  Rows are alike where they differ in one number of their paths alone; fewer than three stay as they are.
  """
  found = list(rows)
  for k in range(max((len(_NUMBER.findall(row[0])) for row in rows), default=0)):
    groups: dict[Sequence[str], list[tuple[Sequence[str], str]]] = {}
    for row in found:
      before, number, after = _around(row[0], k)
      groups.setdefault((before, after, *row[1:]), []).append((row, number))
    found = [row for key, group in groups.items() for row in _as_one(key, group)]
  return found


_NUMBER = re.compile(r"\d+|\{[\d,-]+\}")  # or a run of them, that a fold has put there


def _around(path: str, k: int) -> tuple[str, str, str]:
  """A path's k-th number, and what is ahead of and behind it; all is ahead where there is none."""
  numbers = list(_NUMBER.finditer(path))
  start, end = numbers[k].span() if k < len(numbers) else (len(path), len(path))
  return path[:start], path[start:end], path[end:]


def _as_one(key: Sequence[str], group: Sequence[tuple[Sequence[str], str]]) -> list[Sequence[str]]:
  before, after, *cells = key
  numbers = {number for _, number in group}
  if len(numbers) < max(3, len(group)) or not all(map(str.isdigit, numbers)):
    return [row for row, _ in group]
  return [(f"{before}{{{_runs(sorted(map(int, numbers)))}}}{after}", *cells)]


def _runs(numbers: Sequence[int]) -> str:
  """`0-4,7`."""
  starts = [n for n in numbers if n - 1 not in numbers]
  ends = [n for n in numbers if n + 1 not in numbers]
  return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


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
