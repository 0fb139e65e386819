"""One line that says what an adapted leaf is: its `repr`. Imports nothing of the library, as the nodes import it."""

from collections.abc import Mapping, Sequence
import math
import reprlib
from typing import Any


def lora_line(node: Any, sizes: Sequence[Any]) -> str:
  """`LoraWeight(16x32 io, rank 4, bf16)`, followed by what is not at its default.

  Works for whole trees, for halves, and for trees of anything else in the places of the arrays.

  Args:
    node: the weight.
    sizes: of its axes, as far as they are known.
  """
  words = [f"{_product(sizes)} {node.roles}", f"rank {node.rank}", *_dtypes(node.parts())]
  if node.variant != "lora":
    words.append(node.variant)
  if not math.isclose(node.scale, 1):
    words.append(f"scale {node.scale:g}")
  if node.dropout:
    words.append(f"dropout {node.dropout:g}")
  return f"LoraWeight({', '.join([*words, *_remarks(node.parts())])})"


def full_line(node: Any) -> str:
  """`FullWeight(16, f32)`."""
  known = next((part.shape for part in node.parts().values() if is_array(part)), None)
  size = "?" if known is None else _product(known) or "scalar"
  return f"FullWeight({', '.join([size, *_dtypes(node.parts()), *_remarks(node.parts())])})"


def is_array(part: Any) -> bool:
  """Whether a part has a shape and a dtype, as arrays, tracers and types have."""
  return hasattr(part, "shape") and hasattr(part, "dtype") and not isinstance(part, type)


def _product(sizes: Sequence[Any]) -> str:
  return "x".join(map(str, sizes))


def _dtypes(parts: Mapping[str, Any]) -> list[str]:
  """The dtype of the base, and that of the other parts where it is another one."""
  held = {name: _short(part.dtype) for name, part in parts.items() if is_array(part)}
  base = held.pop("base", None)
  others = sorted({dtype for dtype in held.values() if dtype != base})
  if base is None:
    return others
  return [base, *([f"{'/'.join(others)} factors"] if others else [])]


def _short(dtype: Any) -> str:
  """A dtype as JAX prints it in shapes: `f32`, `bf16`, `i8`."""
  name = str(dtype)
  for long, short in (("float", "f"), ("complex", "c"), ("uint", "u"), ("int", "i")):
    name = name.replace(long, short)
  return name


def _remarks(parts: Mapping[str, Any]) -> list[str]:
  """Which parts are missing, as in a half, and what those that are no arrays are."""
  missing = [name for name, part in parts.items() if part is None]
  rest = [f"{name}={reprlib.repr(part)}" for name, part in parts.items() if part is not None and not is_array(part)]
  return ([f"without {'/'.join(missing)}"] if missing else []) + rest
