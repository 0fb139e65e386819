"""PEFT's patterns over module names: what is read is bounded in cost, what is written picks the modules meant alone."""

from collections.abc import Callable, Collection, Mapping, Sequence
import re
from typing import Any

from jaxlora._base.text import short
from jaxlora.peft._records import PeftError, fail
from jaxlora.peft._regex import Name, Steps, compile_pattern


def is_number(value: Any) -> bool:
  """Whether a value from JSON is a finite number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return -1e30 < value < 1e30  # False for NaN; no overflow for a whole number of any length


_CHECKS = {
  "rank_pattern": ("r", lambda x: isinstance(x, int) and is_number(x) and x >= 1, "a whole number of at least 1"),
  "alpha_pattern": ("lora_alpha", is_number, "a finite number"),
}


def values_by_pattern(
  config: Mapping[str, Any], field: str, names: Collection[str], problems: list[str]
) -> dict[str, Any]:
  """The rank or alpha of every module: of the first pattern that matches the end of its name, else the default.

  Args:
    config: `adapter_config.json`.
    field: `"rank_pattern"` or `"alpha_pattern"`.
    names: of the modules.
    problems: what is wrong with the patterns is added to these; values that are wrong are left out.
  """
  default_field, check, expected = _CHECKS[field]
  default, patterns = config.get(default_field, 8), config.get(field)
  patterns = {} if patterns is None else patterns
  if not check(default):
    problems.append(f"{default_field}: found {short(default)}, expected {expected}")
    default = None
  if not isinstance(patterns, dict):
    problems.append(f"{field}: found {short(patterns)}, expected an object of patterns")
    return dict.fromkeys(names, default)
  compiled, characters = [], 0
  for pattern, value in patterns.items():
    if not check(value):
      problems.append(f"{field}[{short(pattern)}]: found {short(value)}, expected {expected}")
      continue
    plain = len(pattern) <= LONGEST_NAME and _PLAIN.fullmatch(pattern)
    characters += 0 if plain else len(pattern)
    if characters > _MOST_CHARACTERS:
      problems.append(f"{field}: {characters:,} characters of patterns and more: matching them could take too long")
      break
    try:
      compiled.append((_compiled(pattern, plain=bool(plain)), value))
    except (re.error, OverflowError, RecursionError, Warning, PeftError) as error:
      problems.append(f"{field}: {short(pattern)} is no pattern that is read here ({str(error)[:200]})")
  try:
    return _first_values(compiled, names, default)
  except PeftError as error:
    problems.append(f"{field}: {len(compiled)} patterns for {len(names)} modules: {error}")
    return dict.fromkeys(names, default)


LONGEST_NAME = 512  # characters of a module's name

_MOST_MATCHES = 10**7  # of plain patterns

_MOST_STEPS = 3 * 10**6  # of all others: a second or two

_MOST_CHARACTERS = 1 << 18  # of all others

_PLAIN = re.compile(r"\^?(?:[\w\-]|\.|\\[.\-_])+\$?", re.ASCII)  # without choices, which Python matches at once


def _compiled(pattern: str, *, plain: bool) -> Callable[[Name], bool]:
  r"""A pattern as PEFT applies it: `re.match(rf"(.*\.)?({pattern})$", name)`."""
  applied = rf"(.*\.)?({pattern})$"
  if plain:
    regex = re.compile(applied)
    return lambda name: regex.match(name.text) is not None
  return compile_pattern(applied).matches


def _first_values(
  compiled: Sequence[tuple[Callable[[Name], bool], Any]], names: Collection[str], default: Any
) -> dict[str, Any]:
  """For each name the value of the first pattern that matches it."""
  if len(compiled) * len(names) > _MOST_MATCHES:
    raise PeftError("matching them could take too long")
  steps, values = Steps(_MOST_STEPS), {}
  for text in names:
    name = Name(text, steps)
    values[text] = next((value for matches, value in compiled if matches(name)), default)
  return values


def exact_patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
  """Regexes over ends of names, as in `rank_pattern`, for the values by name that are not the default."""
  patterns = {}
  for value in sorted(set(values.values()) - {default}):
    chosen = [name for name in values if values[name] == value]
    for ending in endings(chosen, list(values)):
      patterns[("^" if ending in values else "") + re.escape(ending)] = value
  return patterns


def endings(chosen: Collection[str], names: Collection[str]) -> list[str]:
  """For each of `chosen` the shortest end of its name, in whole components, that no other of `names` ends with."""
  others = {ending for name in set(names) - set(chosen) for ending in _endings_of(name)}
  return sorted({next((e for e in _endings_of(name) if e not in others), name) for name in chosen})


def _endings_of(name: str) -> list[str]:
  """`a.b.c` -> `c`, `b.c`, `a.b.c`."""
  parts = name.split(".")
  return [".".join(parts[k:]) for k in range(len(parts) - 1, -1, -1)]


def target_modules(
  adapted: Sequence[str], known: Collection[str], saved: Collection[str], *, complete: bool
) -> list[str] | str:
  """PEFT's `target_modules` for exactly the adapted modules: a list of ends of names, or one regex over whole names.

  Args:
    adapted: names of the adapted modules.
    known: names of all modules that are known of the model.
    saved: PEFT's `modules_to_save`.
    complete: whether `known` are all modules of the model; if not, the names are given in full.

  Raises:
    PeftError: if PEFT would leave out an adapted module, or save it whole, because of a module to save.
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
