"""Patterns over module names: those read are limited in cost, those written pick exactly."""

from collections.abc import Collection, Mapping, Sequence
import math
import re
from typing import Any

from jaxlora._base.text import short
from jaxlora.peft._records import PeftError, fail

_CHECKS = {
  "rank_pattern": ("r", lambda x: isinstance(x, int) and is_number(x) and x >= 1, "a whole number of at least 1"),
  "alpha_pattern": ("lora_alpha", lambda x: is_number(x) and x > 0, "a finite number above 0"),
}


def by_pattern(config: Mapping[str, Any], field: str, names: Collection[str], problems: list[str]) -> dict[str, Any]:
  """`r` or `lora_alpha` of every module: that of the first pattern that matches the end of its name, or the default."""
  default_field, check, expected = _CHECKS[field]
  default, patterns = config.get(default_field, 8), config.get(field)
  patterns = {} if patterns is None else patterns
  if not check(default):
    problems.append(f"{default_field}: found {short(default)}, expected {expected}")
    default = None
  if not isinstance(patterns, dict):
    problems.append(f"{field}: found {short(patterns)}, expected an object of patterns")
    return dict.fromkeys(names, default)
  compiled, total = [], 0.0
  for pattern, value in patterns.items():
    if not check(value):
      problems.append(f"{field}[{short(pattern)}]: found {short(value)}, expected {expected}")
      continue
    try:
      regex, cost = compile_suffix(pattern, max(map(len, names), default=0))
      compiled.append((regex, value))
      total += cost
    except (re.error, OverflowError, RecursionError, PeftError) as error:
      problems.append(f"{field}: {short(pattern)} is no pattern that is read here ({str(error)[:200]})")
  if len(compiled) * len(names) > 10**7 or total * len(names) > 30 * _LARGEST_COST:
    problems.append(f"{field}: {len(compiled)} patterns for {len(names)} modules: matching them could take too long")
    compiled = []
  return {name: next((value for regex, value in compiled if regex.match(name)), default) for name in names}


# A pattern is a regex from a file that anybody may have written. Matching is by backtracking, whose cost is at most the
# product of what each element may try; elements that could multiply it further are not taken.
_TOKEN = re.compile(
  r"\\[.\-_dDwWsSbBA-Z]|\[\^?[^\[\]\\]+\]|\(\?:|[(|)^$]|[*+?]|\{\d{1,2}(?:,\d{0,2})?\}|[^\\\[\](){}*+?|]"
)


_LARGEST_COST = 10**8


def compile_suffix(pattern: str, longest: int) -> tuple[re.Pattern[str], float]:
  r"""A pattern as PEFT applies it, `(.*\.)?(pattern)$`, and the most steps it takes on a name of `longest` characters.

  Raises:
    PeftError, re.error: if they are too many, or it is no regex.
  """
  position, choices, previous = 0, [1], "("
  loops, cost, steps = 1, 1.0, longest + 2.0  # `.*` before the pattern is the first loop
  while position < len(pattern):
    found = _TOKEN.match(pattern, position)
    token = found.group() if found else pattern[position]
    if found is None or len(pattern) > 4 * LONGEST_NAME:
      raise PeftError(f"at {token!r}: expected names, '.', classes, groups without quantifiers and '|'")
    if token[0] in "*+?{":
      if previous[0] in "()|^$*+?{" and not (previous == ")" and token == "?"):
        raise PeftError(f"{token!r} after {previous!r}: expected quantifiers after single characters")
      loops, cost = (loops, 2 * cost) if token == "?" else (loops + 1, cost)
    elif token in ("(", "(?:"):
      choices.append(1)
    elif token == "|":
      choices[-1] += 1
    elif token == ")" and len(choices) > 1:
      cost *= choices.pop()
    previous, position = token, position + len(token)
    steps = cost * math.prod(choices) * (longest + 2.0) ** loops / math.factorial(loops)
    if loops > 8 or steps > _LARGEST_COST:
      raise PeftError("matching it could take too long: too many quantifiers or alternatives")
  return re.compile(rf"(.*\.)?({pattern})$"), steps


LONGEST_NAME = 512


def is_number(value: Any) -> bool:
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return -1e30 < value < 1e30  # False for NaN; no overflow for a whole number of any length


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
  """Regexes over ends of names for the values that are not the default."""
  patterns = {}
  for value in sorted(set(values.values()) - {default}):
    chosen = [name for name in values if values[name] == value]
    for ending in endings(chosen, list(values)):
      patterns[("^" if ending in values else "") + re.escape(ending)] = value
  return patterns


def endings(chosen: Collection[str], names: Collection[str]) -> list[str]:
  """The fewest ends of names, in whole components, that all of `chosen` have and no other of `names` has."""
  others = {ending for name in set(names) - set(chosen) for ending in _endings(name)}
  return sorted({next((e for e in _endings(name) if e not in others), name) for name in chosen})


def _endings(name: str) -> list[str]:
  parts = name.split(".")
  return [".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1)]


def target_modules(
  adapted: Sequence[str], known: Collection[str], saved: Collection[str], *, complete: bool
) -> list[str] | str:
  """What picks exactly the adapted modules by PEFT's rule: a list of ends of names, or one regex over whole names.

  Raises:
    PeftError: if PEFT would leave an adapted module out, or save another one with those to save.
  """
  problems = [
    f"{name}: PEFT adapts nothing in a module that is saved whole ({module})"
    for name in adapted
    for module in saved
    if f".{name}.".find(f".{module}.") >= 0
  ]
  problems += [
    f"{name}: PEFT would save it whole, too, as its name ends like {module}"
    for name in adapted
    for module in saved
    if name.endswith(module)
  ]
  if problems:
    raise fail("save", problems, "Train fewer leaves whole, or adapt fewer.")
  targets = endings(adapted, known) if complete else list(adapted)
  if any(name.endswith(f".{target}") for target in targets for name in set(known) - set(adapted)):
    return "|".join(re.escape(name) for name in adapted)
  return targets
