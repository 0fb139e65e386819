"""From torch's modules to a tree. No files here."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import math
from typing import Any
import warnings

import jax
import numpy as np

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.paths import flatten, opened
from jaxlora._base.rounding import RoundingWarning, lost_share, notable, same_but_for_rounding
from jaxlora._weight.partitioned import with_own_names
from jaxlora._weight.weight import FullWeight, is_adapted, is_leaf_node
from jaxlora.peft._conv1d import told_by_adapter, told_by_model
from jaxlora.peft._for_leaves import named_for_leaves, targets_of_parts
from jaxlora.peft._layers import with_layers
from jaxlora.peft._left_out import left_out, problems_of, warn_of
from jaxlora.peft._names import Key, Names, check_names, key_of, module_of, split_path
from jaxlora.peft._nodes import Index, lora_weight, whole_value
from jaxlora.peft._oriented import oriented
from jaxlora.peft._places import Place, find_places
from jaxlora.peft._records import RESIZE, Adapter, Module, fail, is_resized
from jaxlora.peft._roles import Axes, KnownRoles, known_roles, shape_of_leaf
from jaxlora.peft._tied_leaves import one_leaf_for_both_uses
from jaxlora.peft._tokens import leaves_with_rows


def from_modules(
  adapter: Adapter,
  params: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  probe: Callable[[Any], Any] | None = None,
  strict: bool = True,
) -> Any:
  """Puts an adapter in torch's modules on a tree of parameters. Touches no file, and needs no safetensors.

      a = A as (rank, *in),    b = Bᵀ as (rank, *out),    W' = base + scale * sum_r a[r, in] b[r, out]

  `from_modules(to_modules(tree), params)` is the tree again, and `load` is this of what a folder holds. In a stack of
  layers of which only some are adapted the others have zero factors.

  Args:
    adapter: what `to_modules` returned, or an `Adapter` of one's own making. Its arrays are copied.
    params: the base, as `adapt` takes it; arrays or `jax.ShapeDtypeStruct`s.
    names: regex over paths -> torch module's name, as for `save`.
    axes: regex -> roles, one letter per axis, where the tree does not tell: `"s"` for the axis of stacked layers, as in
      `"os"` for a norm's (features, layers).
    probe: a function of `params` alone, as in `adapt`: traced, never run, to learn the roles.
    strict: whether layers without factors are an error where others of their kind have them; else a warning.

  Returns:
    A tree of the same nesting with `LoraWeight`s for the modules, in the modules' dtypes, and `FullWeight`s for
    parameters trained whole, in the base's dtypes.

  Raises:
    PeftError: listing everything that does not fit: modules without a leaf or with several, shapes, options that make
      it another method than LoRA.
    ValueError: if a leaf of `params` is adapted already.

  Example:
    >>> import jax.numpy as jnp, numpy as np, jaxlora, jaxlora.peft
    >>> a, b = np.ones((2, 16), np.float32), np.ones((8, 2), np.float32)
    >>> module = jaxlora.peft.Module("model.layers.0.q_proj", "linear", a, b, alpha=4.0)
    >>> adapter = jaxlora.peft.Adapter({module.name: module}, whole={}, bases={}, config={})
    >>> jaxlora.peft.from_modules(adapter, {"layers_0": {"q_proj": {"kernel": jnp.ones((16, 8))}}})
    {'layers_0': {'q_proj': {'kernel': LoraWeight(16x8 io, rank 2, f32, scale 2)}}}

  Source: the format is that of `peft` 0.21, `peft/utils/save_and_load.py` and `peft/tuners/lora/`.
  """
  check_base(params, names, "from_modules")
  return tree_of_adapter(adapter, params, names, axes, probe, "from_modules", strict=strict)


def check_base(params: Any, names: Names, subject: str) -> None:
  """Raises unless `params` are plain parameters that `names` fits."""
  leaves = dict(flatten(opened(params), is_leaf=is_leaf_node)[0])
  for path, leaf in leaves.items():
    if is_adapted(leaf):
      raise ValueError(
        f"{subject}: {path} is adapted already. Load onto plain parameters (jaxlora.strip, jaxlora.merge)."
      )
  check_names(names, leaves)


def tree_of_adapter(
  adapter: Adapter,
  params: Any,
  names: Names,
  axes: Axes,
  probe: Callable[[Any], Any] | None,
  subject: str,
  *,
  strict: bool = True,
) -> Any:
  """`from_modules` of checked parameters, for a caller whose name its errors begin with."""
  nodes, treedef = flatten(params, is_leaf=is_leaf_node)
  leaves = dict(nodes)
  known = with_conv1d(known_roles(leaves, params, axes, probe), adapter, leaves)
  problems: list[str] = []
  parts = targets_of_parts(leaves, names, known)
  adapter = named_for_leaves(adapter, leaves, parts, known, problems)
  tensors = {key_of(name): tensor for name, tensor in {**adapter.bases, **adapter.whole}.items()}
  keys = dict.fromkeys([*((name, "weight") for name in adapter.modules), *tensors, *map(key_of, adapter.tokens)])
  places, missing = find_places(keys, leaves, names, parts)
  adapter = one_leaf_for_both_uses(adapter, leaves, places, known, probe is not None, problems)
  adapter = oriented(adapter, places, leaves, known, problems)
  rest = (*adapter.bases, *adapter.whole, *adapter.tokens)
  left = {(name, "weight"): f"{name}.weight" for name in adapter.modules} | {key_of(name): name for name in rest}
  missing = {key: text.replace(".".join(key), left[key], 1) for key, text in missing.items() if key in left}
  problems += _unplaced(missing, places, tensors)
  modules: dict[str, dict[Index, Module]] = {}  # by path
  for name, module in adapter.modules.items():
    if place := places.get((name, "weight")):
      modules.setdefault(place.path, {})[place.index] = module
  whole = by_leaf({**adapter.bases, **adapter.whole}, places)
  known, untold = with_layers(known, leaves, modules, whole, names)
  problems += untold.values()
  known_places = {key: place for key, place in places.items() if place.path not in untold}
  new = _adapted_leaves(adapter, leaves, known_places, modules, known, problems)
  new |= leaves_with_rows(adapter, leaves, known_places, new, known, problems)
  # With names the tree is not called as torch's model is, and ends of names tell nothing.
  without_factors = left_out(adapter, leaves, new, modules) if names is None else []
  problems += problems_of(without_factors, strict=strict)
  for name, tensor in adapter.bases.items():
    if place := known_places.get(key_of(name)):
      problems += _differing_base(place, leaves[place.path], name, tensor, known)
  if problems or adapter.unsupported:
    raise fail(subject, [*adapter.unsupported, *problems], _PARTS if missing else "")
  warn_of(without_factors)
  return with_own_names(jax.tree_util.tree_unflatten(treedef, [new.get(path, leaf) for path, leaf in leaves.items()]))


def by_leaf(
  tensors: Mapping[str, np.ndarray], places: Mapping[Key, Place]
) -> dict[str, dict[Index, tuple[str, np.ndarray]]]:
  """The names and tensors of parameters that have a leaf, by its path and the index along its stacked axes."""
  found: dict[str, dict[Index, tuple[str, np.ndarray]]] = {}
  for name, tensor in tensors.items():
    if place := places.get(key_of(name)):
      found.setdefault(place.path, {})[place.index] = (name, tensor)
  return found


def with_conv1d(known: KnownRoles, adapter: Adapter, leaves: Mapping[str, Any]) -> KnownRoles:
  """What is known, with whether torch's modules of GPT-2's names are its Conv1D, by the adapter or else by the tree."""
  told = told_by_adapter(adapter)
  if told is None:
    weights = {module_of(path): leaf for path, leaf in leaves.items() if split_path(path)[1] == "weight"}
    told = told_by_model({name: math.prod(shape_of_leaf(leaf)) for name, leaf in weights.items()})
  return dataclasses.replace(known, conv1d=told)


def _adapted_leaves(
  adapter: Adapter,
  leaves: Mapping[str, Any],
  places: Mapping[Key, Place],
  modules: Mapping[str, Mapping[Index, Module]],
  known: KnownRoles,
  problems: list[str],
) -> dict[str, Any]:
  """The new leaves by path; modules and tensors that do not fit theirs are added to `problems`."""
  whole = by_leaf(adapter.whole, places)
  new: dict[str, Any] = {}
  lost: dict[str, float] = {}
  for path, layers in modules.items():
    if (next(iter(layers.values())).name, "weight") not in places:
      continue
    try:
      if path in whole:
        raise ValueError("adapted, and saved whole, too")
      new[path] = lora_weight(path, leaves[path], layers, known, adapter.dropout)
    except ValueError as error:
      module = next(iter(layers.values()))
      more = is_resized(module.name, shape_of_leaf(leaves[path]), module.shape)
      problems.append(f"{path} ({module.name}): {error}{f'. {RESIZE}' if more else ''}")
  for path in [path for path in whole if path not in modules]:
    name = next(iter(whole[path].values()))[0]
    try:
      value = whole_value(path, leaves[path], whole[path], known)
      if not _is_copy_of_base(adapter, name, whole[path], leaves[path], value):
        new[path] = FullWeight(base=leaves[path], value=value)
        lost[path] = _lost_of_whole(path, leaves[path], whole[path], value, known)
    except ValueError as error:
      problems.append(f"{path} ({name}): {error}")
  if found := notable(lost):
    warnings.warn(
      f"rounding to the base's dtype loses more than a tenth of what was trained in {found}. Load onto parameters in"
      " float32 to keep it.",
      RoundingWarning,
      stacklevel=4,
    )
  return new


def _lost_of_whole(
  path: str, leaf: Any, tensors: Mapping[Index, tuple[str, np.ndarray]], value: Any, known: KnownRoles
) -> float:
  """The share of what was trained that a leaf's dtype rounds away of the tensors that replace it."""
  narrow = any(wider_dtype(tensor.dtype, leaf.dtype) != leaf.dtype for _, tensor in tensors.values())
  if not narrow or isinstance(leaf, jax.ShapeDtypeStruct):
    return 0.0
  base = np.asarray(leaf)
  return lost_share(base, np.asarray(whole_value(path, base.astype(np.float32), tensors, known)), np.asarray(value))


_PARTS = (
  "Where one leaf holds several of these modules, or several leaves are one of them, names= takes jaxlora.peft.Split"
  " and jaxlora.peft.Joined."
)

_MOST_TIED = 20  # a model has one or two pairs of tied weights


def _unplaced(missing: Mapping[Key, str], places: Mapping[Key, Place], tensors: Mapping[Key, np.ndarray]) -> list[str]:
  """The problems of parameters without a leaf. One that equals another's is none: PEFT saves tied weights twice."""

  def is_tied(key: Key) -> bool:
    tensor = tensors.get(key)
    if tensor is None:
      return False
    others = (other for name, other in tensors.items() if name != key and name in places)
    return any(other.shape == tensor.shape and np.array_equal(other, tensor) for other in others)

  return [problem for key, problem in missing.items() if len(missing) > _MOST_TIED or not is_tied(key)]


def _is_copy_of_base(
  adapter: Adapter, name: str, tensors: Mapping[Index, tuple[str, np.ndarray]], leaf: Any, value: Any
) -> bool:
  """Whether a tensor that nobody asked to save is the base's own: PEFT saves embeddings beside adapted ones."""
  if adapter.is_asked(name) or isinstance(leaf, jax.ShapeDtypeStruct):
    return False
  return _is_same(value, leaf, [tensor.dtype for _, tensor in tensors.values()])


def _is_same(value: Any, leaf: Any, dtypes: Sequence[np.dtype]) -> bool:
  """Whether a value that the file holds in some dtype is the leaf's, but for the rounding of the two dtypes."""
  narrow = min(dtypes, key=lambda dtype: dtype.itemsize)
  return same_but_for_rounding(np.asarray(value).astype(narrow), np.asarray(leaf))


def _differing_base(place: Place, leaf: Any, name: str, tensor: np.ndarray, known: KnownRoles) -> list[str]:
  """The problem where the file holds the base of an adapted module, and it is not this one."""
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return []
  try:
    value = whole_value(place.path, leaf, {place.index: (name, tensor)}, known)
    if _is_same(value, leaf, [tensor.dtype]):
      return []
    found = "other values"
  except ValueError as error:
    found = str(error)
  return [
    f"{place.path} ({name}): the file holds the base weight, and it is not this one: {found}. Load onto that base: put"
    " the file's tensor into params"
  ]
