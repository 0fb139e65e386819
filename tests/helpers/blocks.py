"""The Python that a Markdown file shows."""

from pathlib import Path
import re


def python_blocks(file: Path) -> list[str]:
  """The fenced blocks of Python, in order."""
  return re.findall(r"```python\n(.*?)```", file.read_text(), re.DOTALL)
