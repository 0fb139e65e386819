"""Where the parts of a weight lie: as the axes of the base do, the rank on every device."""

from typing import Any

import jax
import numpy as np

from jaxlora._weight.roles import RANK, factor_axes
from jaxlora._weight.weight import LoraWeight, parts


def axes_of_part(node: Any, part: str) -> tuple[Any, ...]:
  """Which axes of the weight a part holds, as its shape tells; none where it is laid out in another way."""
  if not isinstance(node, LoraWeight):
    return ()
  for own in "io":
    axes = factor_axes(node.roles, own)
    found = np.shape(parts(node)[part])
    if len(axes) == len(found) and all(d == RANK or node.shape[d] == n for d, n in zip(axes, found, strict=True)):
      return axes
  return ()


def put_on(array: jax.Array, sharding: Any) -> jax.Array:
  return array if sharding is None else jax.device_put(array, sharding)


def sharding_of(node: Any, part: str, ndim: int) -> Any:
  """Where a part goes: its axes where the base's go, whatever the base does not have on every device of the base."""
  base = node.base
  if isinstance(base, jax.Array) and not base.committed:
    return None
  sharding = getattr(base, "sharding", None)
  if isinstance(sharding, jax.sharding.SingleDeviceSharding) or (part == "value" and sharding is not None):
    return sharding
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = (*sharding.spec, *[None] * (len(node.shape) - len(sharding.spec)))
    own = [spec[d] if isinstance(d, int) else None for d in axes_of_part(node, part)] or [None] * ndim
    return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec(*own), memory_kind=sharding.memory_kind)
  if sharding is None:
    return None
  mesh = jax.sharding.Mesh(np.array(sorted(sharding.device_set, key=lambda device: device.id)), "devices")
  return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
