"""The options of `init_from_data`, and what both methods share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from jaxlora._base.dtypes import wide
from jaxlora._base.matrix import orthonormal
from jaxlora._base.text import listed
from jaxlora._weight.roles import factor_shape, fan
from jaxlora._weight.weight import LoraWeight


class Options(NamedTuple):
  """The checked options of `init_from_data`.

  Attributes:
    fn: of the parameters and a batch.
    batches, key, rho, gamma, oversample, iterations: as the user gave them.
    keeps: whether leaves that the method cannot start keep their start.
  """

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
  """The fan-in (`"i"`) or fan-out (`"o"`) of a weight."""
  return fan(tuple(weight.base.shape), weight.roles, own)


@jax.jit
def orthonormal_rows(x: jax.Array) -> jax.Array:
  return orthonormal(x.mT).mT


def random_rows(key: jax.Array, shape: tuple[int, ...], like: Any) -> jax.Array:
  return jax.random.normal(key, shape, wide(like)).astype(like.dtype)


def check_missing(missing: dict[str, str], options: Options, what: str) -> None:
  """Raises for leaves that the method cannot start, each with its reason, unless they may keep their start."""
  if missing and not options.keeps:
    reasons = [f"{path} ({reason})" for path, reason in missing.items()]
    raise ValueError(
      f"init_from_data: {what} for {listed(reasons)}. Leave these leaves at their start with on_missing='keep', or"
      " adapt without them."
    )


def without_start(weight: LoraWeight) -> dict[str, Any]:
  """The extra parts of a weight, but for the factors that its initialiser subtracts."""
  return {name: part for name, part in weight.extra.items() if name not in ("a0", "b0")}
