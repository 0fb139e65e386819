"""Writing other floats as an array is written: in its format, its blocks and its levels of scales."""

from typing import Any

import jax

from jaxlora._base.checks import is_known
from jaxlora._base.memory import on_device
from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.encode import DOUBLE, written
from jaxlora._quant.formats import PUBLIC


def cannot_rewrite(node: Any) -> str | None:
  """Why floats cannot be written as a coded array is; `None` where they can."""
  if not isinstance(node, QuantizedArray):
    return f"no function writes floats as a {type(node).__name__}"
  if node.format not in PUBLIC or node.offset is not None:
    return f"arrays such as {node!r} are read, and not written"
  scales = node.scales
  if isinstance(scales, QuantizedArray) and (scales.format != DOUBLE or not _is_plain(scales)):
    return f"scales such as {scales!r} are read, and not written"
  return None


def _is_plain(second: QuantizedArray) -> bool:
  return second.offset is not None and not any(isinstance(x, QuantizedArray) for x in (second.scales, second.offset))


def encoded_as(x: jax.Array, like: QuantizedArray) -> QuantizedArray:
  """An array as codes and scales, with the format, the blocks, the dtype and the places of another that is so.

  Args:
    x: floats of the shape of `like`.
    like: a quantised array, `cannot_rewrite` of which is `None`.
  """
  new = written(on_device(x), like.format, like.block, _second_level(like.scales))
  scales = new.scales if isinstance(new.scales, QuantizedArray) else new.scales.astype(like.scales.dtype)
  new = new.with_parts({"scales": scales, "number": like.number})
  return jax.tree.map(_where, new, like) if is_known(*jax.tree.leaves((new, like))) else new


def _second_level(scales: Any) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
  if not isinstance(scales, QuantizedArray):
    return None
  return tuple(d for d, n in enumerate(scales.offset.shape) if n == 1), scales.block


def _where(new: jax.Array, old: Any) -> jax.Array:
  return jax.device_put(new, old.sharding) if isinstance(old, jax.Array) and old.committed else new
