"""Regular expressions of files that anybody may have written: whether one matches a name, in a bounded number of steps.

Python's own matcher backtracks, and can take for ever. This one carries the set of all positions that are reachable, as
the bits of an integer, so that greedy and lazy quantifiers are the same, nested ones cost their product at most, and
every step is counted. Classes, escapes and anchors are Python's: a character at a time.
"""

from collections.abc import Callable
import dataclasses
import functools
import re

from jaxlora.peft._records import PeftError

LONGEST_PATTERN = 2048  # characters

_MOST_DEPTH = 60  # groups within groups

_MOST_REPEATS = 1000  # of one counted quantifier

Move = Callable[["Name", int], int]  # the positions that one part of a pattern leads to, of a set of positions


class Steps:
  """How many more steps may be taken."""

  def __init__(self, left: int) -> None:
    self.left = left

  def take(self) -> None:
    self.left -= 1
    if self.left < 0:
      raise PeftError("matching it could take too long")


class Name:
  """A text that patterns are matched with."""

  def __init__(self, text: str, steps: Steps) -> None:
    self.text, self.steps = text, steps
    self._places: dict[str, int] = {}  # the positions at which each token matches

  @functools.cached_property
  def _characters(self) -> dict[str, int]:
    """The positions of each character."""
    places: dict[str, int] = {}
    for k, character in enumerate(self.text):
      places[character] = places.get(character, 0) | 1 << k
    return places

  def characters(self, token: str) -> int:
    """The positions of characters that a token of one character matches."""
    if token not in self._places:
      regex = re.compile(token)
      matching = (places for character, places in self._characters.items() if regex.fullmatch(character))
      self._places[token] = sum(matching)
    return self._places[token]

  def anchors(self, token: str) -> int:
    """The positions that a token without width matches at."""
    if token not in self._places:
      regex = re.compile(token)
      self._places[token] = sum(1 << k for k in range(len(self.text) + 1) if regex.match(self.text, k))
    return self._places[token]


@dataclasses.dataclass(frozen=True)
class Pattern:
  """A compiled pattern, which must match from a name's beginning."""

  move: Move

  def matches(self, name: Name) -> bool:
    return self.move(name, 1) != 0


def compile_pattern(pattern: str) -> Pattern:
  r"""Compiles a regular expression.

  Raises:
    PeftError, re.error: if it is none, or has what no set of positions can tell: back-references, conditions, atomic
      groups and possessive quantifiers, flags.
  """
  if len(pattern) > LONGEST_PATTERN:
    raise PeftError(f"{len(pattern)} characters, expected at most {LONGEST_PATTERN}")
  re.compile(pattern)  # Python's errors, first
  reader = _Reader(pattern)
  move = reader.alternatives(0)
  if reader.rest:
    raise PeftError(f"at {reader.rest[:20]!r}: not understood")
  return Pattern(move)


_CHARACTER = re.compile(
  r"\\[dDwWsS]|\\[^0-9a-zA-Z]|\\[nrtfva]|\\x[0-9a-fA-F]{2}|\[\^?\]?(?:\\.|[^\]\\])*\]|[^\\()|^$*+?]", re.DOTALL
)
_ANCHOR = re.compile(r"\\[bBAZ]|[\^$]")
_GROUP = re.compile(r"\((?!\?)|\(\?:|\(\?P<\w+>|\(\?(?P<look>[=!]|<[=!])")
_QUANTIFIER = re.compile(r"(?:(?P<sign>[*+?])|\{(?P<low>\d*)(?P<comma>,)?(?P<high>\d*)\})(?P<after>[?+]?)")


class _Reader:
  """Reads a pattern from its beginning to its end."""

  def __init__(self, pattern: str) -> None:
    self.rest = pattern

  def take(self, regex: re.Pattern[str]) -> re.Match[str] | None:
    found = regex.match(self.rest)
    if found:
      self.rest = self.rest[found.end() :]
    return found

  def alternatives(self, depth: int) -> Move:
    """One or more sequences, up to the end of their group."""
    if depth > _MOST_DEPTH:
      raise PeftError(f"groups nested deeper than {_MOST_DEPTH}")
    branches = [self.sequence(depth)]
    while self.rest.startswith("|"):
      self.rest = self.rest[1:]
      branches.append(self.sequence(depth))
    return branches[0] if len(branches) == 1 else _either(branches)

  def sequence(self, depth: int) -> Move:
    parts = []
    while self.rest and self.rest[0] not in "|)":
      part = self.part(depth)
      found = _QUANTIFIER.match(self.rest)
      if found and (found["sign"] or found["low"] or found["comma"]):
        self.rest = self.rest[found.end() :]
        part = _repeated(part, found)
      parts.append(part)
    return _in_turn(parts)

  def part(self, depth: int) -> Move:
    if group := self.take(_GROUP):
      inside = self.alternatives(depth + 1)
      if not self.rest.startswith(")"):
        raise PeftError(f"at {self.rest[:20]!r}: expected the end of a group")
      self.rest = self.rest[1:]
      return _looked(inside, group["look"]) if group["look"] else inside
    if anchor := self.take(_ANCHOR):
      return _anchored(anchor[0])
    if character := self.take(_CHARACTER):
      return _one(character[0])
    raise PeftError(f"at {self.rest[:20]!r}: expected characters, classes, groups, anchors, looks ahead or behind")


def _one(token: str) -> Move:
  if token == "{":
    token = r"\{"

  def move(name: Name, positions: int) -> int:
    name.steps.take()
    return (positions & name.characters(token)) << 1

  return move


def _anchored(token: str) -> Move:
  def move(name: Name, positions: int) -> int:
    name.steps.take()
    return positions & name.anchors(token)

  return move


def _in_turn(parts: list[Move]) -> Move:
  def move(name: Name, positions: int) -> int:
    name.steps.take()
    for part in parts:
      if not positions:
        return 0
      positions = part(name, positions)
    return positions

  return move


def _either(branches: list[Move]) -> Move:
  def move(name: Name, positions: int) -> int:
    found = 0
    for branch in branches:
      found |= branch(name, positions)
    return found

  return move


def _repeated(part: Move, found: re.Match[str]) -> Move:
  if found["after"] == "+":
    raise PeftError(f"{found[0]!r}: possessive quantifiers are not read here")
  low, high = {"*": (0, None), "+": (1, None), "?": (0, 1)}.get(found["sign"], (0, None))
  if not found["sign"]:
    low = int(found["low"] or 0)
    high = low if not found["comma"] else int(found["high"]) if found["high"] else None
  if max(low, high or 0) > _MOST_REPEATS:
    raise PeftError(f"{found[0]!r}: more than {_MOST_REPEATS} repeats")

  def move(name: Name, positions: int) -> int:
    for _ in range(low):
      name.steps.take()
      if not positions:
        return 0
      positions = part(name, positions)
    reached, count = positions, low
    while positions and (high is None or count < high):
      name.steps.take()
      positions = part(name, positions) & ~reached
      reached, count = reached | positions, count + 1
    return reached

  return move


def _looked(inside: Move, look: str) -> Move:
  """Positions that something begins at (`=`), or ends at (`<=`), or not (`!`, `<!`)."""

  def ahead(name: Name, positions: int) -> int:
    return sum(1 << k for k in range(positions.bit_length()) if positions >> k & 1 and inside(name, 1 << k))

  def behind(name: Name, positions: int) -> int:
    ends = 0
    for k in range(positions.bit_length()):
      ends |= inside(name, 1 << k)
    return positions & ends

  found = behind if look.startswith("<") else ahead
  return found if look.endswith("=") else lambda name, positions: positions & ~found(name, positions)
