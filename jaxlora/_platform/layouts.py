"""How arrays lie within programs for TPUs, where the compiler had better not choose for itself."""

import jax
from jax import lax

from jaxlora._jax.by_platform import Form, by_platform
from jaxlora._jax.layout import column_major, row_major

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
