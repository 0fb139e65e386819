"""What `init_from_data` was asked for, and what both methods share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlora._base.dtypes import wide
from jaxlora._base.matrix import orthonormal
from jaxlora._base.text import listed
from jaxlora._weight.roles import factor_shape, fan
from jaxlora._weight.weight import LoraWeight


class Asked(NamedTuple):
  """What `init_from_data` was asked for, checked."""

  fn: Callable[..., Any]
  batches: Any
  key: jax.Array
  rho: float
  gamma: float
  oversample: int
  iterations: int
  keeps: bool


def rows_shape(weight: LoraWeight, own: str, count: int) -> tuple[int, ...]:
  """The shape of a factor of `count` rows."""
  return factor_shape(tuple(weight.base.shape), weight.roles, own, count)


def side(weight: LoraWeight, own: str) -> int:
  return fan(tuple(weight.base.shape), weight.roles, own)


@jax.jit
def orthonormal_rows(x: jax.Array) -> jax.Array:
  return orthonormal(x.mT).mT


def random_rows(key: jax.Array, shape: tuple[int, ...], like: Any) -> jax.Array:
  return jax.random.normal(key, shape, wide(like)).astype(like.dtype)


def check_missing(missing: dict[str, str], asked: Asked, what: str) -> None:
  if missing and not asked.keeps:
    reasons = [f"{path} ({reason})" for path, reason in missing.items()]
    raise ValueError(
      f"init_from_data: {what} for {listed(reasons)}. Leave these leaves at their start with on_missing='keep', or"
      " adapt without them."
    )


def without_start(weight: LoraWeight) -> dict[str, Any]:
  return {name: part for name, part in weight.extra.items() if name not in ("a0", "b0")}
