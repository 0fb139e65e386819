"""PEFT's patterns over module names: what is read is bounded in cost, what is written picks the modules meant alone."""

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


# A pattern is a regex from a file that anybody may have written. Matching backtracks, at a cost of at most the product
# of each element's choices. Elements that could multiply it further (nested quantifiers, back-references, look-ahead)
# are refused.
_TOKEN = re.compile(
  r"\\[.\-_dDwWsSbBA-Z]|\[\^?[^\[\]\\]+\]|\(\?:|[(|)^$]|[*+?]|\{\d{1,2}(?:,\d{0,2})?\}|[^\\\[\](){}*+?|]"
)

LONGEST_NAME = 512  # characters of a module's name

_LARGEST_COST = 10**8  # steps to match one name


def compile_suffix(pattern: str, longest: int) -> tuple[re.Pattern[str], float]:
  r"""A pattern as PEFT applies it, `(.*\.)?(pattern)$`, and the most steps it takes on a name of `longest` characters.

  Raises:
    PeftError, re.error: if they are too many, or it is no regex.
  """
  position, choices, previous = 0, [1], "("  # choices: alternatives of each group that is open
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


def is_number(value: Any) -> bool:
  """Whether a value from JSON is a finite number."""
  if isinstance(value, bool) or not isinstance(value, (int, float)):
    return False
  return -1e30 < value < 1e30  # False for NaN; no overflow for a whole number of any length


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
