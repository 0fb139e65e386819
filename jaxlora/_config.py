"""`LoraConfig`: which leaves adapt and how, validated when made, and the plan it makes for each leaf."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._axes import ROLES
from jaxlora._initializers import INITIALIZERS, INITS, from_weight
from jaxlora._variants import VARIANTS
from jaxlora._weight import SCALINGS

ALL_LINEAR = "all-linear"
ATTENTION = "attention"
PRESETS = (ALL_LINEAR, ATTENTION)
# What an entry of `overrides` may set for the leaves that its pattern matches.
OVERRIDABLE = ("rank", "alpha", "scaling", "init", "dropout", "dtype", "variant")


class _Frozen(Mapping[str, Any]):
  """A mapping that nobody changes. Its order is part of its value, as the first pattern that matches counts."""

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


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What to adapt, and how.

  Patterns: a string is a regex that must match a whole "/"-joined path; a list holds names, each a run of path
  components (`["query", "attn/out"]`), which select the kernels under a module or one leaf; a callable takes
  `(path, leaf)` and returns a bool. Mappings (`overrides`, `axes`) are keyed by regexes; the first that matches
  a leaf counts. The config keeps checked copies of what it is given; it is hashable, and equal by value.

  Args:
    rank: number of terms of each update; at most the smaller of a weight's fan-in and fan-out.
    alpha: numerator of the scale; `None` means `alpha = rank`, a scale of 1.
    targets: the leaves to adapt: a pattern, or a preset. `"all-linear"`: every kernel that is contracted, except
      embeddings and the last classifier. `"attention"`: the kernels of attention layers.
    exclude: a pattern of leaves that `targets` matches and that stay frozen all the same.
    overrides: regex -> fields of its own (any of rank, alpha, scaling, init, dropout, dtype, variant).
    axes: regex -> role string, one letter per axis: `i` contracted, `o` free, `s` stacked (`"sio"`: experts).
    train: a pattern of leaves trained whole, such as biases, norms or a new head. Wins over `targets`.
    scaling: `"standard"` (alpha / rank) or `"rslora"` (alpha / sqrt(rank), Kalajdzievski 2023, arXiv:2312.03732).
    init: how A starts, where B starts at zero: `"kaiming"`, `"he_uniform"` or `"gaussian"`. Or how both start, with an
      update that is taken off again, so that the adapted model is the base to rounding: `"orthogonal"`, `"pissa"`
      (the weight's principal part; `"pissa_niter_4"`: by 4 steps of a randomised SVD), `"olora"` (its QR factors).
      What starts from data is `jaxlora.init_from_data`.
    dropout: probability in [0, 1) that an element of the adapter's input is dropped while training.
    dtype: dtype of the factors; `None` means the weight's own.
    variant: `"lora"`; `"lora_fa"` (A frozen); `"dora"` (a magnitude for every output, its norm a constant for the
      gradient; `"dora_exact"`: not so); `"vera"` (A and B frozen and shared, two trained vectors); `"adalora"`
      (singular values that can be pruned); `"loha"`, `"lokr"` (Hadamard and Kronecker products).

  Raises:
    TypeError, ValueError: naming the field, what was found and what was expected.

  Example:
    >>> LoraConfig(rank=4, alpha=8, targets=["query", "value"], train=r".*/head/.*").rank
    4
  """

  rank: int = 8
  alpha: float | None = None
  targets: _paths.Pattern = ALL_LINEAR
  exclude: _paths.Pattern | None = None
  overrides: Mapping[str, Mapping[str, Any]] | None = None
  axes: Mapping[str, str] | None = None
  train: _paths.Pattern | None = None
  scaling: str = "standard"
  init: str = "kaiming"
  dropout: float = 0.0
  dtype: Any = None
  variant: str = "lora"

  def __post_init__(self):
    checked = {field: _CHECKS[field](getattr(self, field), field) for field in OVERRIDABLE}
    for field in ("targets", "exclude", "train"):
      checked[field] = _pattern(getattr(self, field), field)
    for field, check in (("axes", _roles), ("overrides", _fields)):
      checked[field] = _mapping(getattr(self, field), field, check)
    for field, value in checked.items():
      object.__setattr__(self, field, value)

  def to_dict(self) -> dict[str, Any]:
    """The config as JSON-ready values; `from_dict` is its inverse.

    Raises:
      TypeError: where a pattern is a callable, which JSON cannot hold.
    """
    for field in ("targets", "exclude", "train"):
      if callable(getattr(self, field)):
        raise TypeError(f"LoraConfig.{field} is a callable, which to_dict cannot write; use a regex or names.")

    def plain(value: Any) -> Any:
      if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
      if isinstance(value, np.dtype):
        return value.name
      return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value

    return {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}

  @classmethod
  def from_dict(cls, fields: Mapping[str, Any]) -> "LoraConfig":
    """A config from `to_dict`'s values; fields left out take their defaults.

    Raises:
      TypeError: if `fields` is no mapping.
      ValueError: on a field that does not exist, with the ones that do.
    """
    if not isinstance(fields, Mapping):
      raise TypeError(f"LoraConfig.from_dict: found {fields!r}, expected a mapping of fields, as to_dict returns it.")
    known = [field.name for field in dataclasses.fields(cls)]
    for name in fields:
      _choice("from_dict", name, known)
    return cls(**fields)


@dataclasses.dataclass(frozen=True)
class LeafPlan:
  """What becomes of one adapted leaf: the config's fields with the overrides of its path applied."""

  path: str
  rank: int
  alpha: float
  scaling: str
  init: str
  dropout: float
  dtype: Any
  variant: str


def leaf_plan(config: LoraConfig, path: str) -> LeafPlan:
  """The config's fields for one leaf."""
  fields = {field: getattr(config, field) for field in OVERRIDABLE}
  fields |= first_match(config.overrides, path) or {}
  if fields["alpha"] is None:
    fields["alpha"] = float(fields["rank"])
  return LeafPlan(path=path, **fields)


def first_match(patterns: Mapping[str, Any] | None, path: str) -> Any | None:
  """The value of the first regex that matches the whole path."""
  for pattern, value in (patterns or {}).items():
    if _paths.compile_regex(pattern, "").fullmatch(path):
      return value
  return None


def _pattern(value: Any, field: str) -> Any:
  """A checked pattern; a list of names becomes a tuple, that nobody changes."""
  if value is None and field != "targets":
    return None
  if not (field == "targets" and isinstance(value, str) and value in PRESETS):
    _paths.validate_pattern(value, field)
  return value if isinstance(value, str) or callable(value) else tuple(value)


def _mapping(value: Any, field: str, check: Callable[[Any, str], Any]) -> _Frozen | None:
  """A checked copy of a mapping keyed by regexes."""
  if value is None:
    return None
  for pattern in _keyed_by_strings(value, field):
    _paths.compile_regex(pattern, field)
  return _Frozen({pattern: check(item, f"{field}[{pattern!r}]") for pattern, item in value.items()})


def _keyed_by_strings(value: Any, field: str) -> Mapping[str, Any]:
  if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
    raise TypeError(f"LoraConfig.{field}: found {value!r}, expected a dict keyed by strings.")
  return value


def _roles(value: Any, field: str) -> str:
  if not isinstance(value, str) or not value or set(value) - set(ROLES):
    raise ValueError(
      f"LoraConfig.{field}: found {value!r}, expected one letter per axis out of 'i' (contracted),"
      " 'o' (free), 's' (stacked), such as 'io'."
    )
  if "i" not in value or "o" not in value:
    raise ValueError(
      f"LoraConfig.{field}: {value!r} needs at least one 'i' and one 'o' axis: a low-rank update"
      " lies between contracted and free axes."
    )
  return value


def _fields(value: Any, field: str) -> _Frozen:
  """One entry of `overrides`."""
  for name in _keyed_by_strings(value, field):
    _choice(field, name, OVERRIDABLE)
  return _Frozen({name: _CHECKS[name](value[name], f"{field}[{name!r}]") for name in OVERRIDABLE if name in value})


def _choice(field: str, value: Any, choices: Sequence[str]) -> None:
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


def holds_factors(dtype: Any) -> bool:
  """Whether factors can have this dtype: real, signed, and wide enough for JAX to draw random numbers in it."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return False
  info = jnp.finfo(dtype)
  return bool(info.bits >= 8 and info.min < 0)


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


def _one_of(choices: Sequence[str]) -> Callable[[Any, str], str]:
  def check(value: Any, field: str) -> str:
    _choice(field, value, choices)
    return value

  return check


def _init(value: Any, field: str) -> str:
  if not isinstance(value, str) or (value not in INITIALIZERS and from_weight(value) is None):
    raise ValueError(f"LoraConfig.{field}: found {value!r}, expected one of {', '.join(map(repr, INITS))}.")
  return value


_CHECKS = {
  "rank": _rank,
  "alpha": _alpha,
  "dropout": _dropout,
  "dtype": _dtype,
  "scaling": _one_of(tuple(SCALINGS)),
  "init": _init,
  "variant": _one_of(tuple(VARIANTS)),
}
