"""`jaxlora merge`: a model's tensors with an adapter folded in, one at a time."""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
from pathlib import Path
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.merge import merge
from jaxlora._base.text import listed, size
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.sources import existing, flax_paths, is_peft, names_of, shapes_of_base, shapes_of_files
from jaxlora._cli.tensors import Change, TensorFiles, open_files, rewrite
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.weight import is_adapted
from jaxlora.checkpoint._adapter import contents
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter
from jaxlora.peft._to_modules import to_modules

Changes = tuple[
  dict[str, Change], list[str]
]  # by name of the base's tensor; names of the adapter that it does not have


def run_merge(options: Any) -> Result:
  """Folds ADAPTER into the tensors of BASE, and writes OUT."""
  from tqdm import tqdm  # an extra: jaxlora[peft]

  files = open_files(options.base)
  changes = _changes(options, files)
  out = Path(options.out)
  if out.is_dir() and files.index is None:
    out = out / files.files[0].name
  if any(out.exists() and out.samefile(file) for file in files.files):
    raise BadFile(f"{out}: is the base itself; expected another place.")
  total = sum(file.stat().st_size for file in files.files)
  with tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="merging", leave=False) as bar:
    rewrite(files, out, changes, bar.update)
  report = {"out": str(out), "tensors": len(files.tensors), "merged": sorted(changes), "bytes": files.size}
  return report, [f"{out}: {len(changes)} of {len(files.tensors)} tensors merged, {size(files.size)}"]


def _changes(options: Any, files: TensorFiles) -> dict[str, Change]:
  """What becomes of each tensor that is adapted.

  Raises:
    BadFile: where a part of the adapter has no tensor in the base.
  """
  names = names_of(options)
  flax = any(re.search(r"[./](kernel|embedding|scale)$", name) for name in files.tensors)
  if is_peft(options.adapter):
    adapter = read(options.adapter)
    changes, lost = _torch_changes(adapter, files)
    if lost and flax:
      leaves = from_modules(adapter, shapes_of_files(files), names=names)
      nodes = {path: node for path, node in leaves.items() if is_adapted(node)}
      return _flax_changes(nodes, {}, files)[0]
  else:
    found = contents(existing(options.adapter))
    changes, lost = _flax_changes(found.leaves, {} if options.any_base else found.base, files)
    if lost and not flax:
      changes, lost = _torch_changes(to_modules(shapes_of_base(found) | found.leaves, names=names), files)
  if lost:
    raise BadFile(
      f"{options.adapter}: adapts {listed(sorted(lost))}, which {options.base} does not hold. Its tensors:"
      f" {listed(list(files.tensors))}. It is another model's adapter, or its names need --names."
    )
  return changes


def _torch_changes(adapter: Adapter, files: TensorFiles) -> Changes:
  """The changes of a torch model's tensors.

  Files of a bare model lack the beginning that the same model has inside one with a head (`transformer.h.0`, `h.0`), or
  have one more: one difference for all names is allowed, the one with which most are found.
  """
  adapted = [*(f"{name}.weight" for name in adapter.modules), *adapter.whole]
  beginnings = sorted({name.split(".", 1)[0] + "." for name in (*adapted, *files.tensors)})
  renamings = [("", ""), *((b, "") for b in beginnings), *(("", b) for b in beginnings)]  # (removed, added)
  renamed = [{name: added + name.removeprefix(removed) for name in adapted} for removed, added in renamings]
  tensor_of = max(renamed, key=lambda names: sum(name in files.tensors for name in names.values()))
  removed, added = renamings[renamed.index(tensor_of)]
  shapes = {removed + name.removeprefix(added): tensor.shape for name, tensor in files.tensors.items()}
  inputs_first = adapter.stores_inputs_first(shapes)
  changes: dict[str, Change] = {
    tensor: functools.partial(adapter.merged, name, inputs_first=inputs_first)
    for name, tensor in tensor_of.items()
    if tensor in files.tensors
  }
  _check_floating(changes, files)
  return changes, [name for name, tensor in tensor_of.items() if tensor not in files.tensors]


def _flax_changes(nodes: Mapping[str, Any], prints_of_base: Mapping[str, str], files: TensorFiles) -> Changes:
  """The changes of a Flax tree's tensors, by the paths of its leaves, under `params` or not.

  Args:
    nodes: adapted leaves by path, whose bases may be shapes.
    prints_of_base: fingerprints that the bases must have, by path; those that are missing are not checked.
    files: the base.
  """
  paths = {path.removeprefix("params/"): name for name, path in flax_paths(files.tensors).items()}
  tensor_of = {path: paths.get(path.removeprefix("params/")) for path in nodes}
  changes: dict[str, Change] = {
    tensor: functools.partial(_merged_leaf, path, nodes[path], prints_of_base.get(path))
    for path, tensor in tensor_of.items()
    if tensor is not None
  }
  for path, tensor in tensor_of.items():
    if tensor is not None and files.tensors[tensor].shape != tuple(nodes[path].base.shape):
      raise BadFile(
        f"{tensor}: shape {files.tensors[tensor].shape}, the adapter's base has {tuple(nodes[path].base.shape)}."
      )
  _check_floating(changes, files)
  return changes, [path for path, tensor in tensor_of.items() if tensor is None]


def _check_floating(names: Iterable[str], files: TensorFiles) -> None:
  """Raises unless the tensors have floating dtypes."""
  for name in names:
    dtype = files.tensors[name].dtype
    if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
      raise BadFile(f"{name}: dtype {dtype or 'unknown'} cannot be merged into; expected a floating one.")


def _merged_leaf(path: str, node: Any, expected: str | None, value: np.ndarray) -> np.ndarray:
  """The value of one leaf of the base with its adapted node folded in, once its fingerprint is the expected one."""
  found = str(prints({"leaf": value})["leaf"])
  if expected is not None and ":" in expected and found != expected:
    raise BadFile(
      f"{path}: {found} in the base, the adapter was trained on {expected}. Pass that base, or --any-base to merge all"
      " the same."
    )
  whole = merge({path: dataclasses.replace(node, base=value)})[path]
  return np.asarray(whole).astype(value.dtype)
