"""What people read of a command: lines, and tables that rich draws on a terminal where it is installed."""

from collections.abc import Sequence
import sys
from typing import NamedTuple

from jaxlora._base.text import table


class Table(NamedTuple):
  """Rows of strings, the first of which is the head."""

  rows: Sequence[Sequence[str]]

  def __str__(self) -> str:
    return table(self.rows)


Line = str | Table


def show(lines: Sequence[Line]) -> None:
  """Prints lines; in a pipe or a file a table is plain text, whatever is installed."""
  for line in lines:
    if not (isinstance(line, Table) and sys.stdout.isatty() and _drawn(line)):
      print(line)


def _drawn(found: Table) -> bool:
  """Draws a table by rich; False where rich is not installed."""
  try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as Drawn
    from rich.text import Text
  except ImportError:
    return False
  head, *rows = found.rows
  drawn = Drawn(box=SIMPLE_HEAD, pad_edge=False)
  for name in head:
    drawn.add_column(name, overflow="fold")
  for row in rows:
    drawn.add_row(*map(Text, row))  # names of leaves are no markup
  Console().print(drawn)
  return True
