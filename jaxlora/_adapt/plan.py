"""The plan of an adaptation: which leaves, with which roles and fields; every check, before the first array is made."""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import Any

import jax.numpy as jnp

from jaxlora._adapt.config import LeafPlan, LoraConfig, leaf_plan
from jaxlora._adapt.from_floats import checked_floats
from jaxlora._adapt.initializers import INITIALIZERS, gives_both
from jaxlora._adapt.layouts import Layouts
from jaxlora._adapt.probe import study
from jaxlora._adapt.targets import select
from jaxlora._adapt.tokens import tables_of
from jaxlora._base.checks import is_foreign
from jaxlora._base.dtypes import holds_factors
from jaxlora._base.paths import flatten, opened
from jaxlora._base.patterns import first_match
from jaxlora._base.text import listed
from jaxlora._quant.array import check_quantized
from jaxlora._weight.roles import fan
from jaxlora._weight.variant import variant_named
from jaxlora._weight.weight import is_adapted, is_leaf_node


@dataclasses.dataclass(frozen=True)
class Plan:
  """What `adapt` does with every leaf of a tree.

  Attributes:
    leaves: all leaves by path, in order.
    treedef: their nesting.
    adapted: path -> roles and fields of those that get factors.
    whole: paths of those that train whole.
    unsure: paths of adapted leaves whose roles no certain evidence tells.
    floats: path -> what a base of codes was made of, for those that start from it.
    tables: path -> roles and tokens of those of which rows train.
  """

  leaves: dict[str, Any]
  treedef: Any
  adapted: dict[str, tuple[str, LeafPlan]]
  whole: set[str]
  unsure: set[str]
  floats: dict[str, Any]
  tables: dict[str, tuple[str, tuple[int, ...]]]


def plan_tree(params: Any, config: LoraConfig, probe: Callable[[Any], Any] | None = None, floats: Any = None) -> Plan:
  """The plan of a tree, checked; see `adapt` for the arguments and the errors."""
  if not isinstance(config, LoraConfig):
    raise TypeError(f"adapt: config is {config!r}, expected a jaxlora.LoraConfig.")
  params = opened(params)
  nodes, treedef = flatten(params, is_leaf=is_leaf_node)
  if not nodes:
    raise ValueError("adapt: the tree has no leaves; pass the model's parameters.")
  leaves = dict(nodes)
  for path, leaf in leaves.items():
    check_quantized(leaf, f"adapt: {path}")
    if is_adapted(leaf):
      raise ValueError(f"adapt: {path} is adapted already. Merge first (jaxlora.merge), or adapt the original tree.")
  given = {path: roles for path in leaves if (roles := first_match(config.axes, path)) is not None}
  seen = None if probe is None else dict(zip(leaves, study(probe, params), strict=True))
  layouts = Layouts.of_tree(params, leaves, given, seen)
  tables = tables_of(config.tokens, leaves, layouts)
  targets, whole = select(config, leaves, layouts, tables)
  adapted, unsure, untold = {}, set(), []
  for path, leaf in leaves.items():
    if path in targets and (found := _roles(path, leaf, layouts)) is not None:
      adapted[path] = found[0], leaf_plan(config, path)
      unsure |= set() if found[1] else {path}
    elif path in targets:
      untold.append(path)
  if untold:
    raise _untold_roles(untold, leaves, layouts)
  for path, leaf in leaves.items():
    if path in adapted:
      _check_plan(path, leaf, *adapted[path])
    elif path in whole:
      _check_trainable(path, leaf)
  return Plan(leaves, treedef, adapted, whole, unsure, _floats(leaves, adapted, floats), tables)


def _floats(leaves: dict[str, Any], adapted: dict[str, tuple[str, LeafPlan]], floats: Any) -> dict[str, Any]:
  """What the bases of codes were made of, by path, for those that start from it."""
  given = None if floats is None else dict(flatten(floats, is_leaf=is_leaf_node)[0])
  all_found = {path: checked_floats(path, leaves[path], plan, given) for path, (_, plan) in adapted.items()}
  found = {path: leaf for path, leaf in all_found.items() if leaf is not None}
  if floats is not None and not found:
    raise ValueError(
      "adapt: floats is given, and no leaf starts from it: expected a base of codes (jaxlora.quantize) with init"
      " 'residual', 'loftq', 'pissa' or 'olora' in the config. Name one of them, or leave floats out."
    )
  return found


def _check_trainable(path: str, leaf: Any) -> None:
  if is_foreign(leaf):
    raise ValueError(
      f"{path}: found a {type(leaf).__name__}, expected an array of JAX or NumPy: JAX cannot trace it. Convert it"
      " (jax.numpy.asarray), or, where it stands for an array that it makes when needed, register its type as a pytree"
      " node with shape, dtype and dequantize(), as those of quantised bases are."
    )
  dtype = getattr(leaf, "dtype", type(leaf).__name__)
  if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(
      f"{path}: dtype {dtype} cannot be trained; expected a floating dtype. Narrow LoraConfig.targets or .train,"
      " or exclude the leaf."
    )


def _roles(path: str, leaf: Any, layouts: Layouts) -> tuple[str, bool] | None:
  """The roles of a leaf, and whether they are certain; `None` where nothing tells them."""
  _check_trainable(path, leaf)
  shape = tuple(leaf.shape)
  if len(shape) < 2:
    raise ValueError(
      f"{path}: shape {shape} has fewer than two axes; a low-rank update lies between an input and an output axis."
      " Train it whole (LoraConfig.train), or exclude it."
    )
  if 0 in shape:
    raise ValueError(f"{path}: shape {shape} holds nothing to adapt; exclude the leaf.")
  given = layouts.given.get(path, "")
  if given and len(given) != len(shape):
    raise ValueError(
      f"LoraConfig.axes: {given!r} has {len(given)} letters for {path}, whose shape {shape} has {len(shape)} axes;"
      " expected one letter per axis."
    )
  if (clue := layouts.clue(path, len(shape))) is not None:
    return clue.roles, clue.proven
  seen = None if layouts.seen is None else layouts.seen[path]
  return ("io", False) if len(shape) == 2 and (seen is None or not seen.is_something_else) else None


def _untold_roles(paths: Sequence[str], leaves: dict[str, Any], layouts: Layouts) -> ValueError:
  """The error for leaves whose roles nothing tells: all of them."""
  path, *others = paths
  shape = tuple(leaves[path].shape)
  more = [f"{other} {tuple(leaves[other].shape)}" for other in others]
  also = f"; nor those of {listed(more, 12)}" if more else ""
  each = "Say them" if not others else "Say them, with an entry for each or a pattern for several"
  remedy = f"{each}: LoraConfig(axes={{{re.escape(path)!r}: 'one of i, o, s per axis'}})"
  if layouts.seen is None:
    return ValueError(
      f"{path}: shape {shape} has {len(shape)} axes, and nothing tells which are contracted{also}. {remedy}, or pass"
      " probe=lambda p: model.apply({'params': p}, x) to adapt, which learns them from one abstract trace."
    )
  seen = layouts.seen[path]
  how = (
    f"the probe uses it in {', '.join(sorted(set(seen.used)))}" if seen.used else "the probe does not multiply by it"
  )
  return ValueError(
    f"{path}: shape {shape}: no product tells which axes are contracted: {how}{also}. {remedy}, train it whole"
    " (LoraConfig.train), or exclude it."
  )


def _check_plan(path: str, leaf: Any, roles: str, plan: LeafPlan) -> None:
  dtype = plan.dtype or leaf.dtype
  if not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ValueError(
      f"{path}: dtype {leaf.dtype} cannot be adapted; expected a real floating dtype. Exclude the leaf, or train it"
      " whole (LoraConfig.train)."
    )
  if not holds_factors(dtype):
    raise ValueError(
      f"{path}: dtype {dtype} holds no factors; expected a real floating dtype of at least 8 bits. Give the factors one"
      " of their own (LoraConfig(dtype='bfloat16'), or in overrides), or exclude the leaf."
    )
  if gives_both(plan.init) and not variant_named(plan.variant).plain:
    raise ValueError(
      f"{path}: init {plan.init!r} gives both factors of a product, which the variant {plan.variant!r} does not have;"
      f" expected one of the inits {', '.join(map(repr, INITIALIZERS))} for it."
    )
  if plan.zero == "a":
    _check_zero_a(path, plan)
  if plan.init == "orthogonal" and plan.rank % 2:
    raise ValueError(f"{path}: init 'orthogonal' halves the rank, found {plan.rank}; expected an even one.")
  fan_in, fan_out = fan(leaf.shape, roles, "i"), fan(leaf.shape, roles, "o")
  if plan.rank > min(fan_in, fan_out):
    raise ValueError(
      f"{path}: rank {plan.rank} is larger than the smaller side of the weight: shape {tuple(leaf.shape)} with roles"
      f" {roles!r} has fan-in {fan_in} and fan-out {fan_out}. Use a rank of at most {min(fan_in, fan_out)} for it"
      f" (LoraConfig(overrides={{{re.escape(path)!r}: {{'rank': {min(fan_in, fan_out)}}}}})), or exclude it."
    )


def _check_zero_a(path: str, plan: LeafPlan) -> None:
  """Raises where A cannot start at zero, with B drawn."""
  variant = variant_named(plan.variant)
  why = (
    f"init {plan.init!r} makes both factors"
    if gives_both(plan.init)
    else f"the variant {plan.variant!r} starts otherwise than with a product of A and B"
    if not variant.plain
    else f"the variant {plan.variant!r} never trains A: its update would stay zero"
    if not {"a", "b"} <= variant.trains.keys()
    else None
  )
  if why is not None:
    raise ValueError(
      f"{path}: zero='a' wants A zero and B drawn, and {why}. Leave it at zero='b'"
      f" (LoraConfig(overrides={{{re.escape(path)!r}: {{'zero': 'b'}}}}))."
    )
