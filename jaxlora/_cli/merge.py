"""`jaxlora merge`."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
from pathlib import Path
import re
import tempfile
from typing import Any

import jax.numpy as jnp
import numpy as np

import jaxlora
from jaxlora._base.text import listed, size
from jaxlora._cli.main import Result
from jaxlora._cli.sources import (
  BadFile,
  contents_of,
  flax_paths,
  flax_shapes,
  is_peft,
  names_of,
  read_peft,
  shape_of_print,
)
from jaxlora._cli.tensors import Change, TensorFiles, open_files, rewrite
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.weight import is_adapted


def run_merge(options: Any) -> Result:
  files = open_files(options.base)
  changes = _changes(options, files)
  out = Path(options.out)
  if out.is_dir() and files.index is None:
    out = out / files.files[0].name
  if any(out.exists() and out.samefile(file) for file in files.files):
    raise BadFile(f"{out}: is the base itself; expected another place.")
  from tqdm import tqdm

  total = sum(file.stat().st_size for file in files.files)
  with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="merging", leave=False) as bar:
    rewrite(files, out, changes, bar.update)
  report = {"out": str(out), "tensors": len(files.tensors), "merged": sorted(changes), "bytes": files.size}
  return report, [f"{out}: {len(changes)} of {len(files.tensors)} tensors merged, {size(files.size)}"]


def _changes(options: Any, files: TensorFiles) -> dict[str, Change]:
  """What becomes of which tensor, all of the adapter placed or an error."""
  names = names_of(options)
  if is_peft(options.adapter):
    adapter = read_peft(options.adapter)
    changes, lost = _torch_changes(adapter, files)
    if lost and _looks_like_flax(files):
      from jaxlora import peft

      leaves = peft.load(options.adapter, flax_shapes(files), names=names)
      nodes = {path: node for path, node in leaves.items() if is_adapted(node)}
      return _flax_changes(nodes, {}, files, True)[0]
  else:
    found = contents_of(options.adapter)
    changes, lost = _flax_changes(found.leaves, found.base, files, options.any_base)
    if lost and not _looks_like_flax(files):
      changes, lost = _torch_changes(_as_peft(found, names), files)
  if lost:
    raise BadFile(
      f"{options.adapter}: adapts {listed(sorted(lost))}, which {options.base} does not hold. Its tensors:"
      f" {listed(list(files.tensors))}. It is another model's adapter, or its names need --names."
    )
  return changes


def _looks_like_flax(files: TensorFiles) -> bool:
  return any(re.search(r"[./](kernel|embedding|scale)$", name) for name in files.tensors)


def _as_peft(found: Any, names: Any) -> Any:
  """A checkpoint's adapter in torch's names and layouts."""
  from jaxlora import peft

  base = {path: shape_of_print(text) for path, text in found.base.items()}
  with tempfile.TemporaryDirectory() as folder:
    peft.save(folder, base | found.leaves, names=names)
    return read_peft(folder)


def _torch_changes(adapter: Any, files: TensorFiles) -> tuple[dict[str, Change], list[str]]:
  """By torch's names, and the names that the base does not hold.

  Files of a bare model lack the beginning that the same model has inside one with a head (`transformer.h.0`, `h.0`), or
  have one more: one difference for all names is taken.
  """
  wanted = [*(f"{name}.weight" for name in adapter.modules), *adapter.whole]
  beginnings = sorted({name.split(".", 1)[0] + "." for name in (*wanted, *files.tensors)})
  ways = [("", ""), *((b, "") for b in beginnings), *(("", b) for b in beginnings)]  # what a name loses and gets
  renamed = [{name: new + name.removeprefix(old) for name in wanted} for old, new in ways]
  places = max(renamed, key=lambda places: sum(place in files.tensors for place in places.values()))
  old, new = ways[renamed.index(places)]
  shapes = {old + name.removeprefix(new): tensor.shape for name, tensor in files.tensors.items()}
  first = adapter.stores_inputs_first(shapes)
  changes: dict[str, Change] = {
    place: functools.partial(adapter.merged, name, inputs_first=first)
    for name, place in places.items()
    if place in files.tensors
  }
  _check_floating(changes, files)
  return changes, [name for name, place in places.items() if place not in files.tensors]


def _flax_changes(
  nodes: Mapping[str, Any], base: Mapping[str, str], files: TensorFiles, any_base: bool
) -> tuple[dict[str, Change], list[str]]:
  """By the paths of a Flax tree, under `params` or not, and the paths that the base does not hold."""
  paths = {path.removeprefix("params/"): name for name, path in flax_paths(files.tensors).items()}
  places = {path: paths.get(path.removeprefix("params/")) for path in nodes}
  changes: dict[str, Change] = {
    place: functools.partial(_merged, path, nodes[path], None if any_base else base.get(path))
    for path, place in places.items()
    if place is not None
  }
  for path, place in places.items():
    if place is not None and files.tensors[place].shape != tuple(nodes[path].base.shape):
      raise BadFile(
        f"{place}: shape {files.tensors[place].shape}, the adapter's base has {tuple(nodes[path].base.shape)}."
      )
  _check_floating(changes, files)
  return changes, [path for path, place in places.items() if place is None]


def _check_floating(changes: Iterable[str], files: TensorFiles) -> None:
  for name in changes:
    dtype = files.tensors[name].dtype
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      raise BadFile(f"{name}: dtype {dtype or 'unknown'} cannot be merged into; expected a floating one.")


def _merged(path: str, node: Any, expected: str | None, value: np.ndarray) -> np.ndarray:
  found = str(prints({"leaf": value})["leaf"])
  if expected is not None and ":" in expected and found != expected:
    raise BadFile(
      f"{path}: {found} in the base, the adapter was trained on {expected}. Pass that base, or --any-base to merge all"
      " the same."
    )
  whole = jaxlora.merge({path: dataclasses.replace(node, base=value)})[path]
  return np.asarray(whole).astype(value.dtype)
