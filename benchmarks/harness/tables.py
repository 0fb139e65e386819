"""Cells and tables, for terminals and for Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table with aligned columns, for a terminal."""
  widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
  lines = [
    "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
  ]
  return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table in Markdown."""
  lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
  return "\n".join([lines[0], "|" + "---|" * len(head), *lines[1:]])


def described(title: str, cells: Sequence[Sequence[str]], *below: str) -> str:
  """A title, a table whose head is the first row, and lines, for a terminal."""
  head, *rows = cells
  return "\n".join([title, table(head, rows), *below])


def documented(above: str, cells: Sequence[Sequence[str]], *below: str) -> str:
  """The same as paragraphs of Markdown."""
  head, *rows = cells
  return "\n\n".join([above, markdown(head, rows), *below])


def conditions(results: Mapping[str, Any], *packages: str) -> str:
  """Hardware and versions of a result in one line, with those of `packages`."""
  machine, versions = results["hardware"], results["versions"]
  device = "" if machine["backend"] == "cpu" else f", {machine['device']}"
  known = [f"{name} {versions[name]}" for name in ("jax", "flax", *packages) if name in versions]
  cores = f"{machine['cores']} CPU cores ({machine['cpu']})"
  return f"{cores}{device}, Python {versions['python']}, {', '.join(known)}"


def percent_cell(value: Mapping[str, float | None]) -> str:
  """A share with its interval, in percent."""
  assert value["mean"] is not None
  mean = f"{value['mean']:.1%}"
  return mean if value["half"] is None else f"{mean} ± {100 * value['half']:.1f}"


def ratio_cell(ratio: Mapping[str, Any] | None) -> str:
  """A ratio of times: median (min-max), or the median alone where there is no range."""
  if ratio is None:
    return "-"
  median = f"{ratio['median']:.2f}"
  return median if ratio["min"] == ratio["max"] else f"{median} ({ratio['min']:.2f}-{ratio['max']:.2f})"


def exact_cell(value: float | None) -> str:
  """A ratio of compiled figures, which have no range."""
  return "-" if value is None else f"{value:.3f}"


def milliseconds(values: Mapping[str, Any]) -> str:
  """A median time."""
  value = 1e3 * values["median"]
  return f"{value:,.0f} ms" if value >= 100 else f"{value:.2f} ms"
