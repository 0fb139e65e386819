"""The one error and the one warning of checkpoints."""

from collections.abc import Callable, Iterator
import contextlib


class CheckpointError(ValueError):
  """What is wrong with a checkpoint, a folder or a base: the one error of reading and writing them."""


class CheckpointWarning(UserWarning):
  """What `load(..., strict=False)` left out, or loaded in spite of a difference.

  Attributes:
    problems: one line per leaf.
  """

  def __init__(self, message: str, problems: tuple[str, ...] = ()):
    super().__init__(message)
    self.problems = problems


@contextlib.contextmanager
def one_error(doing: str, after: Callable[[], None] | None = None) -> Iterator[None]:
  """Turns whatever goes wrong on disk, in orbax or in tensorstore into a `CheckpointError` that says what was tried."""
  try:
    yield
  except CheckpointError:
    raise
  except Exception as error:
    if after is not None:
      with contextlib.suppress(Exception):
        after()
    reason = " ".join(str(error).split())[:300]
    raise CheckpointError(f"{doing}: {type(error).__name__}: {reason}") from error
