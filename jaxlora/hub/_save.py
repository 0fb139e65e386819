"""`save`: a tree as safetensors, with torch's names and layouts."""

from collections.abc import Collection, Mapping
import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.checks import is_abstract
from jaxlora._base.coded import is_coded
from jaxlora._base.files import Spec, code_of, nbytes_of, new_header, raw_bytes, replacing
from jaxlora._base.paths import flatten
from jaxlora._base.processes import GATHER, not_here
from jaxlora._files.carried import carry, changed_config
from jaxlora._files.tensors import INDEX
from jaxlora._weight.weight import is_adapted, is_leaf_node
from jaxlora.hub._for_torch import groups_of, shapes_of_layers, tensors_of, values_of_layers
from jaxlora.hub._records import HubError, failed
from jaxlora.hub._scanned import with_scanned
from jaxlora.peft._conv1d import told_by_model
from jaxlora.peft._model import TorchModel
from jaxlora.peft._names import Names, check_names
from jaxlora.peft._roles import Axes, KnownRoles, known_roles

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
    params: plain parameters, such as `jaxlora.merge` returns. Codes are written as the floats that they stand for. One
      layer of a leaf after the other is copied to the host, and written. Random keys and counters are no weights, and
      left out.
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
  target = Path(folder)
  if target.exists() and (not target.is_dir() or any(target.iterdir())):
    raise HubError(f"hub.save: {target}: is there already. Name another folder, or remove it first.")
  kind = None if dtype is None else jnp.dtype(dtype)
  written = _planned(params, names, axes, kind)
  shards = _shards(written.specs, shard_bytes)
  files = []
  try:
    with replacing(target) as new:
      new.mkdir()
      _write(new, written, shards, kind)
      if len(shards) > 1:
        _write_index(new / f"model{INDEX}", shards, written.specs)
      if beside is not None:
        _carry(Path(beside), new, written.specs, dtype)
      files = sorted(file.name for file in new.iterdir())
  except OSError as error:
    raise HubError(f"hub.save: {target}: cannot be written: {error}") from error
  return files


@dataclasses.dataclass(frozen=True)
class _Written:
  """What is written.

  Attributes:
    model: the tree as torch's model.
    known: its roles.
    groups: the leaves whose tensors are made together.
    specs: the dtype and shape of each tensor, by name.
  """

  model: TorchModel
  known: KnownRoles
  groups: list[list[str]]
  specs: dict[str, Spec]


def _planned(params: Any, names: Names, axes: Axes, dtype: np.dtype | None) -> _Written:
  """Every tensor that is written, by name; no value is read for it."""
  nodes = dict(flatten(params, is_leaf=is_leaf_node)[0])
  for path, leaf in nodes.items():
    if is_adapted(leaf):
      raise HubError(f"hub.save: {path}: is adapted. Merge it first (jaxlora.merge), or write the adapter: peft.save.")
    if is_abstract(leaf):
      raise HubError(f"hub.save: {path}: is a shape without values. Save the tree once it has some.")
    if any(map(not_here, jax.tree.leaves(leaf))):
      raise HubError(f"hub.save: {path}: other processes hold shards of it. {GATHER}")
  check_names(names, nodes)
  problems: list[str] = []
  known = with_scanned(nodes, known_roles(nodes, params, axes, None))
  leaves = {path: leaf if is_coded(leaf) else _array(leaf) for path, leaf in nodes.items() if not _is_state(leaf)}
  model = TorchModel.of_leaves(leaves, names, known, problems)
  known = dataclasses.replace(known, conv1d=told_by_model(model.sizes()))
  problems += [
    f"{path}: nothing tells its name in torch. Say it by names=" for path in leaves if path not in model.targets
  ]
  groups = groups_of(model)
  layer = shapes_of_layers(model, {path: leaf.dtype for path, leaf in leaves.items()})
  specs: dict[str, Spec] = {}
  for group in groups:
    for name, stub in tensors_of(model, group, known, layer, problems):
      if name in specs:
        problems.append(
          f"{name}: several leaves have this name, {', '.join(group)} among them. Tell them apart by names="
        )
      specs[name] = code_of(_dtype(stub, dtype)), stub.shape
  if problems:
    raise failed("hub.save", [*dict.fromkeys(problems)])
  return _Written(model, known, groups, specs)


def _array(leaf: Any) -> Any:
  return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _is_state(leaf: Any) -> bool:
  """Whether a leaf is a random key or a counter, such as NNX's dropout has: no weight, and `load` keeps the tree's."""
  dtype = jnp.result_type(leaf)
  return jnp.issubdtype(dtype, jax.dtypes.prng_key) or (jnp.ndim(leaf) == 0 and jnp.issubdtype(dtype, jnp.integer))


def _dtype(value: np.ndarray, dtype: np.dtype | None) -> np.dtype:
  return value.dtype if dtype is None or not jnp.issubdtype(value.dtype, jnp.floating) else dtype


def _write(new: Path, written: _Written, shards: Mapping[str, list[str]], dtype: np.dtype | None) -> None:
  """Writes the files: headers first, and then each tensor into its place, one after the other."""
  places: dict[str, tuple[BinaryIO, int]] = {}
  with contextlib.ExitStack() as stack:
    for file, part in shards.items():
      stream = stack.enter_context(open(new / file, "wb"))
      header, begins = new_header({name: written.specs[name] for name in part}, {"format": "pt"})
      stream.write(header)
      places |= {name: (stream, begin) for name, begin in begins.items()}
    for group in written.groups:
      layer = values_of_layers(written.model, group)
      for name, value in tensors_of(written.model, group, written.known, layer, []):
        place, begin = places[name]
        place.seek(begin)
        place.write(raw_bytes(value.astype(_dtype(value, dtype), copy=False)))


def _shards(specs: Mapping[str, Spec], most: int) -> dict[str, list[str]]:
  """The tensors of each file, by its name."""
  parts: list[list[str]] = [[]]
  size = 0
  for name, spec in specs.items():
    if parts[-1] and size + nbytes_of(*spec) > most:
      parts.append([])
      size = 0
    parts[-1].append(name)
    size += nbytes_of(*spec)
  if len(parts) == 1:
    return {_FILE: parts[0]}
  return {f"model-{k:05}-of-{len(parts):05}.safetensors": part for k, part in enumerate(parts, 1)}


def _write_index(path: Path, shards: Mapping[str, list[str]], specs: Mapping[str, Spec]) -> None:
  files = {name: file for file, part in shards.items() for name in part}
  total = sum(nbytes_of(*spec) for spec in specs.values())
  path.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=2) + "\n", "utf-8")


def _carry(base: Path, new: Path, tensors: Collection[str], dtype: Any) -> None:
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
