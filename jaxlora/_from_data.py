"""`init_from_data`: factors that start from what flows through the model, or back through it.

Neither method holds an input, a gradient or a second moment of a weight: both see them through thin products alone, a
few rows beyond the rank, batch by batch. Reading order: the public function -> EVA -> LoRA-GA.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._adapt import is_plain, started
from jaxlora._axes import factor_shape
from jaxlora._capture import Seen, sketcher
from jaxlora._config import first_match
from jaxlora._decompose import allocate, check_finite, delta_svd, is_concrete, lora_leaves
from jaxlora._initializers import leaf_key
from jaxlora._matrix import frobenius, matmul, orthonormal, svd, thin, wide
from jaxlora._targets import listed
from jaxlora._transform import typed_key, wrap
from jaxlora._variants import fan
from jaxlora._weight import LoraWeight, is_adapted

METHODS = ("eva", "lora_ga")
ON_MISSING = ("error", "keep")
_ZERO = 1e-3  # an update below this share of its factors' norms is a start, not a training


class _Asked(NamedTuple):
  """What `init_from_data` was asked for, checked."""

  fn: Callable[..., Any]
  batches: Any
  key: jax.Array
  rho: float
  gamma: float
  oversample: int
  iterations: int
  keeps: bool


def init_from_data(
  tree: Any,
  fn: Callable[[Any, Any], Any],
  batches: Iterable[Any],
  key: jax.Array,
  *,
  method: str = "eva",
  rho: float = 1.0,
  gamma: float = 16.0,
  oversample: int = 10,
  iterations: int = 2,
  on_missing: str = "error",
) -> Any:
  """Starts the factors of an adapted tree from data; the adapted model stays the base.

  Methods:
    `"eva"`: A is the directions in which the inputs of a weight vary most, B is zero.

          X = U S V^T over all inputs X of the weight;    A = V[:, :rank]^T

      The decomposition is incremental: that of each batch, by subspace iteration inside the forward pass, is merged
      into that of those before it. With `rho > 1` the ranks are dealt out anew by explained variance, up to `rho` times
      a leaf's own, their sum and every scale unchanged. (Paischer et al., "One Initialization to Rule them All:
      Fine-tuning via Explained Variance Adaptation", 2024, arXiv:2410.07170, section 3. The inputs are not centred.)
    `"lora_ga"`: the first step of the adapter is, at its rank, that of full fine-tuning.

          dL/dW = U S V^T (in x out);  A = c U[:, :rank]^T,  B = c V[:, rank : 2 rank]^T,  c = out^(1/4) / sqrt(gamma)

      A B is taken off again by frozen starting factors. The gradient is never formed: its randomised decomposition
      needs it times thin matrices, which is what the gradients of A and of B are. (Wang et al., "LoRA-GA: Low-Rank
      Adaptation with Gradient Approximation", 2024, arXiv:2407.05000, algorithm 1.)

  Args:
    tree: what `adapt` returned, not trained yet: any init, and a variant whose factors are A and B themselves.
    fn: `(params, batch) -> output`, as one would write it for plain parameters; for `"lora_ga"` the scalar loss.
    batches: batches of one structure, such as a list of arrays. `"eva"` goes through them once; `"lora_ga"`
      `2 + 2 * iterations` times, so that it takes no iterator.
    key: a random key, typed or raw uint32.
    method: `"eva"` or `"lora_ga"`.
    rho: for `"eva"`: the largest rank of a leaf, over its own; 1 leaves the ranks as they are.
    gamma: for `"lora_ga"`: the paper's gamma, which makes the start smaller.
    oversample: rows of a sketch beyond the rank that is looked for.
    iterations: steps of subspace iteration; more are nearer to the exact decomposition where the spectrum is flat.
    on_missing: what to do with leaves whose input no product shows (`"eva"`: lookups, weights that are materialised,
      loops of unknown length), or whose gradient is zero (`"lora_ga"`): `"error"`, or `"keep"` their start.

  Returns:
    The tree with new factors; with `rho > 1` also new ranks, and alphas that leave the scales as they are.

  Raises:
    ValueError: on an unknown option, without a batch, on a tree that is trained, on a leaf that the method cannot
      start, naming it with the reason; where inputs or gradients are not finite.
    TypeError: if `key` is no random key, or `fn` no function.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> fn = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
    >>> params = {"up": jnp.ones((6, 8)), "down": jnp.ones((8, 3))}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=".*"), jax.random.key(0))
    >>> batches = [jax.random.normal(jax.random.key(k), (16, 6)) for k in range(3)]
    >>> tree = jaxlora.init_from_data(tree, fn, batches, jax.random.key(1))
    >>> bool(jnp.allclose(tree["up"].a @ tree["up"].a.T, jnp.eye(2), atol=1e-5))
    True
  """
  if method not in METHODS:
    raise ValueError(f"init_from_data: method is {method!r}, expected one of {', '.join(map(repr, METHODS))}.")
  if on_missing not in ON_MISSING:
    raise ValueError(f"init_from_data: on_missing is {on_missing!r}, expected 'error' or 'keep'.")
  if not callable(fn):
    raise TypeError(f"init_from_data: fn is {fn!r}, expected a function of (params, batch).")
  if not rho >= 1 or not gamma > 0 or oversample < 0 or iterations < 0:
    raise ValueError(
      f"init_from_data: found rho={rho}, gamma={gamma}, oversample={oversample}, iterations={iterations}; expected"
      " rho >= 1, gamma > 0, and neither of the others below 0."
    )
  if method == "lora_ga" and isinstance(batches, Iterator):
    raise ValueError(
      f"init_from_data: batches is a {type(batches).__name__}, which can be gone through once; 'lora_ga' does so"
      f" {2 + 2 * iterations} times. Pass a list."
    )
  key = typed_key(key, "init_from_data: key")
  asked = _Asked(fn, batches, key, rho, gamma, oversample, iterations, on_missing == "keep")
  weights = dict(lora_leaves(tree, "init_from_data", linear=False))
  for path, weight in weights.items():
    _check_fresh(path, weight)
  new = (_eva if method == "eva" else _lora_ga)(tree, weights, asked)
  nodes, treedef = _paths.flatten(tree, is_leaf=is_adapted)
  return jax.tree_util.tree_unflatten(treedef, [new.get(path, node) for path, node in nodes])


def _check_fresh(path: str, weight: LoraWeight) -> None:
  if not is_plain(weight.variant):
    raise ValueError(
      f"init_from_data: {path} is of variant {weight.variant!r}, whose factors are not A and B themselves; expected"
      " 'lora', 'lora_fa' or 'dora'."
    )
  if not is_concrete(*jax.tree.leaves(weight)):
    raise ValueError(f"init_from_data: {path} is traced; call init_from_data outside jit.")
  norms = [frobenius(thin(x, weight.roles).ravel()) for x in weight.factors()]
  if float(frobenius(delta_svd(weight).s.ravel())) > _ZERO * float(norms[0] * norms[1]):
    raise ValueError(
      f"init_from_data: {path} has an update already; a new start would throw away what it learned. Start from a fresh"
      " tree (jaxlora.adapt)."
    )


def _rows(weight: LoraWeight, own: str, count: int) -> tuple[int, ...]:
  """The shape of a factor of `count` rows."""
  return factor_shape(tuple(weight.base.shape), weight.roles, own, count)


def _side(weight: LoraWeight, own: str) -> int:
  return fan(tuple(weight.base.shape), weight.roles, own)


@jax.jit
def _orthonormal_rows(x: jax.Array) -> jax.Array:
  return orthonormal(x.mT).mT


def _random_rows(key: jax.Array, shape: tuple[int, ...], like: Any) -> jax.Array:
  return jax.random.normal(key, shape, wide(like)).astype(like.dtype)


def _without(missing: dict[str, str], asked: _Asked, what: str) -> None:
  if missing and not asked.keeps:
    reasons = [f"{path} ({reason})" for path, reason in missing.items()]
    raise ValueError(
      f"init_from_data: {what} for {listed(reasons)}. Leave these leaves at their start with on_missing='keep', or"
      " adapt without them."
    )


# ----------------------------------------------------------------------------------------------------------------------
# EVA.


def _eva(tree: Any, weights: dict[str, LoraWeight], asked: _Asked) -> dict[str, LoraWeight]:
  most = {path: _most(weight, asked.rho) for path, weight in weights.items()}
  counts = {path: min(most[path] + asked.oversample, _side(weight, "i")) for path, weight in weights.items()}
  seen = Seen()
  sketch = jax.jit(sketcher(asked.fn, seen))
  found: dict[str, Directions] = {}
  number = -1
  for number, batch in enumerate(asked.batches):
    of_batch = _batch_inputs(sketch, tree, weights, counts, batch, jax.random.fold_in(asked.key, number), asked)
    missing = {path: seen.reasons.get(path, "never multiplied by") for path in weights if path not in seen.inputs}
    _without(missing, asked, "no product shows the input")
    for path in seen.inputs:
      found[path] = _merged(found[path], of_batch[path]) if path in found else of_batch[path]
  if number < 0:
    raise ValueError("init_from_data: batches is empty; expected at least one batch.")
  check_finite([(f"the inputs of {path}", directions.s) for path, directions in found.items()], "init_from_data")
  ranks = _dealt_out(weights, {path: np.asarray(found[path].s)[:, : most[path]] for path in found}, asked.rho)
  return {path: _with_inputs(weights[path], found[path].vt[:, :rank], rank) for path, rank in ranks.items()}


class Directions(NamedTuple):
  """The inputs of a weight as far as they are known, X ~ U diag(s) vt without U: s (stack, k), vt (stack, k, in)."""

  s: jax.Array
  vt: jax.Array


def _most(weight: LoraWeight, rho: float) -> int:
  return min(max(weight.rank, int(rho * weight.rank)), _side(weight, "i"), _side(weight, "o"))


def _batch_inputs(
  sketch: Callable[..., dict[str, jax.Array]],
  tree: Any,
  weights: dict[str, LoraWeight],
  counts: dict[str, int],
  batch: Any,
  key: jax.Array,
  asked: _Asked,
) -> dict[str, Directions]:
  """The directions of one batch's inputs for every weight, by subspace iteration."""
  a = {p: _random_rows(leaf_key(key, p), _rows(w, "i", counts[p]), w.a) for p, w in weights.items()}
  q: dict[str, jax.Array] = {}
  for _ in range(1 + asked.iterations):
    sketched = sketch(a, tree, batch)
    q = {p: _orthonormal_rows(thin(y, weights[p].roles).astype(wide(y))) for p, y in sketched.items()}
    a = {p: x.reshape(a[p].shape).astype(a[p].dtype) for p, x in q.items()}
  inside = sketch(a, tree, batch)  # Q (X^T X): what X^T X is inside the rows of Q
  return {p: _inside(q[p], thin(y, weights[p].roles).astype(wide(y))) for p, y in inside.items()}


@jax.jit
def _inside(q: jax.Array, moved: jax.Array) -> Directions:
  """From `moved = q (X^T X)`, for orthonormal rows q:  moved q^T = U S^2 U^T,  V^T = U^T q."""
  core = matmul(moved, q.mT)
  squares, u = jnp.linalg.eigh((core + core.mT) / 2)
  return Directions(jnp.sqrt(jnp.maximum(squares, 0))[..., ::-1], matmul(u[..., ::-1].mT, q))


@jax.jit
def _merged(before: Directions, more: Directions) -> Directions:
  """The directions of both together, cut to as many."""
  rows = jnp.concatenate([part.s[..., None] * part.vt for part in (before, more)], axis=-2)
  found = svd(rows).cut(before.s.shape[-1])
  return Directions(found.s, found.vt)


def _dealt_out(weights: dict[str, LoraWeight], spectra: dict[str, np.ndarray], rho: float) -> dict[str, int]:
  """The rank of each leaf: its own, or its share of their sum."""
  own = {path: weights[path].rank for path in spectra}
  if rho == 1 or not own:
    return own
  overrides = allocate(spectra, sum(own.values()))
  dealt = {path: first_match(overrides, path) for path in own}
  return {path: fields["rank"] for path, fields in dealt.items() if fields is not None}


def _with_inputs(weight: LoraWeight, directions: jax.Array, rank: int) -> LoraWeight:
  """The weight with these directions for A, zero for B, and the scale that it had."""
  share = rank / weight.rank
  return dataclasses.replace(
    weight,
    a=directions.reshape(_rows(weight, "i", rank)).astype(weight.a.dtype),
    b=jnp.zeros(_rows(weight, "o", rank), weight.b.dtype),
    rank=rank,
    alpha=weight.alpha * (share if weight.scaling == "standard" else share**0.5),
    extra=_without_start(weight),
  )


def _without_start(weight: LoraWeight) -> dict[str, Any]:
  return {name: part for name, part in weight.extra.items() if name not in ("a0", "b0")}


# ----------------------------------------------------------------------------------------------------------------------
# LoRA-GA.


def _lora_ga(tree: Any, weights: dict[str, LoraWeight], asked: _Asked) -> dict[str, LoraWeight]:
  for path, weight in weights.items():
    sides = _side(weight, "i"), _side(weight, "o")
    if 2 * weight.rank > min(sides):
      raise ValueError(
        f"init_from_data: {path}: 'lora_ga' takes twice the rank, {2 * weight.rank}, of singular vectors of a"
        f" {sides[0]} x {sides[1]} gradient; use a rank of at most {min(sides) // 2} for it."
      )
  counts = {p: min(2 * w.rank + asked.oversample, _side(w, "i"), _side(w, "o")) for p, w in weights.items()}
  rows = {p: _random_rows(leaf_key(asked.key, p), _rows(w, "o", counts[p]), w.b) for p, w in weights.items()}
  gradient = _gradient_products(tree, weights, counts, asked)
  q: dict[str, jax.Array] = {}
  z: dict[str, jax.Array] = {}
  for _ in range(1 + asked.iterations):
    q = {p: _orthonormal_rows(x) for p, x in gradient("a", rows).items()}  # rows of G^T seen through B
    z = gradient("b", {p: x.reshape(_rows(weights[p], "i", counts[p])) for p, x in q.items()})  # Q G
    rows = {p: _orthonormal_rows(x).reshape(_rows(weights[p], "o", counts[p])) for p, x in z.items()}
  check_finite([(f"the gradient of {path}", x) for path, x in z.items()], "init_from_data")
  missing = {path: "zero" for path, x in z.items() if not bool(x.any())}
  _without(missing, asked, "the gradient is of no use")
  return {p: _with_gradient(w, q[p], z[p], asked.gamma) for p, w in weights.items() if p not in missing}


def loss_of_factors(fn: Callable[..., Any], treedef: Any, paths: list[str]) -> Callable[..., jax.Array]:
  """The loss as a function of factors of scale 1, by path, the nodes of the tree, and a batch."""
  apply = wrap(fn, on_materialize="ignore")

  def loss(factors: dict[str, dict[str, jax.Array]], nodes: list[Any], batch: Any) -> jax.Array:
    def with_factors(path: str, node: Any) -> Any:
      if not isinstance(node, LoraWeight):
        return node
      a, b = factors[path]["a"], factors[path]["b"]
      count = a.shape[node.roles.count("s")]
      return LoraWeight(node.base, a, b, roles=node.roles, rank=count, alpha=float(count))

    full = [with_factors(*pair) for pair in zip(paths, nodes, strict=True)]
    return apply(jax.tree_util.tree_unflatten(treedef, full), batch)

  return loss


def _gradient_products(
  tree: Any, weights: dict[str, LoraWeight], counts: dict[str, int], asked: _Asked
) -> Callable[[str, dict[str, jax.Array]], dict[str, jax.Array]]:
  """A function from rows, over the side that `own` does not hold, to their products with every gradient.

  With A zero the gradient of A is `B G^T`, with B zero that of B is `A G`, for the gradient G of the weight, (in, out).
  """
  flat, treedef = _paths.flatten(tree, is_leaf=is_adapted)
  loss = loss_of_factors(asked.fn, treedef, [path for path, _ in flat])
  nodes = [node for _, node in flat]
  gradient = jax.jit(jax.grad(loss))

  def products(own: str, rows: dict[str, jax.Array]) -> dict[str, jax.Array]:
    other, factors = "b" if own == "a" else "a", {}
    for path, weight in weights.items():
      zero = jnp.zeros(_rows(weight, "i" if own == "a" else "o", counts[path]), getattr(weight, own).dtype)
      factors[path] = {own: zero, other: rows[path].astype(getattr(weight, other).dtype)}
    total: dict[str, jax.Array] = {}
    for batch in asked.batches:
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
  size = _side(weight, "o") ** 0.25 / gamma**0.5
  bare = dataclasses.replace(weight, extra=_without_start(weight))
  return started(bare, size * left[:, :rank], size * inside.vt[:, rank : 2 * rank])
