"""An adapted tree from a manifest and its base."""

from collections.abc import Iterator, Mapping
from typing import Any
import warnings

import jax

from jaxlora._base.paths import flatten, opened
from jaxlora._base.processes import spans_processes
from jaxlora._weight.fingerprint import Print, prints, shape_of
from jaxlora._weight.partitioned import with_own_names
from jaxlora._weight.placement import put_on, sharding_of
from jaxlora._weight.weight import is_adapted, is_leaf_node, parts, with_parts
from jaxlora.checkpoint._arrays import as_jax_array
from jaxlora.checkpoint._errors import CheckpointError, CheckpointWarning, one_error
from jaxlora.checkpoint._manifest import node_of
from jaxlora.checkpoint._processes import together


def rebuilt(manifest: Mapping[str, Any], arrays: Mapping[str, Any], params: Any, strict: bool, what: str) -> Any:
  """The adapted tree on the base `params`; `strict` decides whether a base that differs is an error or a warning."""
  params = opened(params)
  nodes, treedef = flatten(params, is_leaf=is_leaf_node)
  if adapted := [path for path, node in nodes if is_adapted(node)]:
    raise CheckpointError(
      f"{what}: {adapted[0]} is adapted; expected the base alone. Pass jaxlora.strip(tree), or the original parameters."
    )
  leaves = dict(nodes)
  if any(map(spans_processes, jax.tree.leaves(leaves))):
    together(what)
  problems = list(_differences(manifest, params))
  new = dict(leaves)
  with one_error(f"{what}: cannot be read"):
    for leaf in manifest["leaves"]:
      base = leaves.get(leaf["path"])
      if leaf["path"] in leaves and list(shape_of(base)) == leaf["shape"]:
        new[leaf["path"]] = _on_base(node_of(leaf, arrays, base))
  if problems and strict:
    raise CheckpointError(
      f"{what}: this is not the base that the adapter was trained on. {_lines(problems)} {_remedy(manifest)}"
    )
  if not any(is_adapted(node) for node in new.values()):
    raise CheckpointError(f"{what}: no adapted leaf of the checkpoint fits the base. {_lines(problems)}")
  if problems:
    warnings.warn(
      CheckpointWarning(f"{what}: loaded what fits a base that differs. {_lines(problems)}", tuple(problems)),
      stacklevel=3,
    )
  return with_own_names(jax.tree_util.tree_unflatten(treedef, list(new.values())))


def _remedy(manifest: Mapping[str, Any]) -> str:
  if manifest["whole_base"]:
    return "Pass that base; strict=False loads what fits and warns of the rest."
  return (
    "It was converted without a base: paths and shapes are those that Flax would have for its names. Convert it again"
    " with --base FILE, or load the adapter's own files onto this base: jaxlora.peft.load(folder, params)."
  )


def _lines(problems: list[str]) -> str:
  shown = problems[:20]
  return "; ".join(shown) + (f"; and {len(problems) - len(shown)} more." if len(problems) > len(shown) else ".")


def _differences(manifest: Mapping[str, Any], params: Any) -> Iterator[str]:
  """How a base differs from that of the manifest, a line per leaf."""
  adapted = {leaf["path"] for leaf in manifest["leaves"]}
  expected = {leaf["path"]: print_of(leaf) for leaf in manifest["base"]}
  found = prints(params)
  for path, old in expected.items():
    role = "adapted" if path in adapted else "frozen"
    new = found.get(path)
    if new is None:
      yield f"{path} ({role}): missing in the base"
    elif new.shape != old.shape:
      yield f"{path} ({role}): shape {new.shape}, expected {old.shape}"
    elif new.dtype != old.dtype:
      yield f"{path} ({role}): dtype {new.dtype}, expected {old.dtype}"
    elif new.digest and old.digest and new.digest != old.digest:
      yield f"{path} ({role}): other values (fingerprint {new.digest}, expected {old.digest})"
  for path in found:
    if manifest["whole_base"] and path not in expected:
      yield f"{path}: only in the base given, not in the one of the checkpoint"


def print_of(leaf: Mapping[str, Any]) -> Print:
  return Print(leaf["dtype"], tuple(leaf["shape"]), leaf["digest"])


def _on_base(node: Any) -> Any:
  """The node with its NumPy arrays on the base's devices."""
  held = {name: part for name, part in parts(node).items() if name != "base" and part is not None}
  placed = {}
  for name, part in held.items():
    placed[name] = put_on(as_jax_array({"key": name}, part), sharding_of(node, name))
  return with_parts(node, placed)
