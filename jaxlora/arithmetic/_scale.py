"""`scale`, `subtract`, `interpolate`: multiples and differences of updates."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import check_number, is_known
from jaxlora._weight.weight import FullWeight, LoraWeight, parts, with_parts
from jaxlora.arithmetic._aligned import aligned
from jaxlora.arithmetic._combine import combine
from jaxlora.arithmetic._sums import Term, exact, is_one, total, whole_sum
from jaxlora.svd._update import check_linear


def scale(tree: Any, factor: Any) -> Any:
  """Every update times a number: 0 is the base, 1 the adapter as it is, -1 forgets what it learned.

      base + delta  ->  base + factor * delta

  Args:
    tree: what `adapt` returned, trained.
    factor: one number, of any sign; may be traced.

  Returns:
    The tree with B, and for leaves trained whole their difference from the base, multiplied. Variants whose update is
    not linear in B alone take the factor in their alpha.

  Raises:
    ValueError, TypeError: as `combine`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.scale(tree, 0.5)["kernel"].rank
    2
  """
  check_number(factor, "scale: factor")
  nodes, treedef = aligned([tree], ["the tree"], "scale")
  if is_one(factor):
    return tree
  return jax.tree_util.tree_unflatten(treedef, [_scaled(path, node, factor) for path, (node,) in nodes.items()])


def _scaled(path: str, node: Any, factor: Any) -> Any:
  if isinstance(node, FullWeight):
    return whole_sum([Term(node, factor)], total)
  if not isinstance(node, LoraWeight):
    return node
  check_linear(path, node, "scale")
  if node.kind.plain:
    return with_parts(node, {n: x * jnp.asarray(factor, x.dtype) for n, x in parts(node).items() if n in ("b", "b0")})
  if is_known(factor):
    return dataclasses.replace(node, alpha=node.alpha * float(factor))
  return exact(path, [Term(node, factor)])  # alpha is static, so a traced number multiplies the effective factors


def subtract(tree: Any, other: Any) -> Any:
  """The update of one adapter less that of another, exactly: `combine([tree, other], [1, -1])`.

  Args:
    tree, other: adapted trees on one base.

  Returns:
    An adapted tree whose rank is the sum of the ranks; `compress` makes it smaller.

  Raises:
    ValueError: as `combine`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5))}
    >>> one, two = (jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(k)) for k in (1, 2))
    >>> jaxlora.subtract(one, two)["kernel"].rank
    4
  """
  return combine([tree, other], [1, -1])


def interpolate(tree: Any, other: Any, t: Any) -> Any:
  """Between two adapters, exactly: `(1 - t) * tree + t * other`; 0 is the first one as it is, 1 the second.

  Args:
    tree, other: adapted trees on one base.
    t: one number; below 0 or above 1 it goes on beyond them. May be traced.

  Returns:
    An adapted tree whose rank is the sum of the ranks; `compress` makes it smaller.

  Raises:
    ValueError, TypeError: as `combine`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5))}
    >>> one, two = (jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(k)) for k in (1, 2))
    >>> jaxlora.interpolate(one, two, 1)["kernel"] is two["kernel"]
    True
  """
  check_number(t, "interpolate: t")
  return combine([tree, other], [1 - t, t])
