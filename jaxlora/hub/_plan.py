"""Which tensors of a model make which leaf of a tree: every check, ahead of the first read."""

from collections.abc import Iterator, Mapping, Sequence
import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.text import listed
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora.hub._records import Source
from jaxlora.peft._for_leaves import named_for_leaves, targets_of_parts
from jaxlora.peft._from_modules import by_leaf, with_conv1d
from jaxlora.peft._layers import with_layers
from jaxlora.peft._names import Names, Target, default_target, given_target, key_of
from jaxlora.peft._nodes import Index, layer_from_torch
from jaxlora.peft._places import find_places
from jaxlora.peft._records import Adapter, PeftError
from jaxlora.peft._roles import KnownRoles
from jaxlora.peft._tied import head_name, is_embedding

# Buffers that torch's models may save, and that no parameter is made of.
_BUFFERS = re.compile(r"(?:.*\.)?(?:rotary_emb\.inv_freq|attn\.(?:masked_)?bias|position_ids|num_batches_tracked)")

_MOST_TIED = 20  # a model has one or two pairs of tied weights

Arrays = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Plan:
  """How the leaves are made.

  Attributes:
    leaves: of the tree, by path.
    known: roles and stacks of the tree.
    names: of each leaf that the model fills, by path: the tensor of each index along its stacked axes.
    parts: the targets of leaves that are no one torch module, by path.
  """

  leaves: Mapping[str, Any]
  known: KnownRoles
  names: Mapping[str, Mapping[Index, str]]
  parts: Mapping[str, Target]


def plan_of(
  source: Source, leaves: Mapping[str, Any], known: KnownRoles, names: Names, ignore: str | None
) -> tuple[Plan, list[str]]:
  """The plan, and all that is wrong with it.

  Args:
    source: the model.
    leaves: of the tree, by path: arrays or shapes.
    known: roles of the tree, as far as it tells them.
    names: as for `load`.
    ignore: a regex of tensors that are left out.
  """
  problems: list[str] = []
  stubs = {
    name: np.broadcast_to(np.int8(0), tensor.shape)
    for name, tensor in source.tensors.items()
    if not _ignored(name, ignore)
  }
  adapter = Adapter({}, stubs, {}, {})
  known = with_conv1d(known, adapter, leaves)
  parts = targets_of_parts(leaves, names, known)
  adapter = named_for_leaves(adapter, leaves, parts, known, problems)
  by_key = {key_of(name): name for name in adapter.whole}
  places, missing = find_places(by_key, leaves, names, parts)
  held = by_leaf(adapter.whole, places)
  placed = [name for layers in held.values() for name, _ in layers.values()]
  problems += [
    text.replace(".".join(key), by_key[key], 1) if key in by_key else text
    for key, text in missing.items()
    if not _is_copy(by_key.get(key), placed, source, len(missing))
  ]
  held |= _tied_heads(source, leaves, held, names, adapter.whole)
  known, untold = with_layers(known, leaves, {}, held, names)
  problems += untold.values()
  problems += _missing(leaves, held)
  for path, layers in held.items():
    if path not in untold:
      problems += _misfits(path, shape_of_leaf(leaves[path]), layers, known)
  return Plan(
    leaves, known, {path: {k: name for k, (name, _) in layers.items()} for path, layers in held.items()}, parts
  ), problems


def _ignored(name: str, ignore: str | None) -> bool:
  return bool(_BUFFERS.fullmatch(name) or (ignore and re.fullmatch(ignore, name)))


def _is_copy(name: str | None, placed: Sequence[str], source: Source, many: int) -> bool:
  """Whether a tensor without a leaf equals one that has a leaf: a head that is saved beside its embedding."""
  if name is None or name not in source.tensors or many > _MOST_TIED:
    return False
  shape = source.tensors[name].shape
  alike = [
    other for other in placed if other in source.tensors and len(shape) > 1 and source.tensors[other].shape == shape
  ]
  return any(np.array_equal(source.tensors[name].read(), source.tensors[other].read()) for other in alike[:3])


def _tied_heads(
  source: Source, leaves: Mapping[str, Any], held: Mapping[str, Any], names: Names, whole: Arrays
) -> dict[str, Any]:
  """The heads of a tree that are its embedding in the model's files."""
  found: dict[str, Any] = {}
  if not source.tied:
    return found
  modules = [name.rpartition(".")[0] for name in source.tensors]
  tables = [
    layers[()][0].removesuffix(".weight")
    for layers in held.values()
    if () in layers and layers[()][0].endswith(".weight")
  ]
  for path in leaves.keys() - held.keys():
    try:
      target = given_target(path, names) or default_target(path, 0)
    except PeftError:
      continue
    for table in filter(is_embedding, tables):
      if target.parameter == "weight" and head_name(table, [*modules, target.module]) == target.module:
        found[path] = {(): (f"{table}.weight", whole[f"{table}.weight"])}
  return found


def _missing(leaves: Mapping[str, Any], held: Mapping[str, Mapping[Index, Any]]) -> Iterator[str]:
  """The leaves, and layers of stacks, that no tensor of the model makes; counters and keys stay what they are."""
  for path, leaf in leaves.items():
    kept = not isinstance(leaf, jax.ShapeDtypeStruct) and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    if path not in held and not kept:
      yield f"{path}: no tensor of the model is called so. Say which by names="


def _misfits(
  path: str, shape: tuple[int, ...], layers: Mapping[Index, tuple[str, np.ndarray]], known: KnownRoles
) -> Iterator[str]:
  """What is wrong with the sizes of a leaf's tensors, and which layers have none."""
  axes = known.stacked_axes(path, len(next(iter(layers))))
  stack, layer = [shape[d] for d in axes], [size for d, size in enumerate(shape) if d not in axes]
  lacking = [index for index in np.ndindex(*stack) if index not in layers]
  if lacking:
    yield f"{path}: has layers {stack}, and the model has no tensors for {listed([str(index) for index in lacking])}"
  for index, (name, stub) in layers.items():
    try:
      if any(k >= size for k, size in zip(index, stack, strict=True)):
        raise ValueError(f"{name} is layer {index}, but the leaf's shape {shape} has {tuple(stack)} of them")
      layer_from_torch(path, shape, layer, name, stub, known)
    except ValueError as error:
      yield f"{path}: {error}"
