"""Where the parts of a weight lie: along the axes of the base, the rank whole on every device."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from jaxlora._base.coded import is_coded
from jaxlora._weight.roles import RANK, factor_axes
from jaxlora._weight.weight import LoraWeight


def factor_spec(spec: PartitionSpec, roles: str, own: str) -> PartitionSpec:
  """How a factor is partitioned, from how its base is: the one rule that every placement of factors follows.

  A is partitioned as the contracted axes of the base, B as its free axes, both as its stacked axes, and the rank not at
  all: it is small, and a split rank would need a sum over devices in every product.

  Args:
    spec: of the base; axes behind its last entry are whole.
    roles: one letter per axis of the base.
    own: `"i"` for A, `"o"` for B.

  Returns:
    The spec of the factor, `(*stack, rank, *own)`, with an entry for each of its axes.

  Example:
    >>> base = PartitionSpec("data", "model")
    >>> tuple(factor_spec(base, "io", "i")), tuple(factor_spec(base, "io", "o"))
    ((None, 'data'), (None, 'model'))
  """
  entries = (*spec, *[None] * (len(roles) - len(spec)))
  return PartitionSpec(*(None if axis == RANK else entries[axis] for axis in factor_axes(roles, own)))


def side_of_part(node: LoraWeight, part: str) -> str | None:
  """Which axes of the weight a part holds, `"i"` or `"o"`, as its name and shape tell; `None` for any other layout."""
  found = np.shape(node.parts()[part])
  for own in "io" if part.startswith("a") else "oi":  # of a square weight A and B have one shape
    axes = factor_axes(node.roles, own)
    if len(axes) == len(found) and all(d == RANK or node.shape[d] == n for d, n in zip(axes, found, strict=True)):
      return own
  return None


def put_on(array: Any, sharding: Any) -> Any:
  """An array, or a shape and a dtype, that lies so; unchanged where nothing says how."""
  if sharding is None:
    return array
  if isinstance(array, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)
  whole = _is_array(array) and array.is_fully_addressable
  if whole and isinstance(sharding, jax.sharding.Sharding) and not sharding.is_fully_addressable:
    return _shards_of(array, sharding)
  return jax.device_put(array, sharding)


def _shards_of(array: jax.Array, sharding: Any) -> jax.Array:
  """The shards that this process holds of an array that every process has whole: none waits for another."""
  if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
    return jax.random.wrap_key_data(_shards_of(jax.random.key_data(array), sharding), impl=jax.random.key_impl(array))
  host = np.asarray(array)
  return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


def beside_its_base(node: LoraWeight) -> LoraWeight:
  """The weight, freshly made, with every part where its base says; of a base that does not say, nothing moves."""
  parts = {name: part for name, part in node.parts().items() if name != "base" and part is not None}
  return node.with_parts({name: put_on(part, sharding_of(node, name)) for name, part in parts.items()})


def beside_base(sharding: Any, roles: str, own: str | None) -> Any:
  """Where a factor goes whose base is sharded so: along the axes that it holds, whole where `own` is `None`.

  In the memory of the device, even where the base rests in the host's: factors train.
  """
  if isinstance(sharding, jax.sharding.SingleDeviceSharding):
    return jax.sharding.SingleDeviceSharding(*sharding.device_set)
  if isinstance(sharding, jax.sharding.NamedSharding):
    spec = PartitionSpec() if own is None else factor_spec(sharding.spec, roles, own)
    return jax.sharding.NamedSharding(sharding.mesh, spec)
  mesh = jax.sharding.Mesh(np.array(sorted(sharding.device_set, key=lambda device: device.id)), "devices")
  return jax.sharding.NamedSharding(mesh, PartitionSpec())


def on_the_mesh_of(tree: Any, like: Any) -> Any:
  """The tree with every array that was placed nowhere on all devices of the mesh that the arrays of `like` lie on.

  So an optimizer's counters: from a step they come back on the mesh, and the next step would be compiled anew for it.
  """
  placed = (leaf.sharding for leaf in jax.tree.leaves(like) if _is_array(leaf) and leaf.committed)
  mesh = next((s.mesh for s in placed if isinstance(s, jax.sharding.NamedSharding) and s.num_devices > 1), None)
  if mesh is None:
    return tree
  whole = jax.sharding.NamedSharding(mesh, PartitionSpec())
  return jax.tree.map(lambda leaf: put_on(leaf, whole) if _is_array(leaf) and not leaf.committed else leaf, tree)


def _is_array(leaf: Any) -> bool:
  return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)


def _of_type(traced: Any) -> Any:
  """The sharding that the type of a traced array carries: on meshes of explicit axes alone."""
  sharding = getattr(jax.typeof(traced), "sharding", None)
  return sharding if any(axis is not None for axis in getattr(sharding, "spec", ())) else None


def sharding_of(node: Any, part: str) -> Any:
  """Where a part of a node goes.

  A factor goes along the axes of the base, a leaf trained whole where its base is, and every other part on all devices
  of the base. `None` leaves the part to JAX, as where the base is not committed to a device.
  """
  base = jax.tree.leaves(node.base)[0] if is_coded(node.base) else node.base  # codes lie as the weight would
  if isinstance(base, jax.core.Tracer):
    sharding = _of_type(base)
  elif isinstance(base, jax.Array) and not base.committed:
    return None
  else:
    sharding = getattr(base, "sharding", None)
  if sharding is None or part == "value":
    return sharding
  return beside_base(sharding, node.roles, side_of_part(node, part))
