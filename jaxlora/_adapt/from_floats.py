"""Starts from the floats that a base of codes was made of: what the codes lost goes into the factors.

The adapted weight is then as near to the floats as codes and factors can be: `W ~ Q + scale A B`.

Reading order: which inits -> what is checked of a leaf -> the starts.
"""

from collections.abc import Mapping
import functools
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._adapt.config import LeafPlan
from jaxlora._adapt.initializers import from_weight, pissa, steps_of
from jaxlora._base.checks import all_finite, is_known
from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.dtypes import wide
from jaxlora._base.matrix import frobenius, ratio
from jaxlora._base.memory import on_device
from jaxlora._quant.again import cannot_rewrite, encoded_as
from jaxlora._weight.matrices import laid_out, matrices
from jaxlora._weight.roles import low_rank_delta
from jaxlora._weight.weight import SCALINGS

_SAME = 0.7  # of its norm: no format loses as much, and weights that have nothing to do with each other differ by 1.4


def checked_floats(path: str, base: Any, plan: LeafPlan, floats: Mapping[str, Any] | None) -> Any:
  """The floats that a leaf starts from, checked; `None` where its init takes none."""
  steps, both = steps_of(plan.init), from_weight(plan.init)
  needs, may = steps is not None, both is not None and not both.cancels
  if needs and not is_coded(base):
    raise ValueError(
      f"{path}: init {plan.init!r} starts from what the codes of a base lost, and this base is {base.dtype}. Quantise"
      f" it first (jaxlora.quantize), or start it otherwise (LoraConfig(overrides={{{re.escape(path)!r}: {{'init':"
      " 'kaiming'}})."
    )
  if needs and floats is None:
    raise ValueError(
      f"{path}: init {plan.init!r} starts from what the codes of its base lost; pass the weights that it was quantised"
      " from: jaxlora.adapt(quantised, config, key, floats=params)."
    )
  if floats is None or not is_coded(base) or not (needs or may):
    return None
  if (why := cannot_rewrite(base)) is not None and steps != 0:
    raise ValueError(
      f"{path}: init {plan.init!r} writes the base again, and {why}. Use init='residual', which leaves it as it is."
    )
  if path not in floats:
    raise ValueError(
      f"adapt: floats has no leaf {path}; expected the tree that the base was quantised from, with the same paths."
    )
  leaf = floats[path]
  found = (
    "codes" if is_coded(leaf) else f"shape {tuple(leaf.shape)}, dtype {leaf.dtype}" if hasattr(leaf, "dtype") else leaf
  )
  if is_coded(leaf) or not hasattr(leaf, "dtype") or not jnp.issubdtype(leaf.dtype, jnp.floating):
    raise ValueError(f"adapt: floats: {path}: found {found}, expected the floats that the base was quantised from.")
  if tuple(leaf.shape) != tuple(base.shape):
    raise ValueError(f"adapt: floats: {path}: found {found}, expected the shape of the base, {tuple(base.shape)}.")
  return leaf


class Started(NamedTuple):
  """A base, and factors that make up for what it lost."""

  base: Any
  a: jax.Array
  b: jax.Array


def started(leaf: Any, base: Any, roles: str, plan: LeafPlan, key: jax.Array) -> Started:
  """The base and the factors of one leaf, from its floats.

  Args:
    leaf: the floats, also NumPy's, which are moved to the device.
    base: the codes that were made of them.
    roles: of both.
    plan: of the leaf.
    key: of the leaf, for initialisers that draw.
  """
  floats = jnp.asarray(on_device(leaf))
  floats = floats.astype(wide(floats))
  _check_values(plan, floats, base)
  steps = steps_of(plan.init)
  if steps is not None:
    return _loftq(floats, base, roles, plan, steps)
  both = from_weight(plan.init)
  assert both is not None
  scale = SCALINGS[plan.scaling](plan.alpha, plan.rank)
  a, b = _laid_out(both.make(key, matrices(floats, roles), plan.rank, scale), base, roles, plan)
  return Started(encoded_as(_rest(floats, a, b, roles, scale), base), a, b)


def _loftq(floats: jax.Array, base: Any, roles: str, plan: LeafPlan, steps: int) -> Started:
  """Codes of what the factors leave, then factors of what the codes leave, step by step.

      Q = q(W - scale A B),    U S V^T = W - Q,    A = sqrt(S / scale) U[:, :rank]^T,  B = sqrt(S / scale) V[:, :rank]^T

  Li et al., "LoftQ" (arXiv:2310.08659), algorithm 1. Without a step the codes are those that the base has.
  """
  scale = SCALINGS[plan.scaling](plan.alpha, plan.rank)
  factors = None
  for _ in range(steps):
    base = encoded_as(floats if factors is None else _rest(floats, *factors, roles, scale), base)
    factors = _of_the_rest(floats, base, roles, plan, scale)
  return Started(base, *(factors or _of_the_rest(floats, base, roles, plan, scale)))


def _of_the_rest(floats: jax.Array, base: Any, roles: str, plan: LeafPlan, scale: float) -> tuple[jax.Array, jax.Array]:
  rest = floats - decoded(on_device(base)).astype(floats.dtype)
  if is_known(rest) and not bool(rest.any()):
    raise ValueError(
      f"{plan.path}: init {plan.init!r}: its codes stand for its floats exactly: nothing is left to start from, and"
      " factors of zeros never train. Start it otherwise"
      f" (LoraConfig(overrides={{{re.escape(plan.path)!r}: {{'init': 'kaiming'}}}}))."
    )
  return _laid_out(pissa(None, matrices(rest, roles), plan.rank, scale), base, roles, plan)


def _laid_out(thin: tuple[jax.Array, jax.Array], base: Any, roles: str, plan: LeafPlan) -> tuple[jax.Array, jax.Array]:
  a, b = (laid_out(x, base.shape, roles, own) for x, own in zip(thin, "io", strict=True))
  return a.astype(plan.dtype or base.dtype), b.astype(plan.dtype or base.dtype)


@functools.partial(jax.jit, static_argnums=(3, 4))
def _rest(floats: jax.Array, a: jax.Array, b: jax.Array, roles: str, scale: float) -> jax.Array:
  return floats - scale * low_rank_delta(a.astype(floats.dtype), b.astype(floats.dtype), roles)


@jax.jit
def _difference(floats: jax.Array, base: Any) -> jax.Array:
  flat = floats.ravel()
  return ratio(frobenius(flat - decoded(base).astype(floats.dtype).ravel()), frobenius(flat))


def _check_values(plan: LeafPlan, floats: jax.Array, base: Any) -> None:
  if not is_known(floats, *jax.tree.leaves(base)):
    return
  if not all_finite(floats):
    raise ValueError(f"adapt: floats: {plan.path}: found NaN or infinite values, expected finite ones.")
  off = float(_difference(floats, on_device(base)))
  if not off < _SAME:
    raise ValueError(
      f"adapt: floats: {plan.path}: found other weights: they differ from the base by {off:.2f} of their norm, where a"
      f" quantisation loses a tenth or so. Pass the tree that this base was quantised from."
    )
