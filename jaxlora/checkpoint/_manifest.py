"""The manifest of a checkpoint: JSON beside the arrays, that says what they are. Nothing here opens a file."""

from collections.abc import Iterable, Mapping
import dataclasses
import hashlib
import json
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten, opened
from jaxlora._version import __version__
from jaxlora._weight.aside import Aside
from jaxlora._weight.checks import check_weight
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.tree import base_tree
from jaxlora._weight.variant import is_variant
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, is_leaf_node, parts
from jaxlora.checkpoint._arrays import Arrays, entry_of, has_fingerprints, value_of
from jaxlora.checkpoint._errors import CheckpointError

FORMAT = "jaxlora-checkpoint"

VERSION = 2  # of manifests that have fingerprints of arrays; those without are of version 1

_KINDS = {kind.__name__: kind for kind in (LoraWeight, FullWeight)}


def manifest_of(tree: Any, metadata: Any, arrays: Arrays) -> dict[str, Any]:
  """The manifest of an adapted tree; its factors go into `arrays`, its base is a fingerprint alone."""
  check_json(metadata, "metadata")
  if not isinstance(metadata, dict):
    raise CheckpointError(f"metadata: found {metadata!r}, expected a dict.")
  tree = opened(tree)
  nodes, _ = flatten(tree, is_leaf=is_leaf_node)
  adapted = [(path, node) for path, node in nodes if is_adapted(node)]
  if not adapted:
    raise CheckpointError("the tree has no adapted leaf; make one with jaxlora.adapt(params, config, key).")
  for path, node in adapted:
    try:
      check_weight(node, path)
    except ValueError as error:
      raise CheckpointError(str(error)) from error
  return {
    "format": FORMAT,
    "version": 1,
    "jaxlora": __version__,
    "jax": jax.__version__,
    "leaves": [_leaf_entry(path, node, k, arrays) for k, (path, node) in enumerate(adapted)],
    "base": [
      {"path": path, "shape": list(leaf.shape), "dtype": leaf.dtype, "digest": leaf.digest}
      for path, leaf in prints(base_tree(tree)).items()
    ],
    "metadata": metadata,
  }


def _leaf_entry(path: str, node: Any, number: int, arrays: Arrays) -> dict[str, Any]:
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
  return {name: _plain(value) for name, value in values.items()}


def _plain(value: Any) -> Any:
  """A static value as JSON has it."""
  if isinstance(value, Aside):
    return bool(value)
  return value.item() if isinstance(value, np.generic) else value


def node_of(leaf: Mapping[str, Any], arrays: Mapping[str, Any], base: Any) -> Any:
  """The adapted node that a leaf's entry describes, on a base, with NumPy arrays for its parts."""
  kind = _KINDS.get(leaf["kind"])
  static = {name: value for name, value in leaf.items() if name not in ("path", "kind", "shape", "arrays")}
  known = {field.name for field in dataclasses.fields(kind) if field.metadata.get("static")} if kind else set()
  strange = [name for name in static if name not in known] if kind else [leaf["kind"]]
  if not is_variant(static.get("variant", "lora")):
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


def with_digest(manifest: Mapping[str, Any]) -> dict[str, Any]:
  """The manifest with its version and the digest of its own text."""
  split = has_fingerprints([manifest["leaves"], manifest["training"]])
  manifest = {**manifest, "version": VERSION if split else 1}
  return {**manifest, "sha256": _text_digest(manifest)}


def verified(manifest: Any) -> dict[str, Any]:
  """The manifest that was saved, without its digest; raises if it is another one, or cannot be read."""
  if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
    raise CheckpointError(f"the record is not of the format {FORMAT!r}.")
  if not isinstance(manifest.get("version"), int) or manifest["version"] > VERSION:
    raise CheckpointError(
      f"the record has version {manifest.get('version')!r}; this jaxlora reads up to {VERSION}: install a newer one."
    )
  body = {key: value for key, value in manifest.items() if key != "sha256"}
  if manifest.get("sha256") != _text_digest(body):
    raise CheckpointError("the record is not the one that was saved: it was damaged or altered.")
  return body


def _text_digest(manifest: Mapping[str, Any]) -> str:
  return hashlib.sha256(json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


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
