"""How arrays lie within programs for TPUs, where the compiler had better not choose for itself."""

from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.by_platform import Form, by_platform
from jaxlora._jax.layout import column_major, in_short_tiles, row_major

# Not for several devices, and not under `vmap`: there it would say more than how rows lie.
_ALONG_ROWS = Form(row_major, single_device=True, shared=(0,), exported=False)

_KEPT_SMALL = _ALONG_ROWS._replace(fn=lambda x: lax.optimization_barrier(column_major(x)))


def kept_small(x: jax.Array) -> jax.Array:
  """`x`, of few columns; in programs for a TPU its first axis is the fastest, and what reads it waits for that.

  Along rows 8 columns fill 128 lanes: a residual of 16 times its size. Nothing would be won by the layout alone: the
  compiler keeps the array as it was made, and turns it where it is read.
  """
  return by_platform(lambda x: x, {"tpu": _KEPT_SMALL}, x)


def along_rows(x: jax.Array) -> jax.Array:
  """`x`; in programs for a TPU its last axis is the fastest."""
  return by_platform(lambda x: x, {"tpu": _ALONG_ROWS}, x)


def fetched_in_rows(x: jax.Array) -> jax.Array:
  """`x`, just fetched from the host; in programs for a TPU along its rows, as it lies there.

  Of a stack that lies so a loop then fetches a layer at a time. Asked for another order, the compiler would lay out the
  whole anew, or break off.
  """
  return along_rows(x) if _lies_in_rows(x) else x


def at_rest(array: Any, sharding: Any) -> Any:
  """How an array rests in the memory that a sharding says, such that loops fetch slices of it.

  `None` where it had better not: loops on one TPU take slices of what lies along its rows; of several none is known.
  """
  if next(iter(sharding.device_set)).platform != "tpu":
    return sharding
  if not _lies_in_rows(array) or len(sharding.device_set) > 1:
    return None
  return in_short_tiles(sharding, array.ndim, _bits(array)) if _bits(array) in _NARROW else sharding


_NARROW = 4, 8  # bits, of which a TPU's tiles have more than 8 rows


def _lies_in_rows(x: Any) -> bool:
  """Whether it has so many rows and columns that a TPU has it along its rows by default."""
  return x.ndim > 1 and x.shape[-1] % 128 == 0 and x.shape[-2] % 8 == 0


def _bits(x: Any) -> int:
  """Of an element; zero for what is no number."""
  if jnp.issubdtype(x.dtype, jnp.floating):
    return int(jnp.finfo(x.dtype).bits)
  return int(jnp.iinfo(x.dtype).bits) if jnp.issubdtype(x.dtype, jnp.integer) else 0
