"""One line that says what an adapted leaf is: its `repr`."""

import math
from typing import Any

from jaxlora._base.dtypes import short_name
from jaxlora._base.text import short
from jaxlora._weight.roles import RANK, factor_axes


def lora_line(node: Any) -> str:
  """`LoraWeight(16x32 io, rank 4, bf16)`, with what is not at its default behind it.

  Works for whole trees, for halves, and for trees of anything else in the places of the arrays.
  """
  words = [f"{_by(_sizes(node))} {node.roles}", f"rank {node.rank}", *_dtypes(node)]
  if node.variant != "lora":
    words.append(node.variant)
  if not math.isclose(node.scale, 1):
    words.append(f"scale {node.scale:g}")
  if node.dropout:
    words.append(f"dropout {node.dropout:g}")
  return f"LoraWeight({', '.join([*words, *_remarks(node)])})"


def full_line(node: Any) -> str:
  """`FullWeight(16, f32)`."""
  known = next((part.shape for part in node.parts().values() if _is_array(part)), None)
  size = "?" if known is None else _by(known) or "scalar"
  return f"FullWeight({', '.join([size, *_dtypes(node), *_remarks(node)])})"


def _is_array(part: Any) -> bool:
  return hasattr(part, "shape") and hasattr(part, "dtype")


def _sizes(node: Any) -> list[Any]:
  """The weight's shape: the base's, or what the factors tell of it, with a question mark for every other axis."""
  if _is_array(node.base):
    return list(node.base.shape)
  sizes: list[Any] = ["?"] * len(node.roles)
  for own, factor in (("i", node.a), ("o", node.b)):
    axes = factor_axes(node.roles, own)
    if _is_array(factor) and len(factor.shape) == len(axes):
      for axis, size in zip(axes, factor.shape, strict=True):
        if axis != RANK:
          sizes[axis] = size
  return sizes


def _by(sizes: Any) -> str:
  return "x".join(map(str, sizes))


def _dtypes(node: Any) -> list[str]:
  """The dtype of the base, and that of the other parts where it is another one."""
  held = {name: short_name(part.dtype) for name, part in node.parts().items() if _is_array(part)}
  base = held.pop("base", None)
  others = sorted({dtype for dtype in held.values() if dtype != base})
  if base is None:
    return others
  return [base, *([f"{'/'.join(others)} factors"] if others else [])]


def _remarks(node: Any) -> list[str]:
  """Which parts are missing, as in a half, and what those that are no arrays are."""
  held = node.parts()
  missing = [name for name, part in held.items() if part is None]
  rest = [f"{name}={short(part)}" for name, part in held.items() if part is not None and not _is_array(part)]
  return ([f"without {'/'.join(missing)}"] if missing else []) + rest
