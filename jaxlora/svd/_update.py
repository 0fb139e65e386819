"""The update of one adapted leaf, and its decomposition from thin factors."""

from collections.abc import Sequence
from typing import Any

import jax

from jaxlora._base.checks import check_finite
from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.matrix import LowRank, product_svd
from jaxlora._weight.matrices import laid_out, thin
from jaxlora._weight.placement import beside_its_base
from jaxlora._weight.roles import axes_of
from jaxlora._weight.tree import adapted_leaves, check_adapted
from jaxlora._weight.weight import LoraWeight, parts


def check_linear(path: str, weight: LoraWeight, what: str) -> None:
  """Raises unless the adapted weight is the base plus a product of factors."""
  if not weight.kind.linear:
    raise ValueError(
      f"{what}: {path} is of variant {weight.variant!r}, which rescales the whole weight: its update is no product of"
      " thin factors. jaxlora.combine([tree], [1], 'svd', rank=...) gives the best plain LoRA for it, with what that"
      " loses; or go on from the merged parameters (jaxlora.merge)."
    )


def delta_svd(weight: LoraWeight) -> LowRank:
  """The decomposition of a weight's update, (stack, in, out); it must be linear."""
  a, b = weight.factors()
  return product_svd(thin(a, weight.roles), thin(b, weight.roles))


def factors_of_svd(found: LowRank, shape: Sequence[int], roles: str, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """A and B of a weight of `shape` whose product is `found`, (stack, in, out)."""
  a, b = found.factors()
  return laid_out(a, shape, roles, "i").astype(dtype), laid_out(b, shape, roles, "o").astype(dtype)


def weight_of_svd(like: LoraWeight, found: LowRank, dtype: Any = None) -> LoraWeight:
  """A plain LoRA weight of scale 1 on the base of another one, whose update is `found`, (stack, in, out)."""
  dtype = dtype or wider_dtype(like.a.dtype, like.b.dtype)
  factors = factors_of_svd(found, like.base.shape, like.roles, dtype)
  return beside_its_base(LoraWeight.from_factors(like.base, *factors, like.roles, dropout=like.dropout, sure=like.sure))


def lora_leaves(tree: Any, what: str, linear: bool = True) -> list[tuple[str, LoraWeight]]:
  """The low-rank leaves of a whole tree; raises unless factors are finite and, with `linear`, updates are."""
  check_adapted(tree, what)
  leaves = [(path, node) for path, node in adapted_leaves(tree) if isinstance(node, LoraWeight)]
  check_finite([(f"{path} ({n})", x) for path, w in leaves for n, x in parts(w).items() if n != "base"], what)
  for path, weight in leaves if linear else ():
    check_linear(path, weight, what)
  return leaves


def spectrum(tree: Any) -> dict[str, jax.Array]:
  """The singular values of every update, from its thin factors; no update is formed.

  Args:
    tree: what `adapt` returned, trained or not.

  Returns:
    Path -> singular values, falling, `(*stack, rank)`, at most as many as the smaller side of the weight. Leaves
    trained whole are not in it.

  Raises:
    ValueError: if the tree has no adapted weight or is a half; where factors are not finite, or a variant's update is
      no product of factors (DoRA), naming the leaves.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.spectrum(tree)["kernel"].shape, float(jaxlora.spectrum(tree)["kernel"].max())  # B is zero
    ((2,), 0.0)
  """
  values = {}
  for path, weight in lora_leaves(tree, "spectrum"):
    s = delta_svd(weight).s
    stack = tuple(weight.base.shape[d] for d in axes_of(weight.roles, "s"))
    values[path] = s.reshape(*stack, s.shape[-1])
  return values
