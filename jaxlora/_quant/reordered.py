"""`ReorderedArray`: a quantised array whose blocks are no runs, but would be in another order of an axis."""

from collections.abc import Mapping
import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jaxlora._base.export import serialised_dataclass
from jaxlora._quant.array import QuantizedArray
from jaxlora._weight.node import Node


@serialised_dataclass
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class ReorderedArray(Node):
  """A quantised array with one axis in another order, as GPTQ's `desc_act` (act-order) has the inputs of a weight.

      W[..., k, ...] = blocks[..., order[k], ...]

  It is formed in floats where a product needs it, and never kept so; layouts of it are put off until then.

  Attributes:
    blocks: the array in the order in which its blocks are runs.
    order: for each place of the axis, the place in `blocks`; for a stack, with the stack's axes ahead.
    axis: which, counted from the last: -1 is the last.
  """

  blocks: QuantizedArray
  order: Any
  axis: int = dataclasses.field(default=-1, metadata={"static": True})

  _plainly: ClassVar[str] = "jaxlora.dequantize(tree)"

  @property
  def shape(self) -> tuple[int, ...]:
    return self.blocks.shape

  @property
  def ndim(self) -> int:
    return self.blocks.ndim

  @property
  def size(self) -> int:
    return self.blocks.size

  @property
  def dtype(self) -> Any:
    return self.blocks.dtype

  @property
  def format(self) -> str:
    return self.blocks.format

  def transpose(self, *axes: int) -> "ReorderedArray":
    """The same array with its axes in another order, reversed if none is given."""
    order = axes or tuple(reversed(range(self.ndim)))
    stack = self.order.ndim - 1
    if tuple(order[:stack]) != tuple(range(stack)):
      raise ValueError(f"transpose: {axes} moves the stacked axes of {self!r}. Move the others (jaxlora.dequantize).")
    return dataclasses.replace(
      self, blocks=self.blocks.transpose(*order), axis=order.index(self.ndim + self.axis) - self.ndim
    )

  @property
  def T(self) -> "ReorderedArray":
    return self.transpose()

  def parts(self) -> dict[str, Any]:
    return {"blocks": self.blocks, "order": self.order}

  def with_parts(self, changes: Mapping[str, Any]) -> "ReorderedArray":
    return dataclasses.replace(self, **changes)

  def dequantize(self) -> jax.Array:
    """The array in floats."""
    values = self.blocks.dequantize()
    stack = self.order.ndim - 1
    sizes = [*self.order.shape[:-1], *[1] * (self.ndim - stack)]
    sizes[self.axis] = self.order.shape[-1]
    return jnp.take_along_axis(values, jnp.reshape(self.order, sizes), self.axis, mode="promise_in_bounds")

  def __repr__(self) -> str:
    return f"ReorderedArray({self.blocks!r}, axis {self.axis})"
