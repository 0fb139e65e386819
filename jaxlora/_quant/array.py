"""`QuantizedArray`: an array as codes and scales."""

from collections.abc import Mapping
import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlora._base.coded import is_coded
from jaxlora._base.explicit import placed_by_compiler
from jaxlora._base.export import serialised_dataclass
from jaxlora._base.programs import one_program
from jaxlora._platform.codes import LookUp, by_selects
from jaxlora._quant.blocks import fits, spread
from jaxlora._quant.formats import FORMATS
from jaxlora._weight.node import Node


@serialised_dataclass
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class QuantizedArray(Node):
  """An array whose elements are codes, with a scale for each block of them.

      W = value(codes) * scales + offset

  Invariants:
    1. `codes` has the shape of W. `scales` and `offset` have as many axes, and the size of each divides that of W: the
       quotients are the block, so no field says it. A slice of every part along an axis without blocks, such as a
       stack's, is that slice of W, and so is a transposition.
    2. `scales` and `offset` are float arrays, or `QuantizedArray`s themselves (double quantisation).
    3. `format` and `number` are static; `format` names how codes become values, `number` is the dtype of W.
    4. Sums and products are taken in float32 and rounded once, to the dtype of W.

  Attributes:
    codes: of every element.
    scales: of every block.
    offset: of every block; `None` for zero.
    format: `"nf4"`, `"int8"`, `"int4"`, `"q4_0"` or `"fp8"`; of weights from files also `"uint4"`, `"uint8"`,
      `"fp8_e5m2"`, `"fp4"` (bitsandbytes') and `"e2m1"`.
    number: the name of the dtype of W.
  """

  codes: Any
  scales: Any
  offset: Any = None
  format: str = dataclasses.field(default="nf4", metadata={"static": True})
  number: str = dataclasses.field(default="float32", metadata={"static": True})

  _plainly: ClassVar[str] = "jaxlora.dequantize(tree)"

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(self.codes.shape)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def size(self) -> int:
    return int(self.codes.size)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.number)

  @property
  def block(self) -> tuple[int, ...]:
    """How many elements along each axis share a scale."""
    return tuple(n // k for n, k in zip(self.shape, self.scales.shape, strict=True))

  @property
  def scales_whole_axes(self) -> bool:
    """Whether its values are its codes times scales that are alike along whole axes: next to nothing to compute."""
    plain = FORMATS[self.format].book is None and self.offset is None and not isinstance(self.scales, QuantizedArray)
    return plain and all(k in (1, n) for k, n in zip(self.scales.shape, self.shape, strict=True))

  def transpose(self, *axes: int) -> "QuantizedArray":
    """The same array with its axes in another order, reversed if none is given: every part with its axes so."""
    order = axes or tuple(reversed(range(self.ndim)))
    return self.with_parts({name: part.transpose(*order) for name, part in self.parts().items()})

  @property
  def T(self) -> "QuantizedArray":
    return self.transpose()

  def parts(self) -> dict[str, Any]:
    held = {"codes": self.codes, "scales": self.scales}
    return held if self.offset is None else {**held, "offset": self.offset}

  def with_parts(self, changes: Mapping[str, Any]) -> "QuantizedArray":
    return dataclasses.replace(self, **changes)

  def dequantize(self, look_up: LookUp = by_selects) -> jax.Array:
    """The array in floats.

    Args:
      look_up: how codes become the values that a book has for them.
    """
    return _placed(self, look_up)

  def __repr__(self) -> str:
    if not hasattr(self.codes, "shape") or not hasattr(self.scales, "shape"):  # of labels, say
      return f"QuantizedArray({self.format}, codes={self.codes!r}, scales={self.scales!r})"
    double = ", double" if isinstance(self.scales, QuantizedArray) else ""
    sizes, blocks = ("x".join(map(str, sizes)) for sizes in (self.shape, self.block))
    return f"QuantizedArray({sizes} {self.number} as {self.format}, blocks {blocks}{double})"


@functools.partial(one_program, static_argnums=1)
def _dequantized(x: QuantizedArray, look_up: LookUp) -> jax.Array:
  book = FORMATS[x.format].book
  values = x.codes.astype(jnp.float32) if book is None else look_up(x.codes, book)
  values = values * spread(_floats(x.scales, look_up), x.shape)
  if x.offset is not None:
    values = values + spread(_floats(x.offset, look_up), x.shape)
  return jnp.broadcast_to(values, x.shape).astype(x.dtype)


_placed = placed_by_compiler(_dequantized, like=lambda x, look_up: x.codes)


def _floats(part: Any, look_up: LookUp) -> jax.Array:
  return part.dequantize(look_up) if isinstance(part, QuantizedArray) else part.astype(jnp.float32)


def check_quantized(node: Any, path: str) -> None:
  """Raises unless the parts of a quantised leaf fit together, naming the leaf, what was found and expected."""
  if is_coded(node) and jax.tree_util.all_leaves([node]):
    raise ValueError(
      f"{path}: found a {type(node).__name__}, which has dequantize() and is no pytree node: JAX cannot pass its codes"
      " to a program. Register its type (jax.tree_util.register_dataclass, or register_pytree_node)."
    )
  if not isinstance(node, QuantizedArray):
    return
  if node.format not in FORMATS:
    raise ValueError(f"{path}: format {node.format!r}, expected one of {', '.join(map(repr, FORMATS))}. {_AGAIN}")
  expected = jnp.dtype(FORMATS[node.format].codes)
  if not hasattr(node.codes, "dtype") or node.codes.dtype != expected:
    found = getattr(node.codes, "dtype", type(node.codes).__name__)
    raise ValueError(f"{path}: codes of {found}, expected {expected.name} for the format {node.format!r}. {_AGAIN}")
  for name, part in node.parts().items():
    if name != "codes" and (part is None or not fits(tuple(part.shape), node.shape)):
      found = "nothing" if part is None else f"shape {tuple(part.shape)}"
      raise ValueError(
        f"{path}: {name} of {found}, expected as many axes as the codes have, whose shape is {node.shape}, and sizes"
        f" that divide theirs. {_AGAIN}"
      )
    check_quantized(part, f"{path}/{name}")


_AGAIN = "It was put together of parts that do not belong together: quantise the weight again (jaxlora.quantize)."
