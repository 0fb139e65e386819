"""Arrays and their entries in the manifest: shape, dtype, digest. Nothing here opens a file.

An array that is split over processes is saved shard by shard and never whole on a host, so that its digest is the
`fingerprint` that its devices compute; of all others it is the SHA-256.
"""

from collections.abc import Mapping
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.digests import digest_of
from jaxlora._base.processes import spans_processes
from jaxlora.checkpoint._errors import CheckpointError

Arrays = dict[str, Any]  # of NumPy, or of JAX where they span processes, by the keys that entries name


def entry_of(leaf: Any, key: str, arrays: Arrays) -> dict[str, Any]:
  """Puts a copy of `leaf` into `arrays` under `key`, and returns its entry. The leaf may be donated afterwards."""
  entry: dict[str, Any] = {"key": key}
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    entry["impl"] = str(jax.random.key_impl(leaf))
    leaf = jax.random.key_data(leaf)
  if spans_processes(leaf):
    if not leaf.is_fully_replicated:
      arrays[key] = _bytes_of_shards(leaf) if _viewed(leaf.dtype) else leaf
      digest = digest_of(leaf)
      return entry | {"shape": list(leaf.shape), "dtype": leaf.dtype.name, "fingerprint": digest}
    leaf = leaf.addressable_data(0)
  value = _on_host(leaf)
  if value.size:  # orbax takes no empty arrays, whose entry says all there is
    arrays[key] = _stored(value)
  return entry | {"shape": list(value.shape), "dtype": value.dtype.name, "sha256": _sha256(value)}


def is_entry(entry: Mapping[str, Any]) -> bool:
  """Whether a part of a manifest is the entry of an array."""
  return "sha256" in entry or "fingerprint" in entry


def has_fingerprints(arrays: Any) -> bool:
  """Whether some entry in a part of a manifest is one of an array that was split over processes."""
  if isinstance(arrays, dict):
    return "fingerprint" in arrays or any(map(has_fingerprints, arrays.values()))
  return isinstance(arrays, list) and any(map(has_fingerprints, arrays))


def value_of(entry: Mapping[str, Any], arrays: Mapping[str, Any], what: str) -> np.ndarray:
  """The array that an entry names, checked against it; of a random key, its data."""
  if 0 in entry["shape"]:
    return np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
  if entry["key"] not in arrays:
    raise CheckpointError(f"{what}: the array {entry['key']!r} is missing.")
  stored, dtype = np.asarray(arrays[entry["key"]]), jnp.dtype(entry["dtype"])
  value = stored if stored.dtype == dtype else stored.view(dtype) if _viewed(dtype) else stored
  kind, digest = ("SHA-256", _sha256) if "sha256" in entry else ("fingerprint", digest_of)
  wanted = entry[kind.lower().replace("-", "")]
  if value.dtype != dtype or list(value.shape) != entry["shape"] or digest(value) != wanted:
    raise CheckpointError(
      f"{what}: the values are not those that were saved ({value.dtype}{list(value.shape)}, expected"
      f" {dtype}{entry['shape']} with {kind} {wanted[:12]}...): the file was damaged or altered."
    )
  return value


def _on_host(leaf: Any) -> np.ndarray:
  if isinstance(leaf, jax.core.Tracer):
    raise CheckpointError("a leaf is traced: save outside jit, where values are known.")
  value = np.array(leaf, order="C", copy=True)
  if value.dtype.kind in "OSU":
    raise CheckpointError(f"a {type(leaf).__name__} is no array and cannot be saved.")
  return value.astype(value.dtype.newbyteorder("="), copy=False) if value.dtype.isbuiltin == 1 else value


def _viewed(dtype: np.dtype) -> bool:
  """Whether a dtype is stored as its bytes: 8-bit and narrower floats, and integers that NumPy does not have itself."""
  return dtype.isbuiltin != 1 and dtype != jnp.bfloat16


@jax.jit
def _bytes_of_shards(x: jax.Array) -> jax.Array:
  return jax.lax.bitcast_convert_type(x, jnp.uint8)


def _stored(value: np.ndarray) -> np.ndarray:
  return value.view(np.uint8) if _viewed(value.dtype) else value


def _sha256(value: np.ndarray) -> str:
  little = value.astype(value.dtype.newbyteorder("<"), copy=False) if value.dtype.isbuiltin == 1 else value
  return hashlib.sha256(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data).hexdigest()


def as_jax_array(entry: Mapping[str, Any], value: np.ndarray) -> jax.Array:
  """A value that was read as a JAX array, or as a random key where the entry says so."""
  array = jnp.asarray(value)
  if array.dtype != value.dtype:
    raise CheckpointError(
      f"{entry['key']}: dtype {value.dtype}, which JAX narrows to {array.dtype} as it is set now. Enable"
      ' jax.config.update("jax_enable_x64", True), as when it was saved.'
    )
  return jax.random.wrap_key_data(array, impl=entry["impl"]) if "impl" in entry else array
