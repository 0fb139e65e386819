"""`LoraConfig`: which leaves adapt and how, validated when made, and the plan it makes for each leaf."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._initializers import INITIALIZERS
from jaxlora._weight import ROLES, SCALINGS

ALL_LINEAR = "all-linear"
ATTENTION = "attention"
PRESETS = (ALL_LINEAR, ATTENTION)
VARIANTS = ("lora",)
# What an entry of `overrides` may set for the leaves that its pattern matches.
OVERRIDABLE = ("rank", "alpha", "scaling", "init", "dropout", "dtype")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """What to adapt, and how.

  Patterns: a string is a regex that must match a whole "/"-joined path; a list holds names, each a run of path
  components (`["query", "attn/out"]`), which select the kernels under a module or one leaf; a callable takes
  `(path, leaf)` and returns a bool. Mappings (`overrides`, `axes`) are keyed by regexes; the first that matches
  a leaf counts.

  Args:
    rank: number of terms of each update; at most the smaller of a weight's fan-in and fan-out.
    alpha: numerator of the scale; `None` means `alpha = rank`, a scale of 1.
    targets: the leaves to adapt: a pattern, or a preset. `"all-linear"`: every kernel that is contracted, except
      embeddings and the last classifier. `"attention"`: the kernels of attention layers.
    exclude: a pattern of leaves that `targets` matches and that stay frozen all the same.
    overrides: regex -> fields of its own (any of rank, alpha, scaling, init, dropout, dtype).
    axes: regex -> role string, one letter per axis: `i` contracted, `o` free, `s` stacked (`"sio"`: experts).
    train: a pattern of leaves trained whole, such as biases, norms or a new head. Wins over `targets`.
    scaling: `"standard"` (alpha / rank) or `"rslora"` (alpha / sqrt(rank), Kalajdzievski 2023, arXiv:2312.03732).
    init: how A starts: `"kaiming"`, `"he_uniform"` or `"gaussian"`; B starts at zero.
    dropout: probability in [0, 1) that an element of the adapter's input is dropped while training.
    dtype: dtype of the factors; `None` means the weight's own.
    variant: `"lora"`.

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
    for field in OVERRIDABLE:
      object.__setattr__(self, field, _checked(field, getattr(self, field), field))
    _choice("variant", self.variant, VARIANTS)
    if not (isinstance(self.targets, str) and self.targets in PRESETS):
      _paths.validate_pattern(self.targets, "targets")
    for field in ("exclude", "train"):
      if getattr(self, field) is not None:
        _paths.validate_pattern(getattr(self, field), field)
    for pattern, roles in _mapping(self.axes, "axes").items():
      if not isinstance(roles, str) or not roles or set(roles) - set(ROLES):
        raise ValueError(
          f"LoraConfig.axes[{pattern!r}]: found {roles!r}, expected one letter per axis out of 'i' (contracted),"
          " 'o' (free), 's' (stacked), such as 'io'."
        )
      if "i" not in roles or "o" not in roles:
        raise ValueError(
          f"LoraConfig.axes[{pattern!r}]: {roles!r} needs at least one 'i' and one 'o' axis: a low-rank update"
          " lies between contracted and free axes."
        )
    for pattern, fields in _mapping(self.overrides, "overrides").items():
      for field, value in _mapping(fields, f"overrides[{pattern!r}]", regex=False).items():
        _choice(f"overrides[{pattern!r}]", field, OVERRIDABLE)
        _checked(field, value, f"overrides[{pattern!r}][{field!r}]")

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
      ValueError: on a field that does not exist, with the ones that do.
    """
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


def leaf_plan(config: LoraConfig, path: str) -> LeafPlan:
  """The config's fields for one leaf."""
  fields = {field: getattr(config, field) for field in OVERRIDABLE}
  for field, value in (first_match(config.overrides, path) or {}).items():
    fields[field] = _checked(field, value, field)
  if fields["alpha"] is None:
    fields["alpha"] = float(fields["rank"])
  return LeafPlan(path=path, **fields)


def first_match(patterns: Mapping[str, Any] | None, path: str) -> Any | None:
  """The value of the first regex that matches the whole path."""
  for pattern, value in (patterns or {}).items():
    if _paths.compile_regex(pattern, "").fullmatch(path):
      return value
  return None


def _mapping(value: Any, field: str, regex: bool = True) -> Mapping[str, Any]:
  if value is None:
    return {}
  if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
    raise TypeError(f"LoraConfig.{field}: found {value!r}, expected a dict keyed by strings.")
  if regex:
    for pattern in value:
      _paths.compile_regex(pattern, field)
  return value


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


def _dtype(value: Any, field: str) -> Any:
  if value is None:
    return None
  try:
    dtype = jnp.dtype(value)
  except TypeError:
    dtype = jnp.dtype(int)
  if not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(f"LoraConfig.{field}: found {value!r}, expected a floating dtype such as 'bfloat16', or None.")
  return dtype


def _one_of(choices: Sequence[str]) -> Callable[[Any, str], str]:
  def check(value: Any, field: str) -> str:
    _choice(field, value, choices)
    return value

  return check


_CHECKS = {
  "rank": _rank,
  "alpha": _alpha,
  "dropout": _dropout,
  "dtype": _dtype,
  "scaling": _one_of(tuple(SCALINGS)),
  "init": _one_of(tuple(INITIALIZERS)),
}


def _checked(field: str, value: Any, label: str) -> Any:
  return _CHECKS[field](value, label)
