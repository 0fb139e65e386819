"""Random keys: typed ones from what users pass, and one for each leaf."""

import hashlib
from typing import Any

import jax
import jax.numpy as jnp

# The generator of a raw key, by its shape, which is all that tells.
_RAW_KEYS = {(2,): "threefry2x32", (4,): "rbg"}


def typed_key(key: Any, what: str) -> jax.Array:
  """`key` as a typed key; raw uint32 keys are taken, too.

  Raises:
    TypeError: if it is no random key, with what was found.
  """
  dtype, shape = getattr(key, "dtype", None), getattr(key, "shape", None)
  if dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key):
    if shape == ():
      return key
  elif dtype == jnp.uint32 and shape in _RAW_KEYS:
    return jax.random.wrap_key_data(jnp.asarray(key), impl=_RAW_KEYS[shape])
  found = f"{type(key).__name__} {key!r}" if dtype is None else f"an array of shape {shape}, dtype {dtype}"
  raise TypeError(f"{what}: found {found}, expected one random key, such as jax.random.key(0).")


def leaf_key(key: jax.Array, path: str) -> jax.Array:
  """A key that depends on `key` and the path alone, so that no other leaf changes it."""
  digest = hashlib.sha256(path.encode()).digest()
  for k in range(0, 8, 4):
    key = jax.random.fold_in(key, int.from_bytes(digest[k : k + 4], "big"))
  return key
