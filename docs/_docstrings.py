"""Reads this library's docstrings as the reference needs them.

`Example:` is a section, `a, b:` are two parameters, and `Source:` is a paragraph.
"""

import re

import griffe

SHARED = re.compile(r"^( *)((?:\*{0,2}\w+, )+\*{0,2}\w+):(.*(?:\n\1 +\S.*)*)$", re.MULTILINE)


def rewritten(text: str) -> str:
  """A docstring in the words of the Google style's parser."""
  text = re.sub(r"^( *)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
  text = re.sub(r"^( *)(Source|Sources):", r"\1**\2:**", text, flags=re.MULTILINE)
  start, args, rest = text.partition("\nArgs:\n")
  if not args:
    return text
  section, blank, behind = rest.partition("\n\n")
  each = lambda found: "\n".join(f"{found[1]}{name}:{found[3]}" for name in found[2].split(", "))
  return start + args + SHARED.sub(each, section) + blank + behind


class Docstrings(griffe.Extension):
  """Rewrites every docstring before it is parsed."""

  def on_object(self, *, obj, **_):
    """Called once for each module, class and function."""
    if obj.docstring is not None:
      obj.docstring.value = rewritten(obj.docstring.value)
