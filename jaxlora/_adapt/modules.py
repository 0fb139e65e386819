"""What the types of Equinox's modules say of their parameters, where Equinox is loaded. This never imports it."""

from collections.abc import Callable, Mapping, Sequence
import sys
from typing import Any

from jax import tree_util

from jaxlora._weight.weight import is_leaf_node

TABLE, NOT_KERNEL = "table", "no kernel"


def _linear(module: Any, shape: Sequence[int]) -> str | None:
  """(out, in), behind the axes of a stack that `filter_vmap` made."""
  sizes = [1 if size == "scalar" else size for size in (module.out_features, module.in_features)]
  return "oi" if list(shape[-2:]) == sizes else None


def _conv(module: Any, shape: Sequence[int]) -> str | None:
  """(out, in, *kernel)."""
  roles = "oi" + "i" * module.num_spatial_dims
  return roles if len(shape) >= len(roles) and shape[-len(roles)] == module.out_channels else None


_Told = Callable[[Any, Sequence[int]], str | None]

_KINDS: dict[str, tuple[tuple[str, ...], _Told]] = {
  "Linear": (("weight",), _linear),
  "Conv": (("weight",), _conv),
  "ConvTranspose": (("weight",), _conv),
  "Embedding": (("weight",), lambda module, shape: TABLE),
  "GRUCell": (("weight_ih", "weight_hh"), lambda module, shape: "oi"),
  "LSTMCell": (("weight_ih", "weight_hh"), lambda module, shape: "oi"),
  **dict.fromkeys(
    ("LayerNorm", "RMSNorm", "GroupNorm", "BatchNorm"), (("weight", "bias"), lambda module, shape: NOT_KERNEL)
  ),
}


def typed_parameters(tree: Any, shapes: Mapping[str, Sequence[int]]) -> dict[str, str]:
  """Path -> what the type of its module says of a parameter: roles, `TABLE` or `NOT_KERNEL`.

  Args:
    tree: with or without adapted leaves; `None` where there is none beside its leaves.
    shapes: of its leaves (adapted ones are leaves), by path, in flattening order.
  """
  equinox = sys.modules.get("equinox")
  kinds = {kind: told for name, told in _KINDS.items() if (kind := getattr(equinox and equinox.nn, name, None))}
  if tree is None or not kinds:
    return {}
  is_module = lambda node: isinstance(node, tuple(kinds))
  modules = {
    place: node for place, node in tree_util.tree_flatten_with_path(tree, is_leaf=is_module)[0] if is_module(node)
  }
  found = {}
  for path, (place, _) in zip(shapes, tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf_node)[0], strict=True):
    if place[:-1] in modules:
      node = modules[place[:-1]]
      fields, told = next(kinds[kind] for kind in kinds if isinstance(node, kind))
      if getattr(place[-1], "name", None) in fields and (said := told(node, shapes[path])) is not None:
        found[path] = said
  return found
