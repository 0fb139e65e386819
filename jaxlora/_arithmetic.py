"""Arithmetic on the updates of adapters of one base: sums, multiples, differences, norms, angles.

What is added is always the update of a leaf as a whole, `delta = scale * sum_r a b`, never A and B apart: the sum of
products is not the product of sums.

Reading order: the leaves of several trees -> the exact sum -> sums that are formed -> the public functions.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._adapt import check_adapted, is_plain
from jaxlora._decompose import (
  Truncation,
  check_finite,
  check_linear,
  delta_svd,
  is_concrete,
  is_linear,
  low_rank,
  rank_or_energy,
  truncated,
  with_delta,
)
from jaxlora._initializers import leaf_key
from jaxlora._matrix import axes_of, frobenius, matmul, matrices, thin, wide
from jaxlora._targets import listed
from jaxlora._transform import typed_key
from jaxlora._weight import FullWeight, LoraWeight, check_weight, is_adapted, parts, wider_dtype, with_parts

# ----------------------------------------------------------------------------------------------------------------------
# The leaves of several trees.


class Term(NamedTuple):
  """One tree's share of a leaf: its node there, and the weight of its update."""

  node: Any
  weight: Any


def _aligned(trees: Sequence[Any], names: Sequence[str], what: str) -> tuple[dict[str, list[Any]], Any]:
  """The nodes of all trees by path; raises unless they are adapters of one base."""
  for tree, name in zip(trees, names, strict=True):
    check_adapted(tree, f"{what}: {name}")
  flat = [_paths.flatten(tree, is_leaf=is_adapted) for tree in trees]
  first, treedef = flat[0]
  nodes = {path: [node] for path, node in first}
  for (other, other_def), name in zip(flat[1:], names[1:], strict=True):
    if other_def != treedef:
      ours, theirs = set(nodes), {path for path, _ in other}
      raise ValueError(
        f"{what}: {names[0]} and {name} are of different trees. Only in {names[0]}: "
        f"{listed(sorted(ours - theirs)) or 'nothing'}; only in {name}: {listed(sorted(theirs - ours)) or 'nothing'}."
        " Expected adapters of the same parameters."
      )
    for path, node in other:
      _check_same_leaf(path, nodes[path][0], node, (names[0], name), what)
      nodes[path].append(node)
  for path, group in nodes.items():
    for node, name in zip(group, names, strict=True):
      if is_adapted(node):
        check_weight(node, f"{what}: {name}: {path}")
  check_finite(
    [
      (f"{path} ({part}) of {name}", x)
      for path, group in nodes.items()
      for node, name in zip(group, names, strict=True)
      for part, x in _moving(node).items()
    ],
    what,
  )
  return nodes, treedef


def _moving(node: Any) -> dict[str, Any]:
  """The arrays of an update."""
  return {name: x for name, x in parts(node).items() if name != "base"} if is_adapted(node) else {}


def base_of(node: Any) -> Any:
  return node.base if is_adapted(node) else node


def _check_same_leaf(path: str, ours: Any, theirs: Any, names: tuple[str, str], what: str) -> None:
  """Raises unless two nodes stand on one base."""
  if isinstance(ours, LoraWeight) and isinstance(theirs, LoraWeight) and ours.roles != theirs.roles:
    raise ValueError(
      f"{what}: {path} has roles {ours.roles!r} in {names[0]} and {theirs.roles!r} in {names[1]}; expected the same."
    )
  left, right = base_of(ours), base_of(theirs)
  if left is right:
    return
  kinds = [(jnp.shape(x), jnp.result_type(x)) for x in (left, right)]
  if kinds[0] != kinds[1]:
    raise ValueError(
      f"{what}: the base of {path} has shape {kinds[0][0]}, dtype {kinds[0][1]} in {names[0]} and shape {kinds[1][0]},"
      f" dtype {kinds[1][1]} in {names[1]}; expected adapters of one base."
    )
  if is_concrete(left, right) and not _equal(left, right):
    raise ValueError(
      f"{what}: {path} has other values in the base of {names[1]} than in that of {names[0]}; an update means something"
      " beside its own base alone. To put it on the first base all the same: jaxlora.join(jaxlora.split(first)[0],"
      " jaxlora.split(other)[1])."
    )


def _equal(left: Any, right: Any) -> bool:
  """Whether two arrays are alike; NaN is like NaN, and random keys are compared by their data."""
  if jnp.issubdtype(jnp.result_type(left), jax.dtypes.prng_key):
    left, right = jax.random.key_data(left), jax.random.key_data(right)
  ours, theirs = np.asarray(left), np.asarray(right)
  return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())


# ----------------------------------------------------------------------------------------------------------------------
# The exact sum.


def _nonzero(weight: Any) -> bool:
  return not is_concrete(weight) or float(weight) != 0


def _is_one(weight: Any) -> bool:
  return is_concrete(weight) and float(weight) == 1


def _exact(path: str, terms: Sequence[Term]) -> Any:
  """`base + sum_t w_t delta_t`: factors side by side, every scale and weight folded into B.

  sum_t w_t s_t A_t B_t = [A_1; A_2; ...]^T [w_1 s_1 B_1; w_2 s_2 B_2; ...]
  """
  adapted = [term for term in terms if is_adapted(term.node)]
  if not adapted:
    return terms[0].node
  moved = [term for term in adapted if _nonzero(term.weight)] or [adapted[0]._replace(weight=0.0)]
  if len(moved) == 1 and _is_one(moved[0].weight):
    return moved[0].node
  if any(isinstance(term.node, FullWeight) for term in moved):
    return _whole(moved, _sum)
  first = moved[0].node
  stack = first.roles.count("s")
  for term in moved:
    check_linear(path, term.node, "combine")
  factors = [term.node.factors() for term in moved]
  dtype = _widest([factor for pair in factors for factor in pair])
  a = jnp.concatenate([a.astype(dtype) for a, _ in factors], axis=stack)
  b = jnp.concatenate(
    [b.astype(dtype) * jnp.asarray(t.weight, dtype) for (_, b), t in zip(factors, moved, strict=True)], axis=stack
  )
  return _plain(first, a, b, moved)


def _plain(like: LoraWeight, a: jax.Array, b: jax.Array, terms: Sequence[Term]) -> LoraWeight:
  """A LoRA weight of scale 1 with these factors. The dropout is the common one, or none."""
  rank = a.shape[like.roles.count("s")]
  return LoraWeight(like.base, a, b, roles=like.roles, rank=rank, alpha=float(rank), dropout=_common_dropout(terms))


def _common_dropout(terms: Sequence[Term]) -> float:
  dropouts = {term.node.dropout for term in terms if isinstance(term.node, LoraWeight)}
  return dropouts.pop() if len(dropouts) == 1 else 0.0


def _widest(arrays: Sequence[Any]) -> Any:
  dtype = arrays[0].dtype
  for array in arrays[1:]:
    dtype = wider_dtype(dtype, array.dtype)
  return dtype


# ----------------------------------------------------------------------------------------------------------------------
# Sums that are formed: element by element, one leaf at a time, brought back to a rank.


def _dense(node: Any) -> jax.Array:
  """The update as an array of the base's shape."""
  base = base_of(node)
  if not is_adapted(node):
    return jnp.zeros(base.shape, wide(base))
  if isinstance(node, FullWeight):
    dtype = wide(base, node.value)
    return node.value.astype(dtype) - base.astype(dtype)
  dtype = wide(*parts(node).values())
  node = with_parts(node, {name: x.astype(dtype) for name, x in parts(node).items()})
  return node.delta() if is_linear(node) else node.materialize() - node.base


def _whole(terms: Sequence[Term], total: Callable[[list[jax.Array]], jax.Array]) -> FullWeight:
  """A leaf trained whole, with the sum of the updates: exact, as it needs no rank."""
  first = next(term.node for term in terms if isinstance(term.node, FullWeight))
  moved = total(_weighted(terms))
  return FullWeight(first.base, (first.base.astype(moved.dtype) + moved).astype(first.value.dtype))


def _weighted(terms: Sequence[Term]) -> list[jax.Array]:
  deltas = [_dense(term.node) for term in terms]
  dtype = _widest(deltas)
  return [x.astype(dtype) * jnp.asarray(term.weight, dtype) for x, term in zip(deltas, terms, strict=True)]


def _sum(deltas: Sequence[jax.Array]) -> jax.Array:
  return functools.reduce(jnp.add, deltas)


def _trimmed(x: jax.Array, density: float) -> jax.Array:
  """The elements of each row that are largest in magnitude; zeros elsewhere."""
  size = x.shape[1]
  count = max(1, round(density * size))
  least = jnp.sort(jnp.abs(x), axis=1)[:, size - count :][:, :1]
  return jnp.where(jnp.abs(x) >= least, x, 0)


def _dropped(x: jax.Array, density: float, key: jax.Array) -> jax.Array:
  """Each element with probability `density`, over it; zeros elsewhere: the mean is `x`."""
  return jnp.where(jax.random.bernoulli(key, density, x.shape), x / jnp.asarray(density, x.dtype), 0)


def _elected(deltas: Sequence[jax.Array]) -> jax.Array:
  """For each element the mean of those updates that have the sign of their sum there, and are not zero."""
  each = jnp.stack(list(deltas))
  agrees = (jnp.sign(each) == jnp.sign(each.sum(0))[None]) & (each != 0)
  return jnp.where(agrees, each, 0).sum(0) / jnp.maximum(agrees.sum(0), 1).astype(each.dtype)


class Merging(NamedTuple):
  """How updates are merged element by element.

  Attributes:
    sparse: from an update, (stack, elements), the density and a key to what of it takes part.
    total: from the weighted updates to one.
    random: whether `sparse` uses the key.
  """

  sparse: Callable[[jax.Array, float, Any], jax.Array]
  total: Callable[[Sequence[jax.Array]], jax.Array]
  random: bool = False


# Sums of updates that are formed element by element.
FORMED: dict[str, Merging] = {
  "ties": Merging(lambda x, density, key: _trimmed(x, density), _elected),
  "dare": Merging(_dropped, _sum, random=True),
  "magnitude": Merging(lambda x, density, key: _trimmed(x, density), _sum),
}
_PLAIN_SUM = Merging(lambda x, density, key: x, _sum)  # "svd", where an update is no product of factors
METHODS = ("exact", "svd", *FORMED)


class Plan(NamedTuple):
  """What `combine` was asked for, checked."""

  method: str
  rank: int | None
  density: float
  key: jax.Array | None


class Row(NamedTuple):
  """What `truncated` makes a row of the report of, where one is wanted."""

  path: str
  rank: int | None
  norm: Any
  error: Any


def _to_rank(path: str, terms: Sequence[Term], plan: Plan) -> tuple[Any, Row | None]:
  """The sum of the updates of one leaf at its rank, and what that lost; `None` for a leaf without an update."""
  adapted = [term for term in terms if is_adapted(term.node)]
  if not adapted:
    return terms[0].node, None
  moved = [term for term in adapted if _nonzero(term.weight)]
  if plan.method == "svd" and plan.rank is None and len(moved) == 1 and _is_one(moved[0].weight):
    return moved[0].node, Row(path, getattr(moved[0].node, "rank", None), _norm(moved[0].node), 0)
  nonlinear = any(isinstance(term.node, LoraWeight) and not is_linear(term.node) for term in moved)
  if plan.method in FORMED or (plan.method == "svd" and nonlinear):
    total, first = _formed(path, adapted, plan), adapted[0].node
    if any(isinstance(term.node, FullWeight) for term in adapted):
      value = (first.base.astype(total.dtype) + total).astype(first.base.dtype)
      return FullWeight(first.base, value), Row(path, None, jnp.linalg.norm(total.ravel()), 0)
    return _low_rank_sum(path, total, adapted, plan)
  node = _exact(path, terms)
  if isinstance(node, FullWeight):
    return node, Row(path, None, jnp.linalg.norm(_dense(node).ravel()), 0)
  found = delta_svd(node)
  rank, norm = _target(adapted, plan, found.rank), frobenius(found.s)
  if plan.method == "exact" or node.rank <= rank:
    return node, Row(path, node.rank, norm, 0)
  cut = found.cut(rank)
  return with_delta(node, cut), Row(path, cut.rank, norm, cut.error)


def _target(terms: Sequence[Term], plan: Plan, most: int) -> int:
  """The rank to bring a leaf to: that asked for, or the largest among the adapters."""
  ranks = [
    term.node.factors()[0].shape[term.node.roles.count("s")] for term in terms if isinstance(term.node, LoraWeight)
  ]
  return min(most, plan.rank or max(ranks))


def _formed(path: str, terms: Sequence[Term], plan: Plan) -> jax.Array:
  """The merged update, an array of the base's shape. A stacked leaf is thinned out slice by slice."""
  merging = FORMED.get(plan.method, _PLAIN_SUM)
  key = None if plan.key is None else leaf_key(plan.key, path)
  stack = next((axes_of(term.node.roles, "s") for term in terms if isinstance(term.node, LoraWeight)), [])

  def sparse(k: int, x: jax.Array) -> jax.Array:
    slices = jnp.moveaxis(x, stack, range(len(stack)))
    flat = slices.reshape(math.prod(slices.shape[: len(stack)]), -1)
    kept = merging.sparse(flat, plan.density, None if key is None else jax.random.fold_in(key, k))
    return jnp.moveaxis(kept.reshape(slices.shape), range(len(stack)), stack)

  return merging.total([sparse(k, x) for k, x in enumerate(_weighted(terms))])


def _low_rank_sum(path: str, total: jax.Array, terms: Sequence[Term], plan: Plan) -> tuple[LoraWeight, Row]:
  node = terms[0].node
  x = matrices(total, node.roles)
  found = low_rank(
    x, _target(terms, plan, min(x.shape[1:])), key=None if plan.key is None else leaf_key(plan.key, path)
  )
  merged = with_delta(node, found, _widest([factor for term in terms for factor in (term.node.a, term.node.b)]))
  merged = dataclasses.replace(merged, dropout=_common_dropout(terms))
  return merged, Row(path, found.rank, frobenius(x, 2), found.error)


# ----------------------------------------------------------------------------------------------------------------------
# The public functions.


def combine(
  trees: Sequence[Any],
  weights: Sequence[Any],
  method: str = "exact",
  *,
  rank: int | None = None,
  density: float | None = None,
  key: jax.Array | None = None,
  with_report: bool = False,
) -> Any:
  """One adapter out of several on one base: a weighted sum of their updates.

      merge(combine(trees, w)) = base + sum_t w_t delta_t,    delta_t = scale_t A_t B_t

  Methods:
    `"exact"`: that sum to rounding, whatever the ranks, alphas and scalings: the factors side by side, every scale and
      weight folded into B. The rank is the sum of the ranks. One adapter of weight 1 comes back as it is.
    `"svd"`: the best approximation of that sum at a rank; the sum is never formed, unless a variant's update is no
      product of factors (DoRA), which the other methods but `"exact"` take, too.
    `"magnitude"`: of each update the share `density` with the largest magnitudes; then the weighted sum.
    `"ties"`: the same, then for each element the mean over those weighted updates that have the sign of their sum
      (Yadav et al., "TIES-Merging", 2023, arXiv:2306.01708, section 3). With all weights 1 it is the paper's merge;
      its lambda is a common factor of the weights.
    `"dare"`: each element of each update is kept with probability `density` and divided by it; then the weighted sum
      (Yu et al., "Language Models are Super Mario", 2023, arXiv:2311.03099, section 3).

  The last three act on elements, which factors do not have: each update is formed, one leaf at a time (a stacked leaf
  counts slice by slice), and the result is brought back to a rank by a singular value decomposition. What that loses is
  in the report, and can be large: a thinned-out update has no low rank. Leaves trained whole need no rank: their
  differences from the base are combined the same way, without loss.

  Args:
    trees: adapted trees on one base. A leaf that some of them do not adapt has no update there.
    weights: one number for each tree, of any sign; may be traced, with `"exact"`.
    method: one of those above.
    rank: the largest rank of a leaf, for all methods but `"exact"`; by default the largest of the adapters' there.
    density: the share of elements to keep, in (0, 1]; for `"magnitude"`, `"ties"` and `"dare"`.
    key: a random key, for `"dare"`; with it the decompositions are randomised (`low_rank`), in the others, too.
    with_report: whether to return a `Truncation` as well: what each leaf lost by its rank.

  Returns:
    An adapted tree, or `(tree, Truncation)`. Its leaves have alpha = rank (scale 1), the base of the first tree, and
    the adapters' dropout where they agree, none where they do not.

  Raises:
    ValueError: on different numbers of trees and weights, on trees of other structure, roles or bases, on values that
      are not finite, naming the leaf and the tree; on options that the method does not have; with `"exact"` on more
      than one adapter, or another weight than 1, of a variant whose update is no product of factors.
    TypeError: on a weight that is no number.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5))}
    >>> one, two = (jaxlora.adapt(params, jaxlora.LoraConfig(rank=r), jax.random.key(r)) for r in (1, 2))
    >>> jaxlora.combine([one, two], [0.7, -0.2])["kernel"].rank
    3
  """
  trees, weights = list(trees), list(weights)
  plan = _plan(trees, weights, method, rank, density, key)
  nodes, treedef = _aligned(trees, [f"tree {k}" for k in range(len(trees))], "combine")
  new, rows = [], []
  for path, group in nodes.items():
    terms = [Term(node, weight) for node, weight in zip(group, weights, strict=True)]
    if method == "exact" and not with_report:
      new.append(_exact(path, terms))
      continue
    node, row = _to_rank(path, terms, plan)
    new.append(node)
    rows.append(row)
  tree = jax.tree_util.tree_unflatten(treedef, new)
  return (tree, Truncation(tuple(truncated(*row) for row in rows if row is not None))) if with_report else tree


def _plan(trees: list[Any], weights: list[Any], method: Any, rank: Any, density: Any, key: Any) -> Plan:
  if method not in METHODS:
    raise ValueError(f"combine: method is {method!r}, expected one of {', '.join(map(repr, METHODS))}.")
  if not trees or len(trees) != len(weights):
    raise ValueError(
      f"combine: found {len(trees)} trees and {len(weights)} weights; expected one weight for each tree."
    )
  for k, weight in enumerate(weights):
    check_number(weight, f"combine: weight {k}")
  if rank is not None and (method == "exact" or rank_or_energy(rank, None, "combine") is None):
    raise ValueError(f"combine: found rank={rank} with method 'exact', whose rank is the sum of the ranks. Use 'svd'.")
  formed = FORMED.get(method)
  if (density is None) == (formed is not None):
    raise ValueError(
      f"combine: found density={density!r} with method {method!r}; expected the share of elements to keep with"
      f" {', '.join(map(repr, FORMED))}, and None with the others."
    )
  if formed is not None and not (isinstance(density, (int, float)) and 0 < density <= 1):
    raise ValueError(f"combine: density is {density!r}, expected a share in (0, 1], such as 0.5.")
  if formed is not None and formed.random and key is None:
    raise ValueError(f"combine: method {method!r} drops elements at random and needs a key, such as jax.random.key(0).")
  if formed is None and key is not None:
    raise ValueError(f"combine: method {method!r} has nothing random; drop the key.")
  return Plan(method, rank, density or 1.0, None if key is None else typed_key(key, "combine: key"))


def check_number(value: Any, what: str) -> None:
  """Raises unless `value` is one real number, and finite where it is known."""
  number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and not isinstance(value, bool)
  if not number or jnp.ndim(value) != 0 or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
    raise TypeError(f"{what} is {value!r}, expected one real number.")
  if is_concrete(value) and not math.isfinite(float(value)):
    raise ValueError(f"{what} is {value!r}, expected a finite number.")


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
  nodes, treedef = _aligned([tree], ["the tree"], "scale")
  if _is_one(factor):
    return tree
  return jax.tree_util.tree_unflatten(treedef, [_scaled(path, node, factor) for path, (node,) in nodes.items()])


def _scaled(path: str, node: Any, factor: Any) -> Any:
  if isinstance(node, FullWeight):
    return _whole([Term(node, factor)], _sum)
  if not isinstance(node, LoraWeight):
    return node
  check_linear(path, node, "scale")
  if is_plain(node.variant):
    return with_parts(node, {n: x * jnp.asarray(factor, x.dtype) for n, x in parts(node).items() if n in ("b", "b0")})
  if is_concrete(factor):
    return dataclasses.replace(node, alpha=node.alpha * float(factor))
  return _exact(path, [Term(node, factor)])  # the effective factors, which a traced number can multiply


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
  nodes, _ = _aligned([tree], ["the tree"], "norms")
  return {path: _norm(node) for path, (node,) in nodes.items() if is_adapted(node)}


def _norm(node: Any) -> jax.Array:
  if isinstance(node, LoraWeight) and is_linear(node):
    return frobenius(delta_svd(node).s.ravel())
  return frobenius(_dense(node).ravel())


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
  nodes, _ = _aligned([tree, other], ["the first tree", "the second tree"], "cosine")
  return {path: _cosine(*pair) for path, pair in nodes.items() if any(map(is_adapted, pair))}


def _cosine(ours: Any, theirs: Any) -> jax.Array:
  if all(isinstance(node, LoraWeight) and is_linear(node) for node in (ours, theirs)):
    (a, b), (c, d) = ([thin(x, node.roles).astype(wide(x)) for x in node.factors()] for node in (ours, theirs))
    a, b, c, d = (x.astype(_widest([a, b, c, d])) for x in (a, b, c, d))
    inner, lengths = jnp.sum(matmul(a, c.mT) * matmul(b, d.mT)), (_norm(ours), _norm(theirs))
  else:
    x, y = _weighted([Term(ours, 1), Term(theirs, 1)])
    inner, lengths = jnp.sum(x * y), (frobenius(x.ravel()), frobenius(y.ravel()))
  product = (lengths[0] * lengths[1]).astype(inner.dtype)
  return jnp.where(product > 0, jnp.clip(inner / jnp.where(product > 0, product, 1), -1, 1), 0)
