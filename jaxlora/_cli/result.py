"""What a command returns, and how it gives up."""

from collections.abc import Sequence
from typing import Any

from jaxlora._cli.show import Line

Result = tuple[dict[str, Any], Sequence[Line]]  # the object for --json, and the lines for people


class BadFile(ValueError):
  """A file that a command cannot use; the message is all that the user sees."""
