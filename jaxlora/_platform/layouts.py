"""How arrays lie within programs for TPUs, where the compiler had better not choose for itself."""

import jax

from jaxlora._jax.by_platform import Form, by_platform
from jaxlora._jax.layout import row_major

# Not for several devices, and not under `vmap`: there it would say more than how rows lie.
_ALONG_ROWS = Form(row_major, single_device=True, shared=(0,), exported=False)


def along_rows(x: jax.Array) -> jax.Array:
  """`x`; in programs for a TPU its last axis is the fastest."""
  return by_platform(lambda x: x, {"tpu": _ALONG_ROWS}, x)
