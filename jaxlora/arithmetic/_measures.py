"""`norms` and `cosine` of updates."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.dtypes import wide
from jaxlora._base.matrix import frobenius, matmul
from jaxlora._weight.matrices import thin
from jaxlora._weight.weight import LoraWeight, is_adapted
from jaxlora.arithmetic._aligned import aligned
from jaxlora.arithmetic._sums import Term, norm_of, weighted, widest


def norms(tree: Any) -> dict[str, jax.Array]:
  """The Frobenius norm of every update, from its thin factors; no update is formed, but for DoRA's.

  Args:
    tree: what `adapt` returned, trained.

  Returns:
    Path -> scalar. Of a leaf trained whole it is the norm of its difference from the base.

  Raises:
    ValueError: if the tree has no adapted leaf or is a half; where values are not finite, naming the leaves.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> float(jaxlora.norms(tree)["kernel"])  # B is zero
    0.0
  """
  nodes, _ = aligned([tree], ["the tree"], "norms")
  return {path: norm_of(node) for path, (node,) in nodes.items() if is_adapted(node)}


def cosine(tree: Any, other: Any) -> dict[str, jax.Array]:
  """The cosine of the angle between the updates of two adapters, leaf by leaf; none is formed, but for DoRA's.

      <delta, delta'>_F / (|delta| |delta'|),    <A^T B, A'^T B'>_F = sum((A A'^T) * (B B'^T))

  Args:
    tree, other: adapted trees on one base.

  Returns:
    Path -> scalar in [-1, 1] for every leaf that either of them adapts; 0 where an update is zero.

  Raises:
    ValueError: as `combine`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5))}
    >>> one, two = (jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(k)) for k in (1, 2))
    >>> float(jaxlora.cosine(one, two)["kernel"])  # B is zero
    0.0
  """
  nodes, _ = aligned([tree, other], ["the first tree", "the second tree"], "cosine")
  return {path: _cosine(*pair) for path, pair in nodes.items() if any(map(is_adapted, pair))}


def _cosine(ours: Any, theirs: Any) -> jax.Array:
  if all(isinstance(node, LoraWeight) and node.kind.linear for node in (ours, theirs)):
    (a, b), (c, d) = ([thin(x, node.roles).astype(wide(x)) for x in node.factors()] for node in (ours, theirs))
    a, b, c, d = (x.astype(widest([a, b, c, d])) for x in (a, b, c, d))
    inner, lengths = jnp.sum(matmul(a, c.mT) * matmul(b, d.mT)), (norm_of(ours), norm_of(theirs))
  else:
    x, y = weighted([Term(ours, 1), Term(theirs, 1)])
    inner, lengths = jnp.sum(x * y), (frobenius(x.ravel()), frobenius(y.ravel()))
  product = (lengths[0] * lengths[1]).astype(inner.dtype)
  return jnp.where(product > 0, jnp.clip(inner / jnp.where(product > 0, product, 1), -1, 1), 0)
