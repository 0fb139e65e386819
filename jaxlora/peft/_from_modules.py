"""From torch's modules to a tree."""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten
from jaxlora._weight.dora import squared_norms
from jaxlora._weight.flax import register_with_flax
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted
from jaxlora.peft._layout import factors_from_torch, kind_of, torch_shapes, whole_from_torch
from jaxlora.peft._names import Names, check_names, ends_with, key_of
from jaxlora.peft._places import Place, find_places
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter, Module
from jaxlora.peft._roles import Axes, Roles, known_roles, own_roles, roles_by_sizes, shape_of_leaf
from jaxlora.peft._to_modules import raise_problems


def load(
  folder: Any,
  params: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  probe: Callable[[Any], Any] | None = None,
) -> Any:
  """Reads a folder that PEFT wrote, and puts its adapter on `params`.

      a = lora_A.weight as (rank, *in),    b = lora_B.weightᵀ as (rank, *out)

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    params: the base, as `adapt` takes it; arrays or `jax.ShapeDtypeStruct`s.
    names: as in `save`.
    axes: regex -> roles, one letter per axis, for leaves where shapes do not tell: a square matrix is taken for (in,
      out), as Flax stores it, unless this or the probe says otherwise.
    probe: a function of `params` alone, as in `adapt`: traced, never run, to learn the roles.

  Returns:
    A tree of the same nesting with `LoraWeight`s, and `FullWeight`s for `modules_to_save` and trained biases. Factors
    keep the file's dtype. In a stack of layers of which only some are adapted the others have zero factors.

  Raises:
    PeftError: listing everything that does not fit: tensors without a leaf or with several, halves, shapes, ranks, NaN,
      options that make it another method than LoRA. Whatever the files hold, no other error comes of it.

  Example: see `save`.

  Source: the format is that of `peft` 0.21, `peft/utils/save_and_load.py` and `peft/tuners/lora/`.
  """
  nodes, treedef = flatten(params, is_leaf=is_adapted)
  leaves = dict(nodes)
  for path, leaf in leaves.items():
    if is_adapted(leaf):
      raise ValueError(f"load: {path} is adapted already. Load onto plain parameters (jaxlora.strip, jaxlora.merge).")
  check_names(names, leaves)
  register_with_flax()
  adapter = read(folder)
  roles = known_roles(leaves, params, axes, probe)
  new, problems = _place_all(adapter, leaves, names, roles)
  raise_problems(f"load: {folder}", [*adapter.unsupported, *problems])
  return jax.tree_util.tree_unflatten(treedef, [new.get(path, leaf) for path, leaf in leaves.items()])


def _place_all(
  adapter: Adapter, leaves: Mapping[str, Any], names: Names, roles: Roles
) -> tuple[dict[str, Any], list[str]]:
  """The new leaves by path, and everything that does not fit."""
  tensors = {key_of(name): tensor for name, tensor in {**adapter.bases, **adapter.whole}.items()}
  wanted = [*((name, "weight") for name in adapter.modules), *tensors]
  places, missing = find_places(dict.fromkeys(wanted), leaves, names)
  factored: dict[str, dict[tuple[int, ...], Module]] = {}
  whole: dict[str, dict[tuple[int, ...], tuple[str, np.ndarray]]] = {}
  problems = []
  for key, problem in missing.items():
    if len(missing) > _MOST_TIED or not _is_tied(tensors.get(key), key, places, tensors):
      problems.append(problem)
  for name, module in adapter.modules.items():
    if place := places.get((name, "weight")):
      factored.setdefault(place.path, {})[place.index] = module
  for name, tensor in adapter.whole.items():
    if place := places.get(key_of(name)):
      whole.setdefault(place.path, {})[place.index] = (name, tensor)
  new: dict[str, Any] = {}
  for path in factored:
    try:
      if path in whole:
        raise ValueError("adapted, and saved whole, too")
      new[path] = _factored(path, leaves[path], factored[path], roles, adapter.dropout)
    except ValueError as error:
      problems.append(f"{path} ({next(iter(factored[path].values())).name}): {error}")
  for path in whole.keys() - factored.keys():
    name = next(iter(whole[path].values()))[0]
    try:
      value = _trained(path, leaves[path], whole[path], roles)
      if not _is_untouched(adapter, name, leaves[path], value):
        new[path] = FullWeight(base=leaves[path], value=value)
    except ValueError as error:
      problems.append(f"{path} ({name}): {error}")
  if names is None:  # else the tree is not called as torch's model is, and no name's end tells
    problems += _left_out(adapter, leaves, new, factored)
  for name, tensor in adapter.bases.items():
    if place := places.get(key_of(name)):
      problems += _other_base(place, leaves[place.path], name, tensor, roles)
  return new, problems


def _left_out(
  adapter: Adapter, leaves: Mapping[str, Any], new: Mapping[str, Any], layers: Mapping[str, Mapping[Any, Module]]
) -> list[str]:
  """Weights that `target_modules` names, and the file has nothing for: PEFT would start them anew, with a warning."""
  config = adapter.config
  targets = config.get("target_modules")
  if not isinstance(targets, list) or config.get("layers_to_transform") is not None or config.get("exclude_modules"):
    return []
  missing = []
  for path, leaf in leaves.items():
    ending = next((t for t in targets if isinstance(t, str) and ends_with(path, t)), None)
    if ending is None or len(shape_of_leaf(leaf)) < 2:
      continue
    node = new.get(path)
    if node is None and path not in layers:
      missing.append(f"{path}: target_modules names {ending!r}, but the file holds no factors for it")
    elif isinstance(node, LoraWeight):
      stack = math.prod(node.a.shape[: node.roles.count("s")])
      if len(layers[path]) < stack:
        missing.append(
          f"{path}: target_modules names {ending!r}, but the file holds {len(layers[path])} of {stack} layers"
        )
  return missing


_MOST_TIED = 20  # a model has one or two ends that are tied


def _is_tied(tensor: Any, key: tuple[str, str], places: Mapping[Any, Place], tensors: Mapping[Any, np.ndarray]) -> bool:
  """Whether a tensor without a leaf is another one's copy: PEFT saves both ends of tied embeddings."""
  if tensor is None:
    return False
  others = (other for name, other in tensors.items() if name != key and name in places)
  return any(other.shape == tensor.shape and np.array_equal(other, tensor) for other in others)


def _is_untouched(adapter: Adapter, name: str, leaf: Any, value: Any) -> bool:
  """Whether a tensor is the base's own, which PEFT saves with adapted embeddings."""
  module, _, parameter = name.rpartition(".")
  listed = adapter.config.get("modules_to_save") or []
  if parameter == "bias" or any(module.endswith(m) or f".{m}." in f".{module}." for m in listed):
    return False
  return not isinstance(leaf, jax.ShapeDtypeStruct) and bool((jnp.asarray(leaf) == value).all())


def _other_base(place: Place, leaf: Any, name: str, tensor: np.ndarray, roles: Roles) -> list[str]:
  """What is wrong where the file holds the base of an adapted module."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return []
  try:
    if np.array_equal(np.asarray(_trained(place.path, leaf, {place.index: (name, tensor)}, roles)), np.asarray(leaf)):
      return []
    found = "other values"
  except ValueError as error:
    found = str(error)
  return [
    f"{place.path} ({name}): the file holds the base weight, and it is not this one: {found}. Load onto that base: put"
    " the file's tensor into params"
  ]


def _device_array(array: np.ndarray) -> jax.Array:
  if array.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
    array = array.astype(np.float32)
  return jnp.asarray(np.ascontiguousarray(array))


def _factored(
  path: str, leaf: Any, layers: Mapping[tuple[int, ...], Module], roles: Roles, dropout: float
) -> LoraWeight:
  """One adapted leaf, of one module or of all layers of a stack.

  Raises:
    ValueError: if they do not fit.
  """
  shape, (first, *_) = shape_of_leaf(leaf), layers.values()
  if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
    raise ValueError(f"dtype {leaf.dtype} cannot be adapted; expected a real floating dtype")
  if path in roles.tied and first.kind == "embedding":
    raise ValueError(
      "PEFT adapts the look-up alone, and this leaf is the head's weight, too. Give the tree a head of its own"
    )
  stacked = len(next(iter(layers)))
  full = _roles_of_factored(path, shape, first, stacked, roles)
  own = full.replace("s", "")
  stack = tuple(size for size, role in zip(shape, full, strict=True) if role == "s")
  sizes = [size for size, role in zip(shape, full, strict=True) if role != "s"]
  rank = max(module.rank for module in layers.values())
  scale, one = first.scale, len(layers) == 1 and not stacked
  pieces = {}
  for index, module in layers.items():
    expected = torch_shapes(sizes, own, module.kind, module.rank)
    if any(k >= size for k, size in zip(index, stack, strict=True)):
      raise ValueError(f"{module.name} is layer {index}, but the leaf's shape {shape} has {stack} of them")
    if (module.a.shape, module.b.shape) != expected or module.kind != first.kind:
      raise ValueError(
        f"{module.name} has lora_A {module.a.shape} and lora_B {module.b.shape}; expected {expected[0]} and"
        f" {expected[1]} for a leaf of shape {shape} with roles {full!r}"
      )
    pieces[index] = factors_from_torch(module, sizes, own)
  if one:
    a, b = pieces[()]
  else:  # one rank and one scale for the stack: smaller ranks are filled up with zeros, scales go into b
    a, b = (
      np.zeros((*stack, rank, *piece.shape[1:]), np.result_type(*(p[k].dtype for p in pieces.values())))
      for k, piece in enumerate(pieces[next(iter(pieces))])
    )
    for index, module in layers.items():
      factor = module.scale / scale
      a[index][: module.rank] = pieces[index][0]
      b[index][: module.rank] = pieces[index][1] if factor == 1 else pieces[index][1] * b.dtype.type(factor)
  alpha = first.alpha if first.rank == rank else _alpha_for(scale, rank, first.scaling)
  dora = first.magnitude is not None
  return LoraWeight(
    base=leaf,
    variant="dora" if dora else "lora",
    extra=_magnitudes(leaf, full, layers) if dora else {},
    a=_device_array(a),
    b=_device_array(b),
    roles=full,
    rank=rank,
    alpha=alpha,
    scaling=first.scaling,
    dropout=dropout,
  )


def _magnitudes(leaf: Any, roles: str, layers: Mapping[tuple[int, ...], Module]) -> dict[str, jax.Array]:
  """DoRA's parts; layers of a stack that are not in the file keep the base's norms.

  Raises:
    ValueError: if the base's values are not known.
  """
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError("DoRA takes the norms of the base, and this one has a shape alone; load onto the base's values")
  norm = jnp.sqrt(squared_norms(jnp.asarray(leaf), roles))
  magnitude = np.array(norm)
  for index, module in layers.items():
    assert module.magnitude is not None
    magnitude[index] = module.magnitude.astype(magnitude.dtype).reshape(magnitude[index].shape)
  return {"magnitude": jnp.asarray(magnitude), "norm": norm}


def _alpha_for(scale: float, rank: int, scaling: str) -> float:
  return scale * (rank if scaling == "standard" else math.sqrt(rank))


def _roles_of_factored(path: str, shape: Sequence[int], module: Module, stacked: int, roles: Roles) -> str:
  said = roles.said.get(path)
  if said is not None:
    if said.count("s") != stacked:
      raise ValueError(f"roles {said!r}, but its name in the file has {stacked} indices of stacked layers")
    return said
  own = shape[stacked:]
  if len(own) < 2:
    raise ValueError(f"shape {tuple(shape)} has fewer than two axes beside {stacked} stacked ones")
  if module.kind == "embedding":
    found = "io"
  elif module.kind == "conv":
    last = "i" * (len(own) - 1) + "o"
    first = "o" + "i" * (len(own) - 1)
    fits = len(own) == module.a.ndim and torch_shapes(own, last, "conv", module.rank)[0] != module.a.shape
    found = first if fits and torch_shapes(own, first, "conv", module.rank)[0] == module.a.shape else last
  else:
    found = roles_by_sizes(path, own, module.a.shape[1], module.b.shape[0], roles)
  if len(found) != len(own):
    raise ValueError(f"shape {tuple(shape)}, but the adapter is one of {module.kind}: {module.a.shape}")
  return "s" * stacked + found


def _trained(path: str, leaf: Any, layers: Mapping[tuple[int, ...], tuple[str, np.ndarray]], roles: Roles) -> jax.Array:
  """The value of a leaf trained whole; layers of a stack that are not in the file keep the base's.

  Raises:
    ValueError: if a tensor does not fit.
  """
  shape, stacked = shape_of_leaf(leaf), len(next(iter(layers)))
  abstract = isinstance(leaf, jax.ShapeDtypeStruct)
  value = np.zeros(shape, leaf.dtype) if abstract or not stacked else np.array(leaf)
  for index, (name, tensor) in layers.items():
    own = shape[stacked:]
    if any(k >= size for k, size in zip(index, shape[:stacked], strict=True)):
      raise ValueError(f"{name} is layer {index}, but the leaf's shape {shape} has {shape[:stacked]} of them")
    if name.endswith(".bias"):
      found = tensor.reshape(own) if tensor.ndim == 1 and tensor.size == math.prod(own) else None
    else:
      letters = own_roles(path, own, stacked, roles)
      found = whole_from_torch(
        tensor, own, letters, kind_of(path, name.rpartition(".")[0], letters), name.rpartition(".")[0]
      )
    if found is None:
      raise ValueError(f"{name} has shape {tensor.shape}, which does not fit a leaf of shape {shape}")
    value[index] = found.astype(leaf.dtype)
  return _device_array(value)
