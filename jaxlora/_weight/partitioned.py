"""Flax's `Partitioned` boxes around adapted weights: they name the axes of the base, A and B have names of their own.

`flax.linen.get_partition_spec` asks the box alone, and would split the rank by the name of the base's first axis.
"""

from collections.abc import Callable
import functools
import sys
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora._weight.placement import factor_spec, side_of_part
from jaxlora._weight.weight import LoraWeight


def _partitioned() -> Any:
  """Flax's `Partitioned`; `None` where Flax is not loaded, which this never imports."""
  return getattr(sys.modules.get("flax.core.meta"), "Partitioned", None)


def with_own_names(tree: Any) -> Any:
  """The tree with boxes around adapted weights that name the axes of every part, and not the rank."""
  return _map_boxes(lambda box: _is_plain(box) and isinstance(box.value, LoraWeight), _named, tree)


def with_plain_boxes(tree: Any) -> Any:
  """The inverse, for boxes that hold no adapted weight any longer."""
  return _map_boxes(lambda box: not _is_plain(box) and not isinstance(box.value, LoraWeight), _plain, tree)


def _map_boxes(which: Callable[[Any], bool], change: Callable[[Any], Any], tree: Any) -> Any:
  partitioned = _partitioned()
  if partitioned is None:
    return tree
  is_box = lambda node: isinstance(node, partitioned)
  return jax.tree_util.tree_map(
    lambda node: change(node) if is_box(node) and which(node) else node, tree, is_leaf=is_box
  )


def _is_plain(box: Any) -> bool:
  return not hasattr(type(box), "_plain_type")


def _named(box: Any) -> Any:
  kind: Any = type(box)
  return _named_type(kind)(**_fields(box))


def _plain(box: Any) -> Any:
  return type(box)._plain_type(**_fields(box))


def _fields(box: Any) -> dict[str, Any]:
  return {name: getattr(box, name) for name in type(box).__dataclass_fields__}


@functools.cache
def _named_type(plain: Any) -> Any:
  """The type of box for adapted weights, beside one of Flax's or of the user's own.

  Around anything but a weight it is what the plain one is: `wrap` hands it to the model around an array.
  """

  def get_partition_spec(self: Any) -> Any:
    spec = plain.get_partition_spec(self)
    return _of_parts(self, spec) if isinstance(self.value, LoraWeight) else spec

  def get_sharding(self: Any, mesh: Any) -> Any:
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree_util.tree_map(lambda spec: NamedSharding(mesh, spec), get_partition_spec(self), is_leaf=is_spec)

  def reduce(self: Any) -> Any:
    return _rebuilt, (plain, _fields(self))

  members = {
    "__module__": plain.__module__,
    "__qualname__": plain.__qualname__,
    "_plain_type": plain,
    "get_partition_spec": get_partition_spec,
    "get_sharding": get_sharding,
    "__reduce__": reduce,
  }
  return type(plain)(plain.__name__, (plain,), members)  # Flax registers it as a node


def _rebuilt(plain: Any, fields: dict[str, Any]) -> Any:
  return _named_type(plain)(**fields)


def _of_parts(box: Any, spec: PartitionSpec) -> Any:
  """The box with the specs of a weight's parts in their places."""
  node = box.value
  return box.replace(
    value=node.with_parts({name: _spec(node, name, spec) for name, part in node.parts().items() if part is not None})
  )


def _spec(node: LoraWeight, part: str, spec: PartitionSpec) -> PartitionSpec:
  if part == "base":
    return spec
  if node.base is not None:
    own = side_of_part(node, part)
  else:  # a half without its base
    own = {"a": "i", "b": "o"}.get(part) if node.kind.plain else None
  return PartitionSpec() if own is None else factor_spec(spec, node.roles, own)
