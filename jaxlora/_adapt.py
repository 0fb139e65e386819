"""From parameters to a combined tree and back: `adapt`, `split`, `join`, `merge`, `strip`."""

from collections.abc import Callable
import dataclasses
import functools
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora import _paths, _probe
from jaxlora._config import LeafPlan, LoraConfig, first_match, holds_factors, leaf_plan
from jaxlora._initializers import INITIALIZERS, from_weight, kaiming, leaf_key
from jaxlora._matrix import matrices, wide
from jaxlora._serialization import register_with_flax
from jaxlora._targets import EvidenceByPath, listed, select
from jaxlora._transform import typed_key
from jaxlora._variants import VARIANTS, Start, fan
from jaxlora._weight import (
  FullWeight,
  LoraWeight,
  check_parts,
  check_weight,
  is_adapted,
  parts,
  trained_parts,
  with_parts,
)


def adapt(params: Any, config: LoraConfig, key: jax.Array, *, probe: Callable[[Any], Any] | None = None) -> Any:
  """Puts a `LoraWeight` in the place of every targeted leaf; the function of the tree stays what it was, bit for bit.

      W -> (W, A, B),   A as `config.init` says,  B = 0

  With an init that gives both factors it stays so to rounding: the weight stands for `W + scale (A B - A0 B0)`.

  Every leaf has a random key of its own, made from its path: other targets change nothing in it. The roles of a
  weight's axes come from `config.axes`, then from the probe, and are `"io"` for a matrix that neither tells of.

  Args:
    params: any pytree of arrays: a Flax parameter dict, `flax.nnx` state, lists, dataclasses.
    config: what to adapt, and how.
    key: a random key, typed or raw uint32.
    probe: a function of `params` alone, such as `lambda p: model.apply({"params": p}, x)`. It is traced abstractly and
      never run, to learn which axes of each weight are contracted. Needed for kernels of more than two axes, unless
      `config.axes` has their roles.

  Returns:
    A tree of the same nesting with `LoraWeight` and, for `config.train`, `FullWeight` nodes.

  Raises:
    ValueError: naming the leaf or the field, what was found, what was expected and what to do: an empty or already
      adapted tree, a pattern without a match, a leaf that cannot be adapted, a rank too large.
    TypeError: if `key` is no random key.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"dense": {"kernel": jnp.ones((16, 8))}}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> tree["dense"]["kernel"].a.shape, tree["dense"]["kernel"].b.shape
    ((2, 16), (2, 8))

  Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", arXiv:2106.09685, section 4.1.
  """
  if not isinstance(config, LoraConfig):
    raise TypeError(f"adapt: config is {config!r}, expected a jaxlora.LoraConfig.")
  key = typed_key(key, "adapt: key")
  register_with_flax()
  nodes, treedef = _paths.flatten(params, is_leaf=is_adapted)
  if not nodes:
    raise ValueError("adapt: the tree has no leaves; pass the model's parameters.")
  leaves = dict(nodes)
  for path, leaf in leaves.items():
    if is_adapted(leaf):
      raise ValueError(f"adapt: {path} is adapted already. Merge first (jaxlora.merge), or adapt the original tree.")
  evidence = None
  if probe is not None:
    evidence = dict(zip(leaves, _probe.study(probe, params), strict=True))

  targets, whole = select(config, leaves, evidence)
  plans = {path: leaf_plan(config, path) for path in targets}
  roles = {path: _roles(path, leaves[path], config, evidence) for path in targets}
  for path in leaves:  # every check before the first array is made
    if path in targets:
      _check_plan(path, leaves[path], roles[path], plans[path])
    elif path in whole:
      _check_trainable(path, leaves[path])
  drawn: dict[Any, Any] = {}
  new = [
    _factored(leaf, roles[path], plans[path], key, drawn)
    if path in targets
    else FullWeight(base=leaf, value=jnp.array(leaf, copy=True))
    if path in whole
    else leaf
    for path, leaf in leaves.items()
  ]
  return jax.tree_util.tree_unflatten(treedef, new)


# ----------------------------------------------------------------------------------------------------------------------
# How each is adapted.


def _check_trainable(path: str, leaf: Any) -> None:
  dtype = getattr(leaf, "dtype", type(leaf).__name__)
  if not hasattr(leaf, "dtype") or not jnp.issubdtype(dtype, jnp.inexact):
    raise ValueError(
      f"{path}: dtype {dtype} cannot be trained; expected a floating dtype. Narrow LoraConfig.targets or .train,"
      " or exclude the leaf."
    )


def _roles(path: str, leaf: Any, config: LoraConfig, evidence: EvidenceByPath) -> str:
  _check_trainable(path, leaf)
  shape = tuple(leaf.shape)
  if len(shape) < 2:
    raise ValueError(
      f"{path}: shape {shape} has fewer than two axes; a low-rank update lies between an input and an output axis."
      " Train it whole (LoraConfig.train), or exclude it."
    )
  if 0 in shape:
    raise ValueError(f"{path}: shape {shape} holds nothing to adapt; exclude the leaf.")
  given = first_match(config.axes, path)
  if given is not None:
    if len(given) != len(shape):
      raise ValueError(
        f"LoraConfig.axes: {given!r} has {len(given)} letters for {path}, whose shape {shape} has {len(shape)} axes;"
        " expected one letter per axis."
      )
    return given
  seen = evidence[path] if evidence is not None else None
  found = seen.roles() if seen is not None else None
  if found is not None:
    return found
  if len(shape) == 2 and (seen is None or not (seen.stacked or (seen.used and seen.contracted is None))):
    return "io"
  remedy = f"Say them: LoraConfig(axes={{{re.escape(path)!r}: 'one of i, o, s per axis'}})"
  if seen is None:
    raise ValueError(
      f"{path}: shape {shape} has {len(shape)} axes, and nothing tells which are contracted. {remedy}, or pass"
      " probe=lambda p: model.apply({'params': p}, x) to adapt, which learns them from one abstract trace."
    )
  how = (
    f"the probe uses it in {', '.join(sorted(set(seen.used)))}" if seen.used else "the probe does not multiply by it"
  )
  raise ValueError(
    f"{path}: shape {shape}: no product tells which axes are contracted: {how}. {remedy}, train it whole"
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
  starts = from_weight(plan.init)
  if starts is not None and not is_plain(plan.variant):
    raise ValueError(
      f"{path}: init {plan.init!r} gives both factors of a product, which the variant {plan.variant!r} does not have;"
      f" expected one of the inits {', '.join(map(repr, INITIALIZERS))} for it."
    )
  if plan.init == "orthogonal" and plan.rank % 2:
    raise ValueError(f"{path}: init 'orthogonal' halves the rank, found {plan.rank}; expected an even one.")
  fan_in, fan_out = fan(leaf.shape, roles, "i"), fan(leaf.shape, roles, "o")
  if plan.rank > min(fan_in, fan_out):
    raise ValueError(
      f"{path}: rank {plan.rank} is larger than the smaller side of the weight: shape {tuple(leaf.shape)} with roles"
      f" {roles!r} has fan-in {fan_in} and fan-out {fan_out}. Use a rank of at most {min(fan_in, fan_out)} for it"
      f" (LoraConfig(overrides={{{re.escape(path)!r}: {{'rank': {min(fan_in, fan_out)}}}}})), or exclude it."
    )


def _factored(base: Any, roles: str, plan: LeafPlan, key: jax.Array, drawn: dict[Any, Any]) -> LoraWeight:
  start = Start(
    base=base,
    roles=roles,
    rank=plan.rank,
    dtype=plan.dtype or base.dtype,
    key=leaf_key(key, plan.path),
    shared=key,
    drawn=drawn,
    init=INITIALIZERS.get(plan.init, kaiming),  # where both factors are given, below, what A was is lost
  )
  held = VARIANTS[plan.variant].start(start)
  weight = LoraWeight(
    base=base,
    a=held.pop("a"),
    b=held.pop("b"),
    roles=roles,
    rank=plan.rank,
    alpha=plan.alpha,
    scaling=plan.scaling,
    dropout=plan.dropout,
    variant=plan.variant,
    extra=held,
  )
  starts = from_weight(plan.init)
  if starts is None:
    return weight
  w = matrices(base, roles).astype(wide(base))
  return started(weight, *starts.make(start.key, w, plan.rank, weight.scale), starts.cancels)


def is_plain(variant: str) -> bool:
  """Whether a variant's factors are A and B themselves."""
  return VARIANTS[variant].factors is VARIANTS["lora"].factors


def started(weight: LoraWeight, a: jax.Array, b: jax.Array, cancels: bool = False) -> LoraWeight:
  """The weight with factors, (stack, rank, in) and (stack, rank, out), whose update is taken off again.

  Where their product is zero but for rounding nothing is taken off, unless the dtype rounds to more than that.
  """
  a, b = a.reshape(weight.a.shape).astype(weight.a.dtype), b.reshape(weight.b.shape).astype(weight.b.dtype)
  weight = dataclasses.replace(weight, a=a, b=b)
  if cancels and a.dtype.itemsize >= 4:
    return weight
  start = {"a0": jnp.array(a, copy=True), "b0": jnp.array(b, copy=True)}  # training may donate the factors
  return dataclasses.replace(weight, extra={**weight.extra, **start})


# ----------------------------------------------------------------------------------------------------------------------
# Halves, and plain parameters again.


def _is_half_leaf(node: Any) -> bool:
  return node is None or is_adapted(node)


def map_adapted(lora: Callable[[Any], Any], full: Callable[[Any], Any], plain: Callable[[Any], Any], tree: Any) -> Any:
  """Maps the nodes of a combined tree by kind."""

  def one(node):
    if isinstance(node, LoraWeight):
      return lora(node)
    return full(node) if isinstance(node, FullWeight) else plain(node)

  return jax.tree_util.tree_map(one, tree, is_leaf=is_adapted)


def adapted_leaves(tree: Any) -> list[tuple[str, Any]]:
  """The adapted nodes of a tree with their paths."""
  nodes, _ = _paths.flatten(tree, is_leaf=is_adapted)
  return [(path, node) for path, node in nodes if is_adapted(node)]


def check_adapted(tree: Any, what: str) -> None:
  """Raises unless the tree has an adapted leaf, and all of them are whole."""
  leaves = adapted_leaves(tree)
  if not leaves:
    raise ValueError(f"{what}: the tree has no adapted leaf. Make one with jaxlora.adapt(params, config, key).")
  for path, node in leaves:
    check_parts(node, f"{what}: {path}")


def split(tree: Any) -> tuple[Any, Any]:
  """Splits a combined tree into what stays and what trains.

  Both halves have the tree's nesting, with `None` in the places that the other half holds, so that the trainable half
  can be differentiated, optimised, donated and saved by itself. `join(*split(tree))` is `tree`.

  Args:
    tree: what `adapt` returned.

  Returns:
    `(frozen, trainable)`.

  Raises:
    ValueError: if the tree has no adapted leaf, or is a half itself.

  Example:
    >>> frozen, trainable = split(tree)  # doctest: +SKIP
    >>> opt_state = optax.adamw(1e-4).init(trainable)  # doctest: +SKIP
  """
  check_adapted(tree, "split")

  def without(node: Any, trained: bool) -> Any:
    gone = [name for name in parts(node) if (name in trained_parts(node)) == trained]
    return with_parts(node, dict.fromkeys(gone))

  frozen, trainable = (
    map_adapted(lambda w: without(w, trained), lambda w: without(w, trained), plain, tree)
    for trained, plain in ((True, lambda x: x), (False, lambda x: None))
  )
  return frozen, trainable


def join(frozen: Any, trainable: Any) -> Any:
  """Puts the halves of a tree together: the inverse of `split`.

  Args:
    frozen: the half with the bases and the frozen leaves.
    trainable: the half with the factors and the leaves trained whole; any that fits the base, such as another task's.

  Returns:
    The combined tree.

  Raises:
    ValueError: if the halves are of different trees, naming the leaves and how they differ.
  """
  _check_half(frozen, "frozen", trained=False)
  _check_half(trainable, "trainable", trained=True)
  left, left_def = _paths.flatten(frozen, is_leaf=_is_half_leaf)
  right, right_def = _paths.flatten(trainable, is_leaf=_is_half_leaf)
  if _differ(left_def, right_def):
    raise ValueError(f"join: the halves are of different trees. {_difference(frozen, trainable)}. {_SAME_TREE}")
  return jax.tree_util.tree_unflatten(
    left_def, [_joined(path, f, t) for (path, f), (_, t) in zip(left, right, strict=True)]
  )


_SAME_TREE = (
  "Join what one jaxlora.split returned, or the trainable half of a tree that was adapted from the same parameters with"
  " the same targets and train."
)


def _check_half(half: Any, name: str, trained: bool) -> None:
  """Raises if a half holds what belongs to the other one, or lacks what belongs to it."""
  for path, node in adapted_leaves(half):
    held = parts(node)
    own = [part for part in held if (part in trained_parts(node)) == trained]
    if foreign := [field for field, part in held.items() if part is not None and field not in own]:
      raise ValueError(
        f"join: {path}: expected (frozen, trainable) as split returns them; found {', '.join(foreign)} in the {name}"
        " half. The halves are swapped, or one of them is a whole tree: call join(*split(tree))."
      )
    if missing := [field for field, part in held.items() if part is None and field in own]:
      raise ValueError(
        f"join: {path}: expected (frozen, trainable) as split returns them; {', '.join(missing)} missing in the {name}"
        f" half. {_SAME_TREE}"
      )


def _difference(frozen: Any, trainable: Any) -> str:
  """How two halves of different structure differ: in their leaves, or in the first container that is another one."""
  ours, theirs = ({path for path, _ in _paths.flatten(half, _is_half_leaf)[0]} for half in (frozen, trainable))
  if ours != theirs:
    return (
      f"Only in the frozen half: {listed(sorted(ours - theirs)) or 'nothing'};"
      f" only in the trainable half: {listed(sorted(theirs - ours)) or 'nothing'}"
    )
  path, left, right = _first_other_container(frozen, trainable, ())
  kinds = [type(node).__name__ for node in (left, right)]
  if kinds[0] == kinds[1]:
    return f"{path}: the {kinds[0]} in the frozen half has other static fields or keys than the one in the trainable"
  return f"{path}: {kinds[0]} in the frozen half, {kinds[1]} in the trainable half"


def _first_other_container(left: Any, right: Any, place: tuple[Any, ...]) -> tuple[str, Any, Any]:
  """Where two trees with leaves of the same paths have different containers, and which."""

  def children(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]

  structure = functools.partial(jax.tree_util.tree_structure, is_leaf=_is_half_leaf)
  if type(left) is type(right):
    for (key, ours), (_, theirs) in zip(children(left), children(right), strict=False):
      if _differ(structure(ours), structure(theirs)):
        return _first_other_container(ours, theirs, (*place, *key))
  return _paths.path_string(place), left, right


def _differ(left: Any, right: Any) -> bool:
  return left != right  # JAX's own types call a tree's structure optional


def _kind(node: Any) -> str:
  if is_adapted(node):
    return type(node).__name__
  return "nothing" if node is None else "a plain leaf"


def _joined(path: str, frozen: Any, trainable: Any) -> Any:
  fits = type(frozen) is type(trainable) if is_adapted(frozen) else trainable is None
  if not fits:
    raise ValueError(
      f"join: {path}: {_kind(frozen)} in the frozen half, {_kind(trainable)} in the trainable half: the halves are of"
      f" different trees, or are not halves as split returns them. {_SAME_TREE}"
    )
  if not is_adapted(frozen):
    return frozen
  if isinstance(frozen, LoraWeight) and frozen.roles != trainable.roles:
    raise ValueError(
      f"join: {path}: roles {frozen.roles!r} in the frozen half, {trainable.roles!r} in the trainable half: the"
      f" halves are of different trees. {_SAME_TREE}"
    )
  if isinstance(frozen, LoraWeight) and parts(frozen).keys() != parts(trainable).keys():
    raise ValueError(
      f"join: {path}: the frozen half has the parts {', '.join(parts(frozen))}, the trainable half"
      f" {', '.join(parts(trainable))}: the halves are of different trees. {_SAME_TREE}"
    )
  whole = with_parts(trainable, {name: part for name, part in parts(frozen).items() if part is not None})
  if all(hasattr(part, "shape") for part in parts(whole).values()):
    check_weight(whole, f"join: {path}")
  return whole


def merge(tree: Any) -> Any:
  """Folds every update into its weight: plain parameters again, at no cost to inference.

      W' = W + scale * A B

  Args:
    tree: what `adapt` returned, trained or not.

  Returns:
    Parameters of the original nesting, shapes and dtypes.

  Raises:
    ValueError: where factors are NaN or infinite, or overflow the weight's dtype (checked outside `jit`, where values
      are known), naming the leaves; where they do not fit their base, or the tree is a half.
  """
  nodes, treedef = _paths.flatten(tree, is_leaf=is_adapted)
  adapted = [(path, node) for path, node in nodes if is_adapted(node)]
  for path, node in adapted:
    check_weight(node, f"merge: {path}")
  merged = [_merged(node) for _, node in nodes]
  broken = [
    f"{path} ({name})"
    for (path, node), leaf in zip(nodes, merged, strict=True)
    if is_adapted(node)
    for name in _not_finite(node, leaf)
  ]
  if broken:
    raise ValueError(
      f"merge: found NaN or infinite values in {listed(broken)}, expected finite factors and sums. Training has"
      " diverged: go back to an earlier checkpoint; nothing was merged."
    )
  return jax.tree_util.tree_unflatten(treedef, merged)


def _merged(node: Any) -> Any:
  if isinstance(node, LoraWeight):
    return node.materialize()
  return node.value if isinstance(node, FullWeight) else node


def _not_finite(node: Any, merged: Any) -> list[str]:
  """What of a node is NaN or infinite: its parts, or where those are fine their sum, which its dtype cannot hold."""
  held = {**parts(node), "base + A B": merged}
  if any(isinstance(part, jax.core.Tracer) for part in held.values()):
    return []
  finite = {name: jnp.isfinite(part) for name, part in held.items()}
  broken = [name for name in parts(node) if name != "base" and not finite[name].all()]
  overflows = (finite["base"] & ~finite["base + A B"]).any()  # a base may hold infinities of its own
  return broken or ["base + A B"] * bool(overflows)


def strip(tree: Any) -> Any:
  """The base alone, as it was before `adapt`: exact, bit for bit, since it was kept and is not computed back.

  Args:
    tree: what `adapt` returned, trained or not.

  Returns:
    The original parameters.

  Raises:
    ValueError: if the bases are missing, naming the leaf.
  """
  for path, node in adapted_leaves(tree):
    check_parts(node, f"strip: {path}", ("base",))
  return map_adapted(lambda w: w.base, lambda w: w.base, lambda x: x, tree)
