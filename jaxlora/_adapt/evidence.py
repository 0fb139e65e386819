"""What a trace shows about the parameters of a function."""

from collections.abc import Sequence
import dataclasses
from typing import Any

Label = tuple[int, int]  # (leaf, axis of the leaf)

NONE: frozenset[Any] = frozenset()

INPUT = frozenset({"input"})  # stands for data among the parameters a value was last multiplied by


@dataclasses.dataclass(frozen=True)
class Seen:
  """What is known of one value.

  Attributes:
    leaf: the parameter that this value is, rearranged, or `None`.
    axes: for each axis, the parameter axes that it runs over.
    last: the parameters that this value was last multiplied by, over all the ways that lead to it.
    picked: whether parts of the parameter were looked up (a gather), so that it may be data by now.
  """

  leaf: int | None
  axes: tuple[frozenset[Label], ...]
  last: frozenset[Any]
  picked: bool = False


@dataclasses.dataclass
class Evidence:
  """What a trace showed about one parameter.

  Attributes:
    contracted: the axes summed in its first product, if it had one.
    looked_up: the axis along which it was first looked up, if it was.
    stacked: the axes that are scanned, batched or indexed one at a time.
    convolved: whether its first product is a convolution.
    feeds: whether a product of it reaches a product of another parameter.
    final: whether some result of the probe was last multiplied by this parameter alone.
    chooses: whether something is chosen among its outputs, or groups of rows are as large as its outputs say.
    used: names of the primitives that took it otherwise.
    single: its axes of size 1, which a reshape drops and adds.
  """

  ndim: int
  contracted: frozenset[int] | None = None
  looked_up: int | None = None
  stacked: set[int] = dataclasses.field(default_factory=set)
  convolved: bool = False
  feeds: bool = False
  final: bool = False
  chooses: bool = False
  used: list[str] = dataclasses.field(default_factory=list)
  single: frozenset[int] = NONE

  @property
  def is_kernel(self) -> bool:
    """Whether it is contracted with an input; a lookup table is not, even where it is also used to decode."""
    return self.contracted is not None and self.looked_up is None

  @property
  def is_classifier(self) -> bool:
    """Whether every way to some result ends with this matrix, and nothing is multiplied after it."""
    return self.is_kernel and self.final and not self.feeds and not self.convolved

  @property
  def is_something_else(self) -> bool:
    """Whether the trace uses it, and not as a matrix: it is scanned, or taken by what is no product."""
    return bool(self.stacked or (self.used and self.contracted is None))

  def roles(self) -> str | None:
    """The role string; `None` where the trace does not tell."""
    if self.looked_up is not None:
      inputs = {self.looked_up} - self.stacked
    elif self.contracted is not None:
      inputs = set(self.contracted) - self.stacked
    else:
      return None
    roles = "".join("s" if d in self.stacked else "i" if d in inputs else "o" for d in range(self.ndim))
    return roles if "i" in roles and "o" in roles else None


def unknown(aval: Any, last: frozenset[Any]) -> Seen:
  return Seen(None, (NONE,) * len(getattr(aval, "shape", ())), last)


def joined(values: Sequence[Seen]) -> Seen:
  """What is known of a value that is one of several: a branch's result, a loop's carry."""
  first = values[0]
  same = all(v.leaf == first.leaf and v.axes == first.axes for v in values)
  axes = first.axes if same else tuple(frozenset.union(*group) for group in zip(*(v.axes for v in values), strict=True))
  return Seen(
    first.leaf if same else None, axes, frozenset().union(*(v.last for v in values)), any(v.picked for v in values)
  )
