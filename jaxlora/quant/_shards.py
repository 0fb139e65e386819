"""Where codes and scales lie on a mesh: as the floats did, and no block is cut by a shard."""

from collections.abc import Sequence
import math
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora._quant.array import QuantizedArray
from jaxlora._transform.coded_equations import spec_of_part
from jaxlora._weight.placement import put_on


def check_shards(said: str, path: str, leaf: Any, block: Sequence[int], remedy: str) -> None:
  """Raises where a device would hold a part of a block, naming the axis of the leaf and those of the mesh.

  Args:
    said: the function that an error begins with.
    path: of the leaf.
    leaf: an array, or a shape that says how it lies.
    block: elements that share a scale, along each axis.
    remedy: a sentence; `{own}` stands for the elements that a device has along the axis.
  """
  sharding = named(leaf)
  if sharding is None:
    return
  for d, (n, b) in enumerate(zip(leaf.shape, block, strict=True)):
    names = sharding.spec[d] if d < len(sharding.spec) else None
    count = math.prod(sharding.mesh.shape[name] for name in _tuple(names))
    if count > 1 and (n // count) % b:
      own = n // count
      raise ValueError(
        f"{said}: {path}: axis {d} of {n} is split over {', '.join(map(repr, _tuple(names)))}, {own} for each of"
        f" {count} devices, and blocks of {b} run along it: one would lie on two devices. "
        + remedy.replace("{own}", str(own))
      )


def placed(codes: QuantizedArray, leaf: Any) -> QuantizedArray:
  """The parts of a leaf's codes along the axes of its own sharding; second-level scales whole where shards cut them."""
  sharding = named(leaf)
  return codes if sharding is None else _placed(codes, tuple(codes.shape), sharding)


def whole_where_types_say_shards(array: jax.Array) -> jax.Array:
  """An array of an explicit mesh, whose type follows no reshape into blocks, whole on every device; or as it is."""
  sharding = named(array)
  if sharding is None or jax.sharding.AxisType.Explicit not in sharding.mesh.axis_types:
    return array
  return jax.device_put(array, NamedSharding(sharding.mesh, PartitionSpec()))


def named(leaf: Any) -> NamedSharding | None:
  """The sharding of an array over a mesh; `None` for any other, and where it is not known."""
  sharding = getattr(leaf, "sharding", None) if not isinstance(leaf, jax.core.Tracer) else None
  return sharding if isinstance(sharding, NamedSharding) else None


def _placed(node: Any, shape: tuple[int, ...], sharding: NamedSharding) -> Any:
  if isinstance(node, QuantizedArray):
    return node.with_parts({name: _placed(part, shape, sharding) for name, part in node.parts().items()})
  spec = spec_of_part(sharding.spec, node.shape, shape, dict(sharding.mesh.shape)) or ()
  there = NamedSharding(sharding.mesh, PartitionSpec(*spec), memory_kind=sharding.memory_kind)
  return put_on(node, there)


def _tuple(names: Any) -> tuple[Any, ...]:
  return names if isinstance(names, tuple) else () if names is None else (names,)
