"""Codes that rest in the host's memory, laid out as the loops of a chip fetch them."""

from typing import Any
import warnings

import jax

from jaxlora._base.coded import is_coded
from jaxlora._base.paths import flatten
from jaxlora._platform.layouts import at_rest
from jaxlora._weight.placement import put_on


def rest_on_host(tree: Any) -> Any:
  """The tree with its codes in the host's memory: what needs them fetches them, a scan one layer at a time.

  Everything else of the tree stays where it is: floats, factors, biases. On TPUs a scan would copy a whole stack of 4-
  or 8-bit codes to the chip as these lie by default. So they rest in tiles of eight rows there, and codes and scales
  whose last axis is no multiple of 128, or the one before no multiple of 8, stay on the chip; so do all on several
  TPUs. Values and gradients are those of the tree as it was; codes cross from the host anew in each pass that needs
  them.

  Args:
    tree: base parameters or a combined tree, of arrays or of `jax.ShapeDtypeStruct`s with shardings; codes are
      `QuantizedArray`s, or other leaves with `dequantize()`.

  Returns:
    A tree of the same structure.

  Warns:
    UserWarning: names the leaves whose codes stay on a TPU, as a kernel's do whose outputs have an axis of heads.

  Example:
    >>> import jax.numpy as jnp
    >>> import jaxlora
    >>> params = {"w": jnp.ones((3, 64, 128)), "b": jnp.ones(128)}
    >>> resting = jaxlora.quant.rest_on_host(jaxlora.quantize(params, "int8", targets="w", axes={"w": "sio"}))
    >>> resting["w"].codes.sharding.memory_kind, resting["b"].sharding.memory_kind
    ('pinned_host', 'device')
  """
  nodes, treedef = flatten(tree, is_leaf=is_coded)
  moved = [_resting(node) if is_coded(node) else node for _, node in nodes]
  staying = [
    f"{path} {tuple(node.shape)}"
    for (path, node), after in zip(nodes, moved, strict=True)
    if is_coded(node) and after is node
  ]
  if staying:
    warnings.warn(
      f"rest_on_host: the codes of these leaves stay on the chip: {', '.join(staying)}. Loops on one TPU"
      " fetch slices of stacks whose last axis is a multiple of 128 and the one before of 8, and those on several TPUs"
      " fetch none. Flatten heads to one axis, or let them stay.",
      stacklevel=2,
    )
  return jax.tree.unflatten(treedef, moved)


def _resting(node: Any) -> Any:
  """The node with its parts at rest; the very node where its first part, its codes, had better stay."""
  parts, treedef = jax.tree.flatten(node)
  places = [at_rest(part, _sharding_of(part).with_memory_kind("pinned_host")) for part in parts]
  if places[0] is None:
    return node
  rest = [part if there is None else put_on(part, there) for part, there in zip(parts, places, strict=True)]
  return jax.tree.unflatten(treedef, rest)


def _sharding_of(part: Any) -> Any:
  return getattr(part, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
