"""The training state in a manifest: optimizer state, data position, random keys. Nothing here opens a file."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._weight.fingerprint import dtype_name, shape_of
from jaxlora._weight.placement import put_on
from jaxlora.checkpoint._arrays import Arrays, as_jax_array, entry_of, value_of
from jaxlora.checkpoint._errors import CheckpointError
from jaxlora.checkpoint._manifest import check_json


def training_entry(step: int, opt_state: Any, data: Any, key: Any, arrays: Arrays) -> dict[str, Any]:
  """The entry of a training state; its arrays go into `arrays`."""
  check_json(data, "data")
  arrays["step"] = np.asarray(step)
  return {
    "step": step,
    "data": data,
    "keys": None if key is None else _keys_entry(key, "key", arrays),
    "optimizer": [
      {"path": path, "array": _state_entry(path, leaf, f"optimizer_{k}", arrays)}
      for k, (path, leaf) in enumerate(flatten(opt_state)[0])
    ],
  }


def key_of(training: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
  """The random key, or the dict of them; `None` where none was saved."""
  return None if training["keys"] is None else _keys_of(training["keys"], arrays)


def _keys_entry(keys: Any, name: str, arrays: Arrays) -> Any:
  if isinstance(keys, Mapping):
    if bad := [key for key in keys if not isinstance(key, str)]:
      raise CheckpointError(f"{name}: found the name {bad[0]!r}, expected strings.")
    return {"dict": {key: _keys_entry(value, f"{name}_{k}", arrays) for k, (key, value) in enumerate(keys.items())}}
  if not isinstance(keys, jax.Array):
    raise CheckpointError(f"{name}: found {type(keys).__name__}, expected a random key or a dict of them.")
  return {"array": entry_of(keys, name, arrays)}


def _keys_of(entry: Mapping[str, Any], arrays: Mapping[str, Any]) -> Any:
  if "dict" in entry:
    return {name: _keys_of(value, arrays) for name, value in entry["dict"].items()}
  return as_jax_array(entry["array"], value_of(entry["array"], arrays, "key"))


def _state_entry(path: str, leaf: Any, key: str, arrays: Arrays) -> dict[str, Any]:
  try:
    return entry_of(leaf, key, arrays)
  except CheckpointError as error:
    raise CheckpointError(f"Manager.save: opt_state: {path}: {error}") from error


def optimizer_state(template: Any, saved: list[Any], arrays: Mapping[str, Any], what: str) -> Any:
  """The saved optimizer state in the structure of a template."""
  leaves, treedef = flatten(template)
  entries = {item["path"]: item["array"] for item in saved}
  if all(path.startswith(_MASKED) for path in entries) and not any(path.startswith(_MASKED) for path, _ in leaves):
    entries = {path.removeprefix(_MASKED): entry for path, entry in entries.items()}
  found = {path: (tuple(entry["shape"]), entry["dtype"], entry.get("impl")) for path, entry in entries.items()}
  expected = {path: _signature(leaf) for path, leaf in leaves}
  if found != expected:
    differing = [path for path in {**found, **expected} if found.get(path) != expected.get(path)]
    raise CheckpointError(
      f"{what}: the optimizer state is of another structure than opt_state. Differing: "
      + listed([f"{p} (saved {_said(found.get(p))}, expected {_said(expected.get(p))})" for p in differing])
      + ". Make the template with the optimizer that was saved, for the same tree."
    )
  return jax.tree_util.tree_unflatten(
    treedef, [_like(leaf, entries[path], value_of(entries[path], arrays, path)) for path, leaf in leaves]
  )


_MASKED = "0/inner_state/"  # where the state of `optimizer(tx)` once had that of `tx`


def _signature(leaf: Any) -> tuple[tuple[int, ...], str, str | None]:
  if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
    data = jax.eval_shape(jax.random.key_data, leaf)
    return tuple(data.shape), str(data.dtype), str(jax.random.key_impl(leaf))
  return shape_of(leaf), dtype_name(leaf), None


def _said(signature: Any) -> str:
  return "nothing" if signature is None else f"{signature[1]}{list(signature[0])}"


def _like(leaf: Any, entry: Mapping[str, Any], value: np.ndarray) -> Any:
  if isinstance(leaf, bool | int | float | complex):
    return type(leaf)(value.item())
  if isinstance(leaf, np.ndarray | np.generic):
    return value
  array = as_jax_array(entry, value)
  return put_on(array, leaf.sharding if isinstance(leaf, jax.Array) and leaf.committed else None)
