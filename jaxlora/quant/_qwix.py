"""Trees that qwix quantised."""

import sys
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.paths import flatten
from jaxlora._quant.array import QuantizedArray

_FORMATS = {"nf4": "nf4", "int8": "int8", "int4": "int4", "float8_e4m3fn": "fp8"}


def from_qwix(params: Any) -> Any:
  """Takes the arrays of a tree that qwix quantised for bases: codes and scales as they are, without a copy.

      W = value(qvalue) * scale - zero_point * scale

  Args:
    params: a tree with qwix' `QArray`s, also within the boxes that its quantised models keep them in. Load qwix first.

  Returns:
    A tree of the same nesting with a `QuantizedArray` for each. What it stands for is what `qwix` dequantises, to
    rounding: products are taken in float32.

  Raises:
    ValueError: naming the leaf, if no `QArray` is there, or for a type of codes that has no format here.

  Example:
    >>> import jax, jaxlora
    >>> from qwix._src.core import qarray  # doctest: +SKIP
    >>> how = qarray.HowToQuantize(qtype="int8", channelwise_axes=[1])  # doctest: +SKIP
    >>> jaxlora.quant.from_qwix({"w": qarray.quantize(w, how)})  # doctest: +SKIP
  """
  boxes = tuple(kind for name in ("QArray", "WithAux") if (kind := _kind(name)) is not None)
  is_box = lambda node: isinstance(node, boxes)
  nodes, treedef = flatten(params, is_leaf=is_box)
  if not any(is_box(node) for _, node in nodes):
    raise ValueError("from_qwix: the tree holds no QArray of qwix, expected one that qwix quantised.")
  return jax.tree.unflatten(treedef, [_converted(path, node) if is_box(node) else node for path, node in nodes])


def _kind(name: str) -> Any:
  modules = [module for key, module in sys.modules.items() if key.startswith("qwix.")]
  return next((kind for module in modules if isinstance(kind := getattr(module, name, None), type)), None)


def _converted(path: str, node: Any) -> QuantizedArray:
  node = getattr(node, "array", node)  # out of its box
  kind = str(node.qtype if isinstance(node.qtype, str) else jnp.dtype(node.qtype).name)
  if kind not in _FORMATS:
    raise ValueError(
      f"from_qwix: {path}: codes of {kind}, expected one of {', '.join(map(repr, _FORMATS))}. Dequantise it with qwix,"
      " and quantise it here (jaxlora.quantize)."
    )
  codes, scale, zero_point = (_out_of_variable(part) for part in (node.qvalue, node.scale, node.zero_point))
  offset = None if zero_point is None else -zero_point.astype(jnp.float32) * scale.astype(jnp.float32)
  return QuantizedArray(codes, scale, offset, _FORMATS[kind], str(scale.dtype))


def _out_of_variable(part: Any) -> Any:
  """An array; modules of NNX keep each in a Variable."""
  return part.get_raw_value() if hasattr(part, "get_raw_value") else part
