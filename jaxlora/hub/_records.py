"""What the folder's files share: the error, and a model's file seen as torch's tensors."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any

import numpy as np


class HubError(ValueError):
  """A model's files that do not fit a tree, or cannot be read or written; the message lists every reason."""


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor of a model that has not been read.

  Attributes:
    shape: in torch's layout.
    read: its values; a view of the file where that is one.
    kind: the name of the format of its codes; `None` for floats.
    codes: `(dtype, start of an error message) -> QuantizedArray` of NumPy arrays, of the array's dtype; `None` for
      floats, and where codes of its kind are not read here.
  """

  shape: tuple[int, ...]
  read: Callable[[], np.ndarray]
  kind: str | None = None
  codes: Callable[[Any, str], Any] | None = None


@dataclasses.dataclass(frozen=True)
class Source:
  """A model's files.

  Attributes:
    place: what was given, for errors.
    tensors: by torch's names.
    tied: whether the head of the model is its embedding.
  """

  place: str
  tensors: Mapping[str, Stored]
  tied: bool


def failed(subject: str, problems: Sequence[str]) -> HubError:
  """One error that lists all problems."""
  shown = "".join(f"\n  - {problem}" for problem in problems[:200])
  more = f"\n  - and {len(problems) - 200} more" if len(problems) > 200 else ""
  return HubError(f"{subject}: {len(problems)} problem(s):{shown}{more}")
