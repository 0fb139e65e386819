"""`jaxlora merge`: a model's tensors with an adapter folded in, one at a time."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.merge import merge
from jaxlora._base.rounding import notable
from jaxlora._base.text import listed, size
from jaxlora._cli.carried import carry, changed_config, quantisation_of
from jaxlora._cli.edits import Change, Weights
from jaxlora._cli.result import BadFile, Result
from jaxlora._cli.rewrite import Edit, nbytes, rewrite
from jaxlora._cli.sources import existing, flax_paths, is_peft, names_of, shapes_of_base, shapes_of_files
from jaxlora._cli.tensors import TensorFileError, TensorFiles, open_files
from jaxlora._files.format import FormatError
from jaxlora._files.formats import quantised_weights
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.weight import is_adapted
from jaxlora.checkpoint._adapter import contents
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter
from jaxlora.peft._to_modules import to_modules

Changes = tuple[
  dict[str, Change], list[str]
]  # by name of the base's weight; names of the adapter that it does not have


def run_merge(options: Any) -> Result:
  """Folds ADAPTER into the tensors of BASE, and writes OUT."""
  files = open_files(options.base)
  weights = _weights(options, files)
  changes = _changes(options, weights)
  edits = weights.edits(changes)
  out, folder = _target(Path(options.out), files)
  config = changed_config(files.config, dequantised=options.dequantize, dtype=options.dtype, untied=False)
  with _bar(files, edits) as bar:
    carried = _write(files, out, edits, config, options.dequantize, bar, folder=folder)
  report = {"out": str(out), "tensors": len(files.tensors), "merged": sorted(changes), "bytes": files.size}
  report |= {"lost": weights.lost, "carried": carried}
  lines = [f"{out}: {len(changes)} of {len(files.tensors)} tensors merged, {size(files.size)}"]
  return report, lines + _about_config(files, config, carried) + _about_rounding(weights)


def _weights(options: Any, files: TensorFiles) -> Weights:
  """The weights of the base, whatever the tensors that hold them."""
  config = files.config
  quantisation = quantisation_of(config)
  try:
    quantised = quantised_weights(files.tensors, quantisation, files.read)
  except FormatError as error:
    raise BadFile(f"{options.base}: {error}") from error
  told = str(config.get("dtype") or config.get("torch_dtype"))
  plain = jnp.dtype(told if told in ("float32", "float16", "bfloat16") else "bfloat16")
  dtype = None if options.dtype is None else jnp.dtype(options.dtype)
  return Weights(files, quantised, dtype, options.dequantize, plain)


def _target(out: Path, files: TensorFiles) -> tuple[Path, bool]:
  """Where the model goes, and whether that is a new folder; where it is a file it may be in a folder that exists."""
  several = files.index is not None or len(files.files) > 1
  folder = several or (files.folder is not None and not out.is_dir() and out.suffix != ".safetensors")
  if folder and out.exists():
    raise TensorFileError(f"{out}: exists; expected a new folder.")
  if not folder and out.is_dir():
    out = out / files.files[0].name
  if any(out.exists() and out.samefile(file) for file in files.files):
    raise BadFile(f"{out}: is the base itself; expected another place.")
  return out, folder


def _bar(files: TensorFiles, edits: Sequence[Edit]) -> Any:
  """A progress bar over the bytes that are written."""
  from tqdm import tqdm  # an extra: jaxlora[peft]

  outputs = {name: spec for edit in edits for name, spec in edit.outputs.items()}
  gone = {name for edit in edits for name in edit.removed}
  copied = sum(t.nbytes for name, t in files.tensors.items() if name not in outputs and name not in gone)
  total = copied + sum(map(nbytes, outputs.values()))
  return tqdm(total=total, unit="B", unit_scale=True, disable=None, desc="merging", leave=False)


def _write(
  files: TensorFiles,
  out: Path,
  edits: Sequence[Edit],
  config: Mapping[str, Any],
  dequantised: bool,
  bar: Any,
  *,
  folder: bool,
) -> list[str]:
  """Writes the model, and beside it what the base's folder holds; returns the names of the latter."""

  def rest(target: Path) -> list[str]:
    return carry(files.folder, target, config, dequantised=dequantised) if files.folder else []

  carried: list[str] = []
  if folder:
    rewrite(files, out, edits, bar.update, folder=True, beside=lambda new: carried.extend(rest(new)))
    return carried
  alone = files.folder is None or out.name != files.files[0].name or out.parent.resolve() == files.folder.resolve()
  if not alone and config != files.config and (out.parent / "config.json").exists():
    raise BadFile(f"{out.parent / 'config.json'}: exists, and the merged model needs another. Name a new folder.")
  rewrite(files, out, edits, bar.update, folder=False)
  return [] if alone else rest(out.parent)


def _about_config(files: TensorFiles, config: Mapping[str, Any], carried: Sequence[str]) -> list[str]:
  """What is to be changed in a config.json that was not carried along."""
  if config == files.config or "config.json" in carried:
    return []
  gone = [name for name in files.config if name not in config]
  changed = [f"{name}: {json.dumps(config[name])}" for name in config if config[name] != files.config.get(name)]
  return [
    "config.json was not copied, as OUT is a file. The merged model needs "
    + "; ".join([*(f"no {name}" for name in gone), *changed])
    + ". (A folder as BASE and as OUT takes it along.)"
  ]


def _about_rounding(weights: Weights) -> list[str]:
  """What rounding has taken of the updates, and how to keep it."""
  lines = []
  forms = sorted({weights.quantised[name].format.name for name in weights.lost if name in weights.quantised})
  if forms and not weights.dequantize:
    shares = [share for name, share in weights.lost.items() if name in weights.quantised]
    lines.append(
      f"stored again as {', '.join(forms)}: of the updates' norms {max(shares):.1%} is lost to rounding at most,"
      f" {float(np.median(shares)):.1%} in the median"
    )
  if found := notable(weights.lost):
    option = "--dequantize stores plain floats" if lines else "--dtype float32 keeps it"
    lines.append(f"warning: more than a tenth of the update is rounded away in {found}. {option}.")
  return lines


def _changes(options: Any, weights: Weights) -> dict[str, Change]:
  """What becomes of each tensor that is adapted.

  Raises:
    BadFile: where a part of the adapter has no tensor in the base.
  """
  names, files = names_of(options), weights.files
  flax = any(re.search(r"[./](kernel|embedding|scale)$", name) for name in files.tensors)
  if is_peft(options.adapter):
    adapter = read(options.adapter)
    changes, lost = _torch_changes(adapter, weights)
    if lost and flax:
      leaves = from_modules(adapter, shapes_of_files(files), names=names)
      nodes = {path: node for path, node in leaves.items() if is_adapted(node)}
      return _flax_changes(nodes, {}, weights)[0]
  else:
    found = contents(existing(options.adapter))
    changes, lost = _flax_changes(found.leaves, {} if options.any_base else found.base, weights)
    if lost and not flax:
      changes, lost = _torch_changes(to_modules(shapes_of_base(found) | found.leaves, names=names), weights)
  if lost:
    raise BadFile(
      f"{options.adapter}: adapts {listed(sorted(lost))}, which {options.base} does not hold. Its tensors:"
      f" {listed(list(files.tensors))}. It is another model's adapter, or its names need --names."
    )
  return changes


def _torch_changes(adapter: Adapter, weights: Weights) -> Changes:
  """The changes of a torch model's tensors.

  Files of a bare model lack the beginning that the same model has inside one with a head (`transformer.h.0`, `h.0`), or
  have one more: one difference for all names is allowed, the one with which most are found.
  """
  held = weights.by_name
  adapted = [*(f"{name}.weight" for name in adapter.modules), *adapter.whole]
  beginnings = sorted({name.split(".", 1)[0] + "." for name in (*adapted, *held)})
  renamings = [("", ""), *((b, "") for b in beginnings), *(("", b) for b in beginnings)]  # (removed, added)
  renamed = [{name: added + name.removeprefix(removed) for name in adapted} for removed, added in renamings]
  tensor_of = max(renamed, key=lambda names: sum(name in held for name in names.values()))
  removed, added = renamings[renamed.index(tensor_of)]
  shapes = {removed + name.removeprefix(added): weight.shape for name, weight in held.items()}
  inputs_first = adapter.stores_inputs_first(shapes)
  changes: dict[str, Change] = {
    weight: functools.partial(_merged_module, adapter, name, inputs_first)
    for name, weight in tensor_of.items()
    if weight in held
  }
  for weight in tensor_of.values():
    weights.checked(weight)
  return changes, [name for name, weight in tensor_of.items() if weight not in held]


def _merged_module(
  adapter: Adapter, name: str, inputs_first: bool | None, value: np.ndarray, dtype: np.dtype
) -> np.ndarray:
  return adapter.merged(name, value, inputs_first=inputs_first, dtype=dtype)


def _flax_changes(nodes: Mapping[str, Any], prints_of_base: Mapping[str, str], weights: Weights) -> Changes:
  """The changes of a Flax tree's tensors, by the paths of its leaves, under `params` or not.

  Args:
    nodes: adapted leaves by path, whose bases may be shapes.
    prints_of_base: fingerprints that the bases must have, by path; those that are missing are not checked.
    weights: of the base.
  """
  files = weights.files
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
  for name in changes:
    weights.checked(name)
  return changes, [path for path, tensor in tensor_of.items() if tensor is None]


def _merged_leaf(path: str, node: Any, expected: str | None, value: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """The value of one leaf of the base with its adapted node folded in, once its fingerprint is the expected one."""
  found = str(prints({"leaf": value})["leaf"])
  if expected is not None and ":" in expected and found != expected:
    raise BadFile(
      f"{path}: {found} in the base, the adapter was trained on {expected}. Pass that base, or --any-base to merge all"
      " the same."
    )
  return np.asarray(merge({path: dataclasses.replace(node, base=value)}, dtype=dtype)[path])
