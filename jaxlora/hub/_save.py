"""`save`: a tree as safetensors, with torch's names and layouts."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._base.coded import decoded
from jaxlora._base.files import replacing
from jaxlora._base.paths import flatten
from jaxlora._files.carried import carry, changed_config
from jaxlora._files.tensors import INDEX
from jaxlora._weight.weight import is_adapted, is_leaf_node
from jaxlora.hub._records import HubError, failed
from jaxlora.hub._scanned import with_scanned
from jaxlora.peft._conv1d import told_by_model
from jaxlora.peft._for_torch import named_for_torch
from jaxlora.peft._model import TorchModel
from jaxlora.peft._names import Names, check_names
from jaxlora.peft._roles import Axes, known_roles
from jaxlora.peft._to_modules import torch_tensor

_FILE = "model.safetensors"


def save(
  folder: str | os.PathLike[str],
  params: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  dtype: Any = None,
  beside: str | os.PathLike[str] | None = None,
  shard_bytes: int = 5_000_000_000,
) -> list[str]:
  """Writes a tree of parameters as a model's folder of safetensors; `load` of it is the tree again.

      weight = kernel.T,    weight_l = kernel[l].T,    weight (out, in, h, w) = convolution (h, w, in, out)

  Args:
    folder: a new folder; it appears complete, or not at all.
    params: plain parameters, such as `jaxlora.merge` returns. Codes are written as the floats that they stand for.
    names: as for `load`.
    axes: as for `load`.
    dtype: of all floating tensors; `None` for each leaf's own.
    beside: the folder of the base: its config.json, tokenizer and other small files go along.
    shard_bytes: the most bytes of tensors in a file; with several, an index is written.

  Returns:
    The names of the files.

  Raises:
    HubError: listing the leaves that have no name or layout in torch; if the folder is there already, or cannot be
      written.

  Example:
    >>> import tempfile, jax.numpy as jnp, jaxlora.hub
    >>> params = {"layers_0": {"mlp": {"kernel": jnp.ones((3, 2))}}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   files = jaxlora.hub.save(folder + "/model", params)
    ...   again = jaxlora.hub.load(folder + "/model", params)
    >>> files, bool((again["layers_0"]["mlp"]["kernel"] == 1).all())
    (['model.safetensors'], True)
  """
  import safetensors.numpy  # an extra: jaxlora[peft]

  target = Path(folder)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise HubError(f"hub.save: {target}: is there already. Name another folder, or remove it first.")
  tensors = dict(_tensors(params, names, axes, None if dtype is None else jnp.dtype(dtype)))
  shards = _shards(tensors, shard_bytes)
  written = []
  try:
    with replacing(target) as new:
      new.mkdir()
      for name, part in shards.items():
        safetensors.numpy.save_file(
          {key: np.ascontiguousarray(tensors[key]) for key in part}, new / name, {"format": "pt"}
        )
      if len(shards) > 1:
        _write_index(new / f"model{INDEX}", shards, tensors)
      if beside is not None:
        _carry(Path(beside), new, tensors, dtype)
      written = sorted(file.name for file in new.iterdir())
  except OSError as error:
    raise HubError(f"hub.save: {target}: cannot be written: {error}") from error
  return written


def _tensors(params: Any, names: Names, axes: Axes, dtype: np.dtype | None) -> Iterator[tuple[str, np.ndarray]]:
  """Torch's tensors by name."""
  nodes, _ = flatten(params, is_leaf=is_leaf_node)
  if adapted := [path for path, leaf in nodes if is_adapted(leaf)]:
    raise HubError(
      f"hub.save: {adapted[0]}: is adapted. Merge it first (jaxlora.merge), or write the adapter: peft.save."
    )
  leaves = {path: decoded(leaf) for path, leaf in nodes}
  check_names(names, leaves)
  problems: list[str] = []
  known = with_scanned(leaves, known_roles(leaves, params, axes, None))
  model = TorchModel.of_leaves(leaves, names, known, problems)
  known = dataclasses.replace(known, conv1d=told_by_model(model.sizes()))
  problems += [
    f"{path}: nothing tells its name in torch. Say it by names=" for path in leaves if path not in model.targets
  ]
  whole = {}
  for module, held in model.parameters().items():
    for parameter, (path, index) in held.items():
      if model.targets[path].parameter is None:
        whole[module] = _as_it_is(path, index, model, problems)
      elif (value := torch_tensor(path, index, module, parameter, model, known, problems)) is not None:
        whole[f"{module}.{parameter}"] = value
  _, whole = named_for_torch([], whole, leaves, model.layers, model.targets, known.conv1d, problems)
  if problems:
    raise failed("hub.save", problems)
  for name, value in whole.items():
    yield name, value if dtype is None or not jnp.issubdtype(value.dtype, jnp.floating) else value.astype(dtype)


def _as_it_is(path: str, index: tuple[int, ...], model: TorchModel, problems: list[str]) -> np.ndarray:
  """A parameter that is no layer's weight, such as a class token: as the leaf has it."""
  value = np.moveaxis(np.asarray(model.leaves[path]), model.stacks[path], range(len(index)))[index]
  long = [size for size in value.shape if size > 1]
  if len({*long}) < len(long):
    problems.append(
      f"{path}: shape {value.shape} does not tell in which order torch's axes are. If it is a layer's weight, say so:"
      f" names={{{path!r}: 'its.name.weight'}}"
    )
  return value


def _shards(tensors: Mapping[str, np.ndarray], most: int) -> dict[str, list[str]]:
  """The tensors of each file, by its name."""
  parts: list[list[str]] = [[]]
  size = 0
  for name, tensor in tensors.items():
    if parts[-1] and size + tensor.nbytes > most:
      parts.append([])
      size = 0
    parts[-1].append(name)
    size += tensor.nbytes
  if len(parts) == 1:
    return {_FILE: parts[0]}
  return {f"model-{k:05}-of-{len(parts):05}.safetensors": part for k, part in enumerate(parts, 1)}


def _write_index(path: Path, shards: Mapping[str, list[str]], tensors: Mapping[str, np.ndarray]) -> None:
  files = {name: file for file, part in shards.items() for name in part}
  total = sum(tensor.nbytes for tensor in tensors.values())
  path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n", "utf-8")


def _carry(base: Path, new: Path, tensors: Mapping[str, np.ndarray], dtype: Any) -> None:
  """Copies what lies beside the base's weights; config.json says the dtype, and nothing of codes any more."""
  if not base.is_dir():
    raise HubError(f"hub.save: beside={str(base)!r}: is no folder; expected that of the base's files.")
  file = base / "config.json"
  config = json.loads(file.read_bytes()) if file.is_file() else {}
  name = None if dtype is None else jnp.dtype(dtype).name
  changed = changed_config(
    config, dequantised=True, dtype=name, untied="lm_head.weight" in tensors and bool(config.get("tie_word_embeddings"))
  )
  carry(base, new, changed, dequantised=True)
