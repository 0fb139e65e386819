"""The fields of a config, checked one by one."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import math
import operator
from typing import Any

import jax.numpy as jnp

from jaxlora._adapt.initializers import INITIALIZERS, INITS, gives_both
from jaxlora._base.dtypes import holds_factors
from jaxlora._base.patterns import compile_regex, validate_pattern
from jaxlora._base.text import listed
from jaxlora._weight.roles import ROLES
from jaxlora._weight.variant import VARIANTS
from jaxlora._weight.weight import SCALINGS

ALL_LINEAR = "all-linear"

ATTENTION = "attention"

PRESETS = (ALL_LINEAR, ATTENTION)

# What an entry of `overrides` may set for the leaves that its pattern matches.
OVERRIDABLE = ("rank", "alpha", "scaling", "init", "zero", "dropout", "dtype", "variant")

ZEROS = ("a", "b")

MOST_TOKENS = 2**24  # of which a tree can number the rows


class Frozen(Mapping[str, Any]):
  """A read-only mapping. Its order is part of its value, as the first pattern that matches counts."""

  def __init__(self, items: Mapping[str, Any]):
    self._items = dict(items)

  def __getitem__(self, key: str) -> Any:
    return self._items[key]

  def __iter__(self) -> Iterator[str]:
    return iter(self._items)

  def __len__(self) -> int:
    return len(self._items)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Mapping) and tuple(self.items()) == tuple(other.items())

  def __hash__(self) -> int:
    return hash(tuple(self.items()))

  def __repr__(self) -> str:
    return repr(self._items)


def checked_pattern(value: Any, field: str) -> Any:
  """A checked pattern; a list of names becomes a tuple."""
  if value is None and field != "targets":
    return None
  if field == "targets" and isinstance(value, (list, tuple)) and not value:
    return ()  # no factors, only leaves that train whole
  if not (field == "targets" and isinstance(value, str) and value in PRESETS):
    validate_pattern(value, f"LoraConfig.{field}")
  return value if isinstance(value, str) or callable(value) else tuple(value)


def checked_mapping(value: Any, field: str, check: Callable[[Any, str], Any]) -> Frozen | None:
  """A checked copy of a mapping keyed by regexes."""
  if value is None:
    return None
  for pattern in _keyed_by_strings(value, field):
    compile_regex(pattern, f"LoraConfig.{field}")
  return Frozen({pattern: check(item, f"{field}[{pattern!r}]") for pattern, item in value.items()})


def _keyed_by_strings(value: Any, field: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
    raise TypeError(f"LoraConfig.{field}: found {value!r}, expected a dict keyed by strings.")
  return value


def checked_letters(value: Any, field: str) -> str:
  """Roles of any axes, such as `"os"` for a vector of each layer of a stack."""
  if not isinstance(value, str) or not value or set(value) - set(ROLES):
    raise ValueError(
      f"LoraConfig.{field}: found {value!r}, expected one letter per axis out of 'i' (contracted),"
      " 'o' (free), 's' (stacked), such as 'io'."
    )
  return value


def checked_roles(value: Any, field: str) -> str:
  """The roles of a weight that a low-rank update fits."""
  checked_letters(value, field)
  if "i" not in value or "o" not in value:
    raise ValueError(
      f"LoraConfig.{field}: {value!r} needs at least one 'i' and one 'o' axis: a low-rank update"
      " lies between contracted and free axes."
    )
  return value


def checked_tokens(value: Any, field: str) -> tuple[int, ...]:
  """One entry of `tokens`: a list of different token ids."""
  try:
    ids = tuple(operator.index(token) for token in value) if not isinstance(value, (str, Mapping)) else ()
  except TypeError:
    ids = ()
  if not ids or any(isinstance(token, bool) for token in value) or not all(0 <= token <= MOST_TOKENS for token in ids):
    raise ValueError(f"LoraConfig.{field}: found {value!r}, expected a list of token ids, such as [50256, 50257].")
  if twice := sorted({token for token in ids if ids.count(token) > 1}):
    raise ValueError(f"LoraConfig.{field}: found {listed([*map(str, twice)])} twice, expected each token once.")
  return ids


def checked_fields(value: Any, field: str) -> Frozen:
  """One entry of `overrides`."""
  for name in _keyed_by_strings(value, field):
    check_choice(field, name, OVERRIDABLE)
  return Frozen({name: CHECKS[name](value[name], f"{field}[{name!r}]") for name in OVERRIDABLE if name in value})


def check_choice(field: str, value: Any, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(f"LoraConfig.{field}: found {value!r}, expected one of {', '.join(map(repr, choices))}.")


def _rank(value: Any, field: str) -> int:
  try:
    rank = operator.index(value)
  except TypeError:
    rank = 0
  if isinstance(value, bool) or rank < 1:
    raise ValueError(f"LoraConfig.{field}: found {value!r}, expected a whole number of at least 1, such as 8.")
  return rank


def _finite(value: Any) -> float:
  if isinstance(value, (bool, str)):
    return math.nan
  try:
    return float(value)
  except (TypeError, ValueError):
    return math.nan


def _alpha(value: Any, field: str) -> float | None:
  if value is None:
    return None
  alpha = _finite(value)
  if not (math.isfinite(alpha) and alpha > 0):
    raise ValueError(
      f"LoraConfig.{field}: found {value!r}, expected a finite number above 0, or None for alpha = rank."
    )
  return alpha


def _dropout(value: Any, field: str) -> float:
  dropout = _finite(value)
  if not 0 <= dropout < 1:
    raise ValueError(f"LoraConfig.{field}: found {value!r}, expected a probability in [0, 1), such as 0.05.")
  return dropout


def _dtype(value: Any, field: str) -> Any:
  if value is None:
    return None
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = jnp.dtype(int)
  if not holds_factors(dtype):
    raise ValueError(
      f"LoraConfig.{field}: found {value!r}, expected a real floating dtype of at least 8 bits, such as 'bfloat16', or"
      " None for the weight's own."
    )
  return dtype


def _scaling(value: Any, field: str) -> str:
  check_choice(field, value, tuple(SCALINGS))
  return value


def _init(value: Any, field: str) -> Any:
  if callable(value):
    return value
  if not isinstance(value, str) or (value not in INITIALIZERS and not gives_both(value)):
    raise ValueError(
      f"LoraConfig.{field}: found {value!r}, expected one of {', '.join(map(repr, INITS))}, or a function (key, shape,"
      " dtype, fan_in, rank) -> A."
    )
  return value


def _zero(value: Any, field: str) -> str:
  check_choice(field, value, ZEROS)
  return value


def _variant(value: Any, field: str) -> str:
  check_choice(field, value, tuple(VARIANTS))  # read at each call: a user may have registered one since
  return value


CHECKS: dict[str, Callable[[Any, str], Any]] = {
  "rank": _rank,
  "alpha": _alpha,
  "dropout": _dropout,
  "dtype": _dtype,
  "scaling": _scaling,
  "init": _init,
  "zero": _zero,
  "variant": _variant,
}
