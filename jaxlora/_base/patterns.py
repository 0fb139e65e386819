"""Patterns that pick leaves by path, and suggestions for a pattern that picked none."""

from collections.abc import Callable, Iterable, Mapping, Sequence
import difflib
import re
from typing import Any

from jaxlora._base.paths import components

Predicate = Callable[[str, Any], bool]

# What picks leaves: a regex over the whole path, names of modules or leaves, or a function of (path, leaf).
Pattern = str | Sequence[str] | Predicate


def compile_regex(pattern: str, what: str) -> re.Pattern[str]:
  """Compiles a regex, or says what the broken one was given for."""
  try:
    return re.compile(pattern)
  except re.error as error:
    raise ValueError(
      f"{what}: {pattern!r} is not a regular expression ({error}). Patterns match a whole"
      " \"/\"-joined path, such as r'.*/(query|value)/kernel'."
    ) from error


def validate_pattern(pattern: Any, what: str) -> None:
  """Raises unless `pattern` is a regex, a sequence of names or a callable."""
  if callable(pattern):
    return
  if isinstance(pattern, str):
    compile_regex(pattern, what)
    return
  if isinstance(pattern, Sequence) and pattern and all(isinstance(name, str) and name for name in pattern):
    return
  raise TypeError(
    f"{what}: found {pattern!r}, expected a regex over whole paths, a non-empty list of names, or a"
    " callable (path, leaf) -> bool."
  )


def name_matches(name: str, path: str) -> tuple[bool, bool]:
  """Whether `name` is a run of the path's components, and whether that run ends at the leaf itself."""
  want, have = components(name.strip("/")), components(path)
  starts = [k for k in range(len(have) - len(want) + 1) if have[k : k + len(want)] == want]
  return bool(starts), bool(starts) and starts[-1] + len(want) == len(have)


def nearest(pattern: str, paths: Iterable[str], count: int = 3) -> list[str]:
  """The paths that look most like a pattern that matched none of them."""
  plain = re.sub(r"[^\w/]+", "", pattern.replace(".*", "")).strip("/")
  paths = list(paths)

  def likeness(path: str) -> float:
    parts = components(path)
    tails = ["/".join(parts[k:]) for k in range(len(parts))] + parts
    return max(difflib.SequenceMatcher(None, plain, tail).ratio() for tail in tails)

  return sorted(paths, key=likeness, reverse=True)[:count]


def no_match_error(
  what: str,
  pattern: Any,
  paths: Sequence[str],
  among: str = "leaves",
  hint: str = "",
  rule: str = "a regex must match the whole path",
) -> ValueError:
  """The error for a pattern that picked no leaf."""
  if callable(pattern):
    return ValueError(
      f"{what}: the callable {pattern!r} matches none of the {len(paths)} {among}; expected True for at"
      f" least one (path, leaf). Paths: {', '.join(paths[:3])}."
    )
  return ValueError(
    f"{what}: {pattern!r} matches none of the {len(paths)} {among} ({rule})."
    + (hint or f" Nearest: {', '.join(nearest(pattern, paths))}.")
  )


def first_match(patterns: Mapping[str, Any] | None, path: str) -> Any | None:
  """The value of the first regex that matches the whole path."""
  for pattern, value in (patterns or {}).items():
    if compile_regex(pattern, "a pattern").fullmatch(path):
      return value
  return None
