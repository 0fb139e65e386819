"""The manifest of a checkpoint: JSON beside the arrays, with a digest of each. Nothing here opens a file."""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten
from jaxlora._weight.checks import check_weight
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.tree import base_of
from jaxlora._weight.variant import VARIANTS
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, parts

FORMAT = "jaxlora-checkpoint"

VERSION = 1

_KINDS = {kind.__name__: kind for kind in (LoraWeight, FullWeight)}

Arrays = dict[str, np.ndarray]  # by the keys that a record's entries name


class CheckpointError(ValueError):
  """What is wrong with a checkpoint, a folder or a base: the one error of reading and writing them."""


def entry_of(leaf: Any, key: str, arrays: Arrays) -> dict[str, Any]:
  """Puts a copy of `leaf` among the arrays, and says what it is. Nobody who donates or changes the leaf changes it."""
  entry: dict[str, Any] = {"key": key}
  if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    entry["impl"] = str(jax.random.key_impl(leaf))
    leaf = jax.random.key_data(leaf)
  value = _on_host(leaf)
  if value.size:  # orbax takes no empty arrays; the entry says all of one
    arrays[key] = _stored(value)
  return entry | {"shape": list(value.shape), "dtype": value.dtype.name, "sha256": _sha256(value)}


def value_of(entry: Mapping[str, Any], arrays: Mapping[str, Any], what: str) -> np.ndarray:
  """The array that an entry names, checked against it; of a random key, its data."""
  if 0 in entry["shape"]:
    return np.zeros(entry["shape"], jnp.dtype(entry["dtype"]))
  if entry["key"] not in arrays:
    raise CheckpointError(f"{what}: the array {entry['key']!r} is missing.")
  stored, dtype = np.asarray(arrays[entry["key"]]), jnp.dtype(entry["dtype"])
  value = stored if stored.dtype == dtype else stored.view(dtype) if _viewed(dtype) else stored
  if value.dtype != dtype or list(value.shape) != entry["shape"] or _sha256(value) != entry["sha256"]:
    raise CheckpointError(
      f"{what}: the values are not those that were saved ({value.dtype}{list(value.shape)}, expected"
      f" {dtype}{entry['shape']} with SHA-256 {entry['sha256'][:12]}...): the file was damaged or altered."
    )
  return value


def _on_host(leaf: Any) -> np.ndarray:
  if isinstance(leaf, jax.core.Tracer):
    raise CheckpointError("a leaf is traced: save outside jit, where values are known.")
  if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
    from jax.experimental import multihost_utils

    leaf = multihost_utils.process_allgather(leaf, tiled=True)
  value = np.array(leaf, order="C", copy=True)
  if value.dtype.kind in "OSU":
    raise CheckpointError(f"a {type(leaf).__name__} is no array and cannot be saved.")
  return value.astype(value.dtype.newbyteorder("="), copy=False) if value.dtype.isbuiltin == 1 else value


def _viewed(dtype: np.dtype) -> bool:
  """Whether a dtype is stored as its bytes: 8-bit and narrower floats, and integers that NumPy does not have itself."""
  return dtype.isbuiltin != 1 and dtype != jnp.bfloat16


def _stored(value: np.ndarray) -> np.ndarray:
  return value.view(np.uint8) if _viewed(value.dtype) else value


def _sha256(value: np.ndarray) -> str:
  little = value.astype(value.dtype.newbyteorder("<"), copy=False) if value.dtype.isbuiltin == 1 else value
  return hashlib.sha256(np.ascontiguousarray(little).reshape(-1).view(np.uint8).data).hexdigest()


def record_of(tree: Any, metadata: Any, arrays: Arrays) -> dict[str, Any]:
  """The record of an adapted tree; its factors go among the arrays, its base only as a fingerprint."""
  check_json(metadata, "metadata")
  if not isinstance(metadata, dict):
    raise CheckpointError(f"metadata: found {metadata!r}, expected a dict.")
  nodes, _ = flatten(tree, is_leaf=is_adapted)
  adapted = [(path, node) for path, node in nodes if is_adapted(node)]
  if not adapted:
    raise CheckpointError("the tree has no adapted leaf; make one with jaxlora.adapt(params, config, key).")
  for path, node in adapted:
    try:
      check_weight(node, path)
    except ValueError as error:
      raise CheckpointError(str(error)) from error
  from jaxlora._version import __version__

  return {
    "format": FORMAT,
    "version": VERSION,
    "jaxlora": __version__,
    "jax": jax.__version__,
    "leaves": [_leaf_record(path, node, k, arrays) for k, (path, node) in enumerate(adapted)],
    "base": [
      {"path": path, "shape": list(leaf.shape), "dtype": leaf.dtype, "digest": leaf.digest}
      for path, leaf in prints(base_of(tree)).items()
    ],
    "metadata": metadata,
  }


def _leaf_record(path: str, node: Any, number: int, arrays: Arrays) -> dict[str, Any]:
  held = {name: part for name, part in parts(node).items() if name != "base" and part is not None}
  return {
    "path": path,
    "kind": type(node).__name__,
    **_static(node),
    "shape": list(jnp.shape(node.base)),
    "arrays": {name: entry_of(part, f"{number}_{name}", arrays) for name, part in held.items()},
  }


def _static(node: Any) -> dict[str, Any]:
  values = {f.name: getattr(node, f.name) for f in dataclasses.fields(node) if f.metadata.get("static")}
  return {name: value.item() if isinstance(value, np.generic) else value for name, value in values.items()}


def node_of(leaf: Mapping[str, Any], arrays: Mapping[str, Any], base: Any) -> Any:
  """The adapted node of a leaf's record on a base, with its parts as NumPy arrays."""
  kind = _KINDS.get(leaf["kind"])
  static = {name: value for name, value in leaf.items() if name not in ("path", "kind", "shape", "arrays")}
  known = {field.name for field in dataclasses.fields(kind) if field.metadata.get("static")} if kind else set()
  strange = [name for name in static if name not in known] if kind else [leaf["kind"]]
  if static.get("variant", "lora") not in VARIANTS:
    strange.append(static["variant"])
  if kind is None or strange:
    raise CheckpointError(
      f"{leaf['path']}: {', '.join(map(repr, strange))} is unknown to this version of jaxlora; install a newer one."
    )
  held = {name: value_of(entry, arrays, f"{leaf['path']} ({name})") for name, entry in leaf["arrays"].items()}
  if kind is FullWeight:
    node: Any = FullWeight(base, held.get("value"))
  else:
    extra = {name: part for name, part in held.items() if name not in ("a", "b")}
    node = LoraWeight(base, held.get("a"), held.get("b"), **static, extra=extra)
  check_weight(node, leaf["path"])
  return node


def keys_record(keys: Any, name: str, arrays: Arrays) -> Any:
  if isinstance(keys, Mapping):
    if bad := [key for key in keys if not isinstance(key, str)]:
      raise CheckpointError(f"{name}: found the name {bad[0]!r}, expected strings.")
    return {"dict": {key: keys_record(value, f"{name}_{k}", arrays) for k, (key, value) in enumerate(keys.items())}}
  if not isinstance(keys, jax.Array):
    raise CheckpointError(f"{name}: found {type(keys).__name__}, expected a random key or a dict of them.")
  return {"array": entry_of(keys, name, arrays)}


def keys_of(record: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
  if "dict" in record:
    return {name: keys_of(value, arrays) for name, value in record["dict"].items()}
  return wrapped(record["array"], value_of(record["array"], arrays, "key"))


def wrapped(entry: Mapping[str, Any], value: np.ndarray) -> jax.Array:
  """The array as JAX has it, a random key where it was one."""
  array = jnp.asarray(value)
  if array.dtype != value.dtype:
    raise CheckpointError(
      f"{entry['key']}: dtype {value.dtype}, which JAX narrows to {array.dtype} as it is set now. Enable"
      ' jax.config.update("jax_enable_x64", True), as when it was saved.'
    )
  return jax.random.wrap_key_data(array, impl=entry["impl"]) if "impl" in entry else array


def sealed(record: Mapping[str, Any]) -> dict[str, Any]:
  """The record with the digest of its own text."""
  return {**record, "sha256": _text_digest(record)}


def opened(record: Any) -> dict[str, Any]:
  """A record as it was sealed, or the error that says why it cannot be read."""
  if not isinstance(record, dict) or record.get("format") != FORMAT:
    raise CheckpointError(f"the record is not of the format {FORMAT!r}.")
  if not isinstance(record.get("version"), int) or record["version"] > VERSION:
    raise CheckpointError(
      f"the record has version {record.get('version')!r}; this jaxlora reads up to {VERSION}: install a newer one."
    )
  body = {key: value for key, value in record.items() if key != "sha256"}
  if record.get("sha256") != _text_digest(body):
    raise CheckpointError("the record is not the one that was saved: it was damaged or altered.")
  return body


def _text_digest(record: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(record, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_json(value: Any, where: str) -> None:
  """Raises unless JSON gives the value back as it is, naming the place of what it cannot hold."""
  if value is None or (isinstance(value, bool | int | str) and type(value) in (bool, int, str)):
    return
  if type(value) is float and math.isfinite(value):
    return
  if type(value) in (dict, list):
    if type(value) is dict and (bad := [key for key in value if type(key) is not str]):
      raise CheckpointError(f"{where}: the key {bad[0]!r} is no string; JSON's keys are.")
    items: Iterable[tuple[Any, Any]] = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items:
      check_json(item, f"{where}[{key!r}]")
    return
  raise CheckpointError(
    f"{where}: found {value!r} ({type(value).__name__}), expected what JSON gives back as it is: a dict with string"
    " keys, a list, a string, a finite number, a bool or None."
  )
