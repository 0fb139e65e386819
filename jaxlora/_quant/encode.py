"""From an array of floats to codes and scales."""

from collections.abc import Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.programs import one_program
from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.blocks import block_shape, in_blocks
from jaxlora._quant.formats import FORMATS

# bitsandbytes: the scales of 256 blocks share one of their own, beside the mean of all.
DOUBLE, _BLOCKS_TOGETHER = "dynamic8", 256
_SMALLEST = float(
  jnp.finfo(jnp.float32).tiny
)  # whose inverse is finite; a block of zeros has the scale 0 and values of 0


def encode(
  x: Any, format: str, axes: Sequence[int], across: Sequence[int], block_size: int | None, double: bool
) -> QuantizedArray:
  """An array as codes and scales.

  Args:
    x: of a floating dtype; NumPy's are moved to the device.
    format: a key of `FORMATS`.
    axes: along which blocks run, the first filled first.
    across: further axes, along which scales share a scale of their own.
    block_size: elements that share a scale; `None` for all along `axes`.
    double: whether scales are written as codes, too.
  """
  block = block_shape(x.shape, axes, block_size)
  if not double:
    return written(jnp.asarray(x), format, block)
  outer, blocks = (*axes, *across), [n // b for n, b in zip(x.shape, block, strict=True)]
  return written(jnp.asarray(x), format, block, (outer, block_shape(blocks, outer, _BLOCKS_TOGETHER)))


@functools.partial(one_program, static_argnums=(1, 2, 3))
def written(
  x: jax.Array,
  format: str,
  block: tuple[int, ...],
  second: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> QuantizedArray:
  """An array as codes and scales, in blocks that are known.

  Args:
    x: of a floating dtype.
    format: a key of `FORMATS`.
    block: how many elements of each axis share a scale.
    second: where scales are written as codes, too: the axes of their mean, and how many of each share a scale.
  """
  found = _in_one_level(x, format, block)
  if second is None:
    return found
  outer, over = second
  mean = jnp.mean(found.scales, axis=outer, keepdims=True)
  scales = _in_one_level(found.scales - mean, DOUBLE, over)
  return found.with_parts({"scales": scales.with_parts({"offset": mean})})


def _in_one_level(x: jax.Array, format: str, block: tuple[int, ...]) -> QuantizedArray:
  kind = FORMATS[format]
  if kind.writing is None:
    raise ValueError(f"{format}: codes that are found in files; nothing writes them.")
  blocks, axes = in_blocks(x.astype(jnp.float32), block)
  scale = kind.writing.scale(blocks, axes)
  # As bitsandbytes does: times the inverse, which is not always what a division gives. The barrier keeps it so.
  inverse = jax.lax.optimization_barrier(jnp.sign(scale) / jnp.maximum(jnp.abs(scale), _SMALLEST))
  codes = kind.writing.encode(blocks * inverse).astype(kind.codes).reshape(x.shape)
  return QuantizedArray(codes, jnp.squeeze(scale, axes), None, format, str(x.dtype))
