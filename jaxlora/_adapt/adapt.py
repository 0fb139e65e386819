"""`adapt`: from parameters to a tree with adapted leaves."""

from collections.abc import Callable
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._adapt.config import LeafPlan, LoraConfig, leaf_plan
from jaxlora._adapt.initializers import INITIALIZERS, from_weight, kaiming
from jaxlora._adapt.probe import study
from jaxlora._adapt.targets import EvidenceByPath, select
from jaxlora._base.dtypes import holds_factors, wide
from jaxlora._base.keys import leaf_key, typed_key
from jaxlora._base.paths import flatten
from jaxlora._base.patterns import first_match
from jaxlora._weight.flax import register_with_flax
from jaxlora._weight.roles import fan, matrices
from jaxlora._weight.variant import VARIANTS, Start
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, started


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
  nodes, treedef = flatten(params, is_leaf=is_adapted)
  if not nodes:
    raise ValueError("adapt: the tree has no leaves; pass the model's parameters.")
  leaves = dict(nodes)
  for path, leaf in leaves.items():
    if is_adapted(leaf):
      raise ValueError(f"adapt: {path} is adapted already. Merge first (jaxlora.merge), or adapt the original tree.")
  evidence = None
  if probe is not None:
    evidence = dict(zip(leaves, study(probe, params), strict=True))

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
