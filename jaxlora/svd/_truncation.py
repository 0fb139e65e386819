"""`Truncation`: the report of what was lost by bringing leaves to a rank."""

from collections.abc import Iterable
import dataclasses
import math
from typing import Any, NamedTuple
import warnings

import numpy as np

from jaxlora._base.checks import is_known
from jaxlora._base.text import table


@dataclasses.dataclass(frozen=True)
class LeafTruncation:
  """How one leaf was brought to a rank.

  Attributes:
    path: its path.
    rank: the rank it has now; `None` for a leaf that is kept whole, or left out.
    norm: the Frobenius norm of the update before.
    residual: the Frobenius norm of what was lost, over `norm`: 0 is exact, 1 is everything.
  """

  path: str
  rank: int | None
  norm: float
  residual: float


@dataclasses.dataclass(frozen=True)
class Truncation:
  """What was lost, leaf by leaf; prints as a table.

  Attributes:
    leaves: the leaves whose update is not zero, or was adapted.
  """

  leaves: tuple[LeafTruncation, ...]

  @property
  def residual(self) -> float:
    """The Frobenius norm of all that was lost, over that of all updates."""
    whole = math.sqrt(sum(leaf.norm**2 for leaf in self.leaves))
    return math.sqrt(sum((leaf.residual * leaf.norm) ** 2 for leaf in self.leaves)) / whole if whole else 0.0

  def __str__(self) -> str:
    rows = [("leaf", "rank", "norm", "residual")]
    rows += [
      (leaf.path, "-" if leaf.rank is None else str(leaf.rank), f"{leaf.norm:.4g}", f"{leaf.residual:.2e}")
      for leaf in self.leaves
    ]
    return "\n".join([table(rows), f"residual of all {self.residual:.2e}"])


class Row(NamedTuple):
  """What a row of the report is made from; the numbers may still be traced.

  Attributes:
    path: of the leaf.
    rank: the rank it has now, or `None`.
    norm: the Frobenius norms of the update's stacked slices before.
    error: the share of each of them that was lost.
  """

  path: str
  rank: int | None
  norm: Any
  error: Any


def report_of(rows: Iterable[Row]) -> Truncation:
  """The report of some rows, which reads their values."""
  return Truncation(tuple(_leaf(*row) for row in rows))


def _leaf(path: str, rank: int | None, norm: Any, error: Any) -> LeafTruncation:
  if not is_known(norm, error):
    raise ValueError(
      f"{path}: a report reads values, which are not known under jit; call the function with the report outside, or"
      " the one without it."
    )
  norms = np.asarray(norm, np.float64)
  whole, lost = (math.sqrt(float((part**2).sum())) for part in (norms, norms * np.asarray(error, np.float64)))
  return LeafTruncation(path, rank, whole, lost / whole if whole else 0.0)


def warn_of_flag(function: str) -> None:
  """Says that `with_report=True` is an older spelling, at the line that calls the function."""
  warnings.warn(
    f"{function}(..., with_report=True) is an older spelling of {function}_with_report(...), which returns (tree,"
    " Truncation); returns no longer change with a flag.",
    DeprecationWarning,
    stacklevel=3,
  )
