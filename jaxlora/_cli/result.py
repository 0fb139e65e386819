"""What a command returns, and how it gives up."""

from typing import Any

Result = tuple[dict[str, Any], list[str]]  # the object for --json, and the lines for people


class BadFile(ValueError):
  """A file that a command cannot use; the message is all that the user sees."""
