"""From an adapter to the changes of a model's weights, by the names of torch or by those of a Flax tree."""

from collections.abc import Mapping
import dataclasses
import functools
import re
from typing import Any

import numpy as np

from jaxlora._adapt.merge import merge
from jaxlora._base.rounding import same_but_for_rounding
from jaxlora._base.text import listed
from jaxlora._cli.edits import Change, Weights
from jaxlora._cli.renamed import tensors_of
from jaxlora._cli.result import BadFile
from jaxlora._cli.sources import (
  axes_of,
  bare_path,
  existing,
  flax_paths,
  is_peft,
  names_of,
  shapes_of_base,
  shapes_of_files,
)
from jaxlora._cli.ties import settle_ties
from jaxlora._weight.fingerprint import prints
from jaxlora._weight.weight import is_adapted
from jaxlora.checkpoint._adapter import contents
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._left_out import warn_of_tensors
from jaxlora.peft._names import Names
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import Axes
from jaxlora.peft._to_modules import to_modules

# By name of the base's weight (`None`: it is copied); names of the adapter that the base does not have.
Changes = tuple[dict[str, Change | None], list[str]]


def changes_of(options: Any, weights: Weights) -> dict[str, Change | None]:
  """What becomes of each tensor that is adapted.

  Raises:
    BadFile: where a part of the adapter has no tensor in the base.
  """
  names, axes, files = names_of(options), axes_of(options), weights.files
  flax = files.form != "safetensors" or any(re.search(r"[./](kernel|embedding|scale)$", name) for name in files.tensors)
  if is_peft(options.adapter):
    changes, lost = _files_changes(options, weights, names, axes, flax)
  else:
    found = contents(existing(options.adapter))
    changes, lost = _flax_changes(found.leaves, {} if options.any_base else found.base, weights)
    if lost and not flax:
      modules = to_modules(shapes_of_base(found) | found.leaves, names=names, axes=axes)
      changes, lost = _torch_changes(modules, weights, options.untie)
    elif axes is not None:
      raise BadFile(f"--axes: {options.adapter} is a checkpoint on this base, and knows its roles. Leave it out.")
  if options.untie and not weights.added:
    raise BadFile("--untie: found no torch model whose embedding is the head, too. Leave it out.")
  if lost:
    raise BadFile(
      f"{options.adapter}: adapts {listed(sorted(lost))}, which {options.base} does not hold. Its tensors:"
      f" {listed(list(files.tensors))}. It is another model's adapter, or its names need --names:"
      ' a JSON file of {"the/base\'s/name/(.*)": "the.adapter\'s.name.\\1"}.'
    )
  return changes


def _files_changes(options: Any, weights: Weights, names: Names, axes: Axes, flax: bool) -> Changes:
  """The changes that an adapter in files makes: by torch's names, or by those that a Flax base has for its modules."""
  adapter = read(options.adapter, adapter_name=options.adapter_name)
  if axes is None:
    changes, lost = _torch_changes(adapter, weights, options.untie, None if flax else names)
    if not lost and names is None:
      warn_of_tensors(adapter, {name: weight.shape for name, weight in weights.by_name.items()}, changes)
    if not (lost and flax):
      return changes, lost
  leaves = from_modules(adapter, _bare(shapes_of_files(weights.files)), names=names, axes=axes, strict=False)
  return _flax_changes({path: node for path, node in leaves.items() if is_adapted(node)}, {}, weights)


def _bare(shapes: Mapping[str, Any]) -> dict[str, Any]:
  return {bare_path(path): shape for path, shape in shapes.items()}


def _torch_changes(adapter: Adapter, weights: Weights, untie: bool, names: Names = None) -> Changes:
  """The changes of a torch model's tensors."""
  held = weights.by_name
  adapter, tensor_of = tensors_of(adapter, names, {name: weight.shape for name, weight in held.items()})
  shapes = {name: weight.shape for name, weight in held.items()}
  shapes |= {name: held[tensor].shape for name, tensor in tensor_of.items() if tensor in held}
  inputs_first: dict[str, bool | None] = dict.fromkeys(tensor_of, adapter.stores_inputs_first(shapes))
  inputs_first |= {name: adapter.stores_experts_inputs_first(name, shapes) for name in adapter.packed}
  changes: dict[str, Change | None] = {
    weight: functools.partial(_merged_module, adapter, name, inputs_first[name])
    for name, weight in tensor_of.items()
    if weight in held
  }
  found = settle_ties(adapter, tensor_of, changes, weights, untie)
  for weight in {*tensor_of.values(), *changes}:
    weights.checked(weight)
  return changes, [name for name, weight in tensor_of.items() if weight not in held and name not in found]


def _merged_module(
  adapter: Adapter, name: str, inputs_first: bool | None, value: np.ndarray, dtype: np.dtype
) -> np.ndarray:
  """A parameter of a torch model with the adapter folded in.

  Raises:
    BadFile: where the adapter holds the base that it was trained on, and it is another.
  """
  base = adapter.bases.get(name)
  if base is not None and not same_but_for_rounding(base, value):
    raise BadFile(
      f"{name}: the adapter holds the weight that it was trained on, and the base's is another. Pass the model that the"
      " adapter was trained on as BASE."
    )
  whole = adapter.whole.get(name)
  if whole is not None and not adapter.is_asked(name) and same_but_for_rounding(whole, value):
    return value.astype(dtype)  # a copy of the base, which PEFT writes of its own accord
  return adapter.merged(name, value, inputs_first=inputs_first, dtype=dtype)


def _flax_changes(nodes: Mapping[str, Any], prints_of_base: Mapping[str, str], weights: Weights) -> Changes:
  """The changes of a Flax tree's tensors, by the paths of its leaves, under `params` or not.

  Args:
    nodes: adapted leaves by path, whose bases may be shapes.
    prints_of_base: fingerprints that the bases must have, by path; those that are missing are not checked.
    weights: of the base.
  """
  files = weights.files
  paths = {bare_path(path): name for name, path in flax_paths(files.tensors).items()}
  tensor_of = {path: paths.get(bare_path(path)) for path in nodes}
  changes: dict[str, Change | None] = {
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
