"""Flax's boxes around adapted weights: they name the axes of the base, and A and B have names of their own.

`flax.linen.get_partition_spec` asks a `Partitioned` alone, and `flax.nnx.get_partition_spec` a `Variable`: both would
split the rank by the name of the base's first axis. Here the boxes of adapted weights are of types that answer for
every part; around anything else they are what the plain ones are, as where `wrap` hands them on around an array.
"""

from collections.abc import Callable
import functools
import sys
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxlora._weight.boxes import names_of_axes
from jaxlora._weight.placement import factor_spec, side_of_part
from jaxlora._weight.weight import LoraWeight


def with_own_names(tree: Any) -> Any:
  """The tree, freshly made, with boxes around adapted weights that name the axes of every part, and not the rank."""
  return _map_boxes(named_box, tree)


def named_box(box: Any) -> Any:
  """One box, as `with_own_names` leaves it."""
  plain: Any = type(box)
  holds = isinstance(_value(box), LoraWeight) and names_of_axes(box) is not None
  return _as_type(box, _named_type(plain)) if holds and not hasattr(plain, "_plain_type") else box


def with_plain_boxes(tree: Any) -> Any:
  """The inverse, for boxes that hold no adapted weight any longer."""
  return _map_boxes(plain_box, tree)


def plain_box(box: Any) -> Any:
  """One box, as `with_plain_boxes` leaves it."""
  named: Any = type(box)
  holds = isinstance(_value(box), LoraWeight)
  return _as_type(box, named._plain_type) if hasattr(named, "_plain_type") and not holds else box


def _loaded(module: str, name: str) -> Any:
  """A type of Flax's; no type where Flax is not loaded, which this never imports."""
  return getattr(sys.modules.get(module), name, ())


def _map_boxes(change: Callable[[Any], Any], tree: Any) -> Any:
  kinds = tuple(kind for kind in (_loaded("flax.core.meta", "Partitioned"), _loaded("flax.nnx", "Variable")) if kind)
  if not kinds:
    return tree
  is_box = lambda node: isinstance(node, kinds)
  return jax.tree_util.tree_map(lambda node: change(node) if is_box(node) else node, tree, is_leaf=is_box)


def _is_variable(box: Any) -> bool:
  return isinstance(box, _loaded("flax.nnx", "Variable"))


def _value(box: Any) -> Any:
  return box.get_raw_value() if _is_variable(box) else box.value


def _as_type(box: Any, kind: Any) -> Any:
  """The box as one of another type that has the same fields."""
  if not _is_variable(box):
    return kind(**{name: getattr(box, name) for name in type(box).__dataclass_fields__})
  object.__setattr__(box, "__class__", kind)  # making a variable anew would place its value by the names
  return box


@functools.cache
def _named_type(plain: Any) -> Any:
  """The type of box for adapted weights, beside one of Flax's or of the user's own. Flax registers it as a node."""
  members = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "_plain_type": plain}
  variable = issubclass(plain, _loaded("flax.nnx", "Variable"))
  own = _of_variable(plain) if variable else _of_partitioned(plain)
  return type(plain)(plain.__name__, (plain,), members | own | {"__reduce_ex__": _reduced})


def _of_partitioned(plain: Any) -> dict[str, Any]:
  def get_partition_spec(self: Any) -> Any:
    spec = plain.get_partition_spec(self)
    return self.replace(value=specs_of_parts(self.value, spec)) if isinstance(self.value, LoraWeight) else spec

  def get_sharding(self: Any, mesh: Any) -> Any:
    is_spec = lambda x: isinstance(x, PartitionSpec)
    return jax.tree_util.tree_map(lambda spec: NamedSharding(mesh, spec), get_partition_spec(self), is_leaf=is_spec)

  return {"get_partition_spec": get_partition_spec, "get_sharding": get_sharding}


def _of_variable(plain: Any) -> dict[str, Any]:
  def replace(self: Any, *values: Any, **metadata: Any) -> Any:
    """Flax's own, where `get_partition_spec` puts a spec in the place of the weight: one for every part."""
    if values and isinstance(values[0], PartitionSpec) and isinstance(_value(self), LoraWeight):
      values = (specs_of_parts(_value(self), values[0]), *values[1:])
    return plain.replace(self, *values, **metadata)

  return {"replace": replace}


def _reduced(self: Any, _: Any) -> Any:
  """For pickling, which does not find a type that is made at run time."""
  return _rebuilt, (_as_type(self.copy() if _is_variable(self) else self, type(self)._plain_type),)


def _rebuilt(box: Any) -> Any:
  return with_own_names(box)


def specs_of_parts(node: LoraWeight, spec: PartitionSpec) -> LoraWeight:
  """A weight with the specs of its parts in their places, from that of its base."""
  return node.with_parts({name: _spec(node, name, spec) for name, part in node.parts().items() if part is not None})


def _spec(node: LoraWeight, part: str, spec: PartitionSpec) -> PartitionSpec:
  if part == "base":
    return spec
  if node.base is not None:
    own = side_of_part(node, part)
  else:  # a half without its base
    own = {"a": "i", "b": "o"}.get(part) if node.kind.plain else None
  return PartitionSpec() if own is None else factor_spec(spec, node.roles, own)
