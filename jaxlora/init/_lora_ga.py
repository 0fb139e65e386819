"""LoRA-GA: factors along the gradient of the weight."""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.checks import check_finite
from jaxlora._base.dtypes import wide
from jaxlora._base.keys import leaf_key
from jaxlora._base.matrix import matmul, svd
from jaxlora._base.paths import flatten
from jaxlora._transform.wrap import wrap
from jaxlora._weight.matrices import laid_out, thin
from jaxlora._weight.weight import LoraWeight, is_leaf_node, start_subtracted
from jaxlora.init._options import Options, check_missing, orthonormal_rows, random_rows, rows_shape, side, without_start


def lora_ga(tree: Any, weights: dict[str, LoraWeight], options: Options) -> dict[str, LoraWeight]:
  for path, weight in weights.items():
    sides = side(weight, "i"), side(weight, "o")
    if 2 * weight.rank > min(sides):
      raise ValueError(
        f"init_from_data: {path}: 'lora_ga' takes twice the rank, {2 * weight.rank}, of singular vectors of a"
        f" {sides[0]} x {sides[1]} gradient; use a rank of at most {min(sides) // 2} for it."
      )
  counts = {p: min(2 * w.rank + options.oversample, side(w, "i"), side(w, "o")) for p, w in weights.items()}
  rows = {p: random_rows(leaf_key(options.key, p), rows_shape(w, "o", counts[p]), w.b) for p, w in weights.items()}
  gradient = _gradient_products(tree, weights, counts, options)
  q: dict[str, jax.Array] = {}
  z: dict[str, jax.Array] = {}
  for _ in range(1 + options.iterations):
    q = {p: orthonormal_rows(x) for p, x in gradient("a", rows).items()}  # an orthonormal basis of rows G^T
    z = gradient("b", {p: x.reshape(rows_shape(weights[p], "i", counts[p])) for p, x in q.items()})  # Q G
    rows = {p: orthonormal_rows(x).reshape(rows_shape(weights[p], "o", counts[p])) for p, x in z.items()}
  check_finite([(f"the gradient of {path}", x) for path, x in z.items()], "init_from_data")
  missing = {path: "zero" for path, x in z.items() if not bool(x.any())}
  check_missing(missing, options, "the gradient is of no use")
  return {p: _with_gradient(w, q[p], z[p], options.gamma) for p, w in weights.items() if p not in missing}


def loss_of_factors(fn: Callable[..., Any], treedef: Any, paths: list[str]) -> Callable[..., jax.Array]:
  """The loss as a function of factors of scale 1 by path, of the nodes of the tree, and of a batch."""
  apply = wrap(fn, on_materialize="ignore")

  def loss(factors: dict[str, dict[str, jax.Array]], nodes: list[Any], batch: Any) -> jax.Array:
    def with_factors(path: str, node: Any) -> Any:
      if not isinstance(node, LoraWeight):
        return node
      return LoraWeight.from_factors(node.base, factors[path]["a"], factors[path]["b"], node.roles)

    full = [with_factors(*pair) for pair in zip(paths, nodes, strict=True)]
    return apply(jax.tree_util.tree_unflatten(treedef, full), batch)

  return loss


def _gradient_products(
  tree: Any, weights: dict[str, LoraWeight], counts: dict[str, int], options: Options
) -> Callable[[str, dict[str, jax.Array]], dict[str, jax.Array]]:
  """A function from rows, over the side opposite to `own`, to their products with the gradients of all weights.

  With A zero the gradient of A is `B G^T`, with B zero that of B is `A G`, for the gradient G of the weight, (in, out).
  """
  flat, treedef = flatten(tree, is_leaf=is_leaf_node)
  loss = loss_of_factors(options.fn, treedef, [path for path, _ in flat])
  nodes = [node for _, node in flat]
  gradient = jax.jit(jax.grad(loss))

  def products(own: str, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    other, factors = "b" if own == "a" else "a", {}
    for path, weight in weights.items():
      zero = jnp.zeros(rows_shape(weight, "i" if own == "a" else "o", counts[path]), getattr(weight, own).dtype)
      factors[path] = {own: zero, other: rows[path].astype(getattr(weight, other).dtype)}
    total: dict[str, jax.Array] = {}
    for batch in options.batches:
      for path, found in gradient(factors, nodes, batch).items():
        part = thin(found[own], weights[path].roles).astype(wide(found[own]))
        total[path] = total[path] + part if path in total else part
    if not total:
      raise ValueError("init_from_data: batches is empty; expected at least one batch.")
    return total

  return products


def _with_gradient(weight: LoraWeight, q: jax.Array, z: jax.Array, gamma: float) -> LoraWeight:
  """The weight with factors along the singular vectors of the gradient `q^T z`, q with orthonormal rows."""
  inside, rank = svd(z), weight.rank
  left = matmul(inside.u.mT, q)
  size = side(weight, "o") ** 0.25 / gamma**0.5
  shape, roles = weight.base.shape, weight.roles
  a = laid_out(size * left[:, :rank], shape, roles, "i").astype(weight.a.dtype)
  b = laid_out(size * inside.vt[:, rank : 2 * rank], shape, roles, "o").astype(weight.b.dtype)
  return start_subtracted(dataclasses.replace(weight, a=a, b=b, extra=without_start(weight)))
