"""Whether the parts of an adapted leaf are there and fit together."""

from collections.abc import Collection, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import is_abstract
from jaxlora._base.text import listed
from jaxlora._weight.weight import Adapted, FullWeight, parts


def check_parts(node: Adapted, path: str, needed: Collection[str] | None = None) -> None:
  """Raises unless `node` has the parts that are needed (all of them), naming the leaf and what is missing."""
  missing = [name for name, part in parts(node).items() if part is None and (needed is None or name in needed)]
  if missing:
    raise ValueError(
      f"{path}: {', '.join(missing)} missing: this is one half of a split tree. Put the halves together with"
      " jaxlora.join(frozen, trainable)."
    )


def check_values(node: Adapted, path: str) -> None:
  """Raises if a part is only a shape and a dtype, where there is something to compute."""
  if abstract := [name for name, part in parts(node).items() if is_abstract(part)]:
    raise ValueError(
      f"{path}: found no values but only a shape and a dtype in {', '.join(abstract)}, expected arrays. Ask for shapes"
      " by jax.eval_shape, or adapt the weights once they are loaded: the same key draws the same factors."
    )


def check_together(node: Adapted, path: str) -> None:
  """Raises where the parts of `node` lie on different devices, as far as they were put anywhere."""
  arrays = {
    name: part
    for name, part in parts(node).items()
    if isinstance(part, jax.Array) and not isinstance(part, jax.core.Tracer) and part.committed
  }
  if "base" not in arrays:
    return
  there = arrays["base"].sharding.device_set
  for name, part in arrays.items():
    if part.sharding.device_set != there:
      raise ValueError(
        f"{path}: {name} lies on {_devices(part.sharding.device_set)}, its base on {_devices(there)}, expected the same"
        " devices. Put all parts on one mesh: jax.device_put(tree, jaxlora.sharding.specs(tree, mesh)); or on one"
        " device: jax.device_put(tree, jax.devices()[0])."
      )


def _devices(found: Iterable[Any]) -> str:
  return f"devices {listed(sorted(str(device.id) for device in found))}"


def check_weight(node: Adapted, path: str) -> None:
  """Raises unless the parts of `node` are there and fit together, naming the leaf, what was found and expected."""
  check_parts(node, path)
  shape = jnp.shape(node.base)
  if isinstance(node, FullWeight):
    if jnp.shape(node.value) != shape:
      raise ValueError(f"{path}: value has shape {jnp.shape(node.value)}, expected the base's, {shape}. {_REFIT}")
    return
  if len(node.roles) != len(shape):
    raise ValueError(
      f"{path}: roles {node.roles!r} name {len(node.roles)} axes, the base has shape {shape}. A transformation"
      " may have added or removed an axis; roles have one letter per axis of the base."
    )
  held = parts(node)
  expected = node.kind.shapes(shape, node.roles, node.rank)
  if "a0" in held:
    expected |= {"a0": expected["a"], "b0": expected["b"]}
  if held.keys() - {"base"} != expected.keys():
    raise ValueError(
      f"{path}: found the parts {', '.join(sorted(held))}, expected base, {', '.join(expected)} for the variant"
      f" {node.variant!r}. {_REFIT}"
    )
  for name, size in expected.items():
    found = jnp.shape(held[name])
    if found != size:
      raise ValueError(
        f"{path}: factor {name} has shape {found}, expected {size} for a base of shape {shape} with roles"
        f" {node.roles!r} and rank {node.rank}. {_REFIT}"
      )


_REFIT = (
  "It belongs to another base or another rank: join it with the base that it was made for, or adapt this one anew"
  " (jaxlora.adapt)."
)
