"""Singular values and low-rank factors: of any matrix, and of an adapter's own update.

A weight is taken as one matrix per stacked slice, input axes by output axes. The update of an adapter is never formed:
its singular value decomposition comes from QR factors of A and of B, which are as thin as they are.

Reading order: matrices and the checks -> a matrix -> ranks -> the update of a leaf -> whole trees.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
import math
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._adapt import adapted_leaves, check_adapted
from jaxlora._config import first_match
from jaxlora._report import table
from jaxlora._targets import listed
from jaxlora._transform import typed_key
from jaxlora._weight import LoraWeight, factor_shape, is_adapted, wider_dtype

# ----------------------------------------------------------------------------------------------------------------------
# Matrices, and what may not be in them.


def matmul(x: jax.Array, y: jax.Array) -> jax.Array:
  """The product at full precision: accelerators would round its operands."""
  return jnp.matmul(x, y, precision="highest")


def wide(x: Any, *more: Any) -> jnp.dtype:
  """The dtype to decompose in: no narrower than single precision."""
  dtype = jnp.dtype(jnp.float32)
  for array in (x, *more):
    dtype = wider_dtype(dtype, array.dtype)
  return dtype


def axes_of(roles: str, role: str) -> list[int]:
  return [d for d, own in enumerate(roles) if own == role]


def matrices(x: jax.Array, roles: str) -> jax.Array:
  """An array of a weight's shape as one matrix for each stacked slice: `(stack, in, out)`."""
  order = [axes_of(roles, role) for role in "sio"]
  sizes = [math.prod(x.shape[d] for d in axes) for axes in order]
  return jnp.transpose(x, [d for axes in order for d in axes]).reshape(sizes)


def thin(factor: jax.Array, roles: str) -> jax.Array:
  """A factor as one matrix for each stacked slice: `(stack, rank, in)` or `(stack, rank, out)`."""
  stack = roles.count("s")
  return factor.reshape(math.prod(factor.shape[:stack]), factor.shape[stack], -1)


def is_concrete(*arrays: Any) -> bool:
  return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def check_finite(named: Sequence[tuple[str, Any]], what: str) -> None:
  """Raises if a known array has NaN or infinite elements, with the names of all that have."""
  with jax.ensure_compile_time_eval():  # known values can be closed over under jit, too
    broken = [name for name, x in named if is_concrete(x) and not all_finite(x)]
  if broken:
    raise ValueError(
      f"{what}: found NaN or infinite values in {listed(broken)}, expected finite numbers. If they come from training,"
      " it has diverged: go back to an earlier checkpoint."
    )


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


# ----------------------------------------------------------------------------------------------------------------------
# A matrix.


class LowRank(NamedTuple):
  """A truncated singular value decomposition, `x ~ u diag(s) vt`; what `low_rank` returns.

  Attributes:
    u: `(..., m, rank)`, orthonormal columns.
    s: `(..., rank)`, the singular values, falling.
    vt: `(..., rank, n)`, orthonormal rows.
    error: `(...)`, the Frobenius norm of what is left out over that of `x`; 0 for `x = 0`.
  """

  u: jax.Array
  s: jax.Array
  vt: jax.Array
  error: jax.Array

  @property
  def rank(self) -> int:
    return self.s.shape[-1]

  def array(self) -> jax.Array:
    """The approximation as one array of the shape of `x`."""
    return matmul(self.u * self.s[..., None, :], self.vt)

  def factors(self) -> tuple[jax.Array, jax.Array]:
    """`(a, b)` with the rank leading, `x ~ a^T b`, the singular values shared evenly between them."""
    root = jnp.sqrt(self.s)[..., :, None]
    return root * self.u.mT, root * self.vt

  def cut(self, rank: int) -> "LowRank":
    """The first `rank` terms. The error is that of the terms that go; whatever went before is not in it."""
    gone, every = frobenius(self.s[..., rank:]), frobenius(self.s)
    return LowRank(self.u[..., :rank], self.s[..., :rank], self.vt[..., :rank, :], _ratio(gone, every))


def low_rank(
  x: Any,
  rank: int | None = None,
  *,
  energy: float | None = None,
  key: jax.Array | None = None,
  oversample: int = 10,
  iterations: int = 4,
) -> LowRank:
  """The best approximation of a matrix by one of lower rank, as factors, with its error.

      x ~ u diag(s) vt = sum_{k <= rank} s_k u_k v_k^T,    error = sqrt(sum_{k > rank} s_k^2) / ||x||_F

  No matrix of that rank is nearer in the Frobenius or the spectral norm (Eckart and Young, 1936). With a key it is
  the randomised algorithm: the range of x is found from `rank + oversample` random combinations of its columns,
  with `iterations` steps of subspace iteration, and x is decomposed inside that range. Its cost is that of a few
  products with thin matrices; its error is measured on x itself, and a little above the best one.

  Args:
    x: `(..., m, n)`, real; leading axes are a stack of matrices, each decomposed by itself.
    rank: number of terms, from 1 to min(m, n).
    energy: instead of a rank: the share of `||x||_F^2` to keep, in (0, 1]; the smallest rank that does, for every
      matrix of a stack. Needs values, so it cannot be used under `jit`, and the exact decomposition.
    key: a random key, for the randomised algorithm; `None` for the exact one.
    oversample: random combinations beyond `rank`; for the randomised algorithm.
    iterations: steps of subspace iteration; more where the singular values fall slowly.

  Returns:
    A `LowRank`: `u`, `s`, `vt` and `error`; `.array()` is the approximation.

  Raises:
    ValueError: if x is no matrix or not finite, or on a rank that x cannot have: nothing is cut without a word.

  Example:
    >>> import jax.numpy as jnp, jaxlora
    >>> x = jnp.outer(jnp.arange(4.0), jnp.arange(3.0)) + 0.1 * jnp.eye(4, 3)
    >>> approximation = jaxlora.low_rank(x, 1)
    >>> approximation.array().shape, bool(approximation.error < 0.02)
    ((4, 3), True)

  Source: Halko, Martinsson and Tropp, "Finding structure with randomness" (arXiv:0909.4061), algorithms 4.4 and 5.1.
  """
  x = jnp.asarray(x)
  if x.ndim < 2 or 0 in x.shape or not jnp.issubdtype(x.dtype, jnp.floating):
    raise ValueError(f"low_rank: found shape {x.shape}, dtype {x.dtype}; expected a real floating matrix (..., m, n).")
  check_finite([("x", x)], "low_rank")
  x = x.astype(wide(x))
  if energy is not None and key is not None:
    raise ValueError(
      "low_rank: energy needs every singular value, which the randomised algorithm never has; pass a"
      " rank with the key, or energy alone."
    )
  rank = rank_or_energy(rank, energy, "low_rank")
  if rank is None:
    whole = _svd(x)
    return whole.cut(rank_of_energy(whole.s, energy, max(x.shape[-2:])))
  check_rank(rank, x.shape[-2:], "low_rank")
  if key is None:
    return _svd(x).cut(rank)
  return _randomised(x, rank, typed_key(key, "low_rank: key"), oversample, iterations)


@jax.jit  # these are chains of small programs; one of each shape is compiled
def _svd(x: jax.Array) -> LowRank:
  u, s, vt = jnp.linalg.svd(x, full_matrices=False)
  return LowRank(u, s, vt, jnp.zeros(s.shape[:-1], s.dtype))


@functools.partial(jax.jit, static_argnums=(1, 3, 4))
def _randomised(x: jax.Array, rank: int, key: jax.Array, oversample: int, iterations: int) -> LowRank:
  count = min(rank + oversample, *x.shape[-2:])
  q = orthonormal(matmul(x, jax.random.normal(key, (*x.shape[:-2], x.shape[-1], count), x.dtype)))
  for _ in range(iterations):
    q = orthonormal(matmul(x, orthonormal(matmul(x.mT, q))))
  inside = _svd(matmul(q.mT, x)).cut(rank)
  found = inside._replace(u=matmul(q, inside.u))
  return found._replace(error=_ratio(frobenius(x - found.array(), 2), frobenius(x, 2)))


def orthonormal(columns: jax.Array) -> jax.Array:
  """Orthonormal columns that span those given."""
  return jnp.linalg.qr(columns)[0]


def frobenius(x: jax.Array, axes: int = 1) -> jax.Array:
  """The norm over the last axes."""
  return jnp.sqrt(jnp.sum(x * x, axis=tuple(range(-axes, 0))))


def _ratio(part: jax.Array, whole: jax.Array) -> jax.Array:
  return jnp.where(whole > 0, part / jnp.where(whole > 0, whole, 1), 0)


# ----------------------------------------------------------------------------------------------------------------------
# Ranks.


def check_rank(rank: int, shape: Sequence[int], what: str) -> None:
  """Raises on a rank that a matrix cannot have."""
  most = min(shape)
  if rank > most:
    raise ValueError(
      f"{what}: rank {rank} was asked of a {shape[0]} x {shape[1]} matrix, which has {most} singular values. Rank"
      f" {most} keeps all of it and is no approximation; use rank={most} for that, or less for one that is."
    )


def rank_or_energy(rank: Any, energy: Any, what: str) -> int | None:
  """The rank; `None` where the energy says it."""
  if (rank is None) == (energy is None):
    raise ValueError(f"{what}: found rank={rank!r} and energy={energy!r}, expected one of the two.")
  if rank is not None:
    if isinstance(rank, bool) or not isinstance(rank, (int, np.integer)) or rank < 1:
      raise ValueError(f"{what}: rank is {rank!r}, expected a whole number of at least 1.")
    return int(rank)
  if isinstance(energy, bool) or not isinstance(energy, (int, float, np.floating)) or not 0 < energy <= 1:
    raise ValueError(f"{what}: energy is {energy!r}, expected the share to keep, in (0, 1], such as 0.95.")
  return None


def rank_of_energy(s: jax.Array, energy: float | None, side: int) -> int:
  """The smallest rank that keeps the share `energy` of the squares of `s`, (..., k), in every slice; at least 1.

  What is below rounding, `side * eps` of the largest, counts as zero: a share of 1 then means the numerical rank.
  """
  if not is_concrete(s):
    raise ValueError(
      "energy picks the rank from values, which are not known under jit; pass rank=, or call it outside."
    )
  assert energy is not None
  values = np.asarray(s, np.float64).reshape(-1, s.shape[-1])
  values = np.where(values > side * float(jnp.finfo(s.dtype).eps) * values[:, :1], values, 0)
  tails = np.cumsum((values**2)[:, ::-1], axis=1)[:, ::-1]  # what is lost if the terms from k on go
  lost = np.concatenate([tails, np.zeros((len(tails), 1))], axis=1)
  kept = lost <= (1 - energy) * tails[:, :1]
  return max(1, int(np.argmax(kept, axis=1).max()))


def allocate(spectra: Mapping[str, Any], budget: int, *, least: int = 1) -> dict[str, dict[str, int]]:
  """Ranks for each leaf, out of one budget of ranks: the largest shares of explained variance win.

      share_k(leaf) = s_k^2 / sum_j s_j^2;    every leaf has `least` terms, the rest of the budget goes by falling share

  Works on any spectra by leaf: of an adapter's updates (`spectrum`), of the inputs or of the gradients.

  Args:
    spectra: path -> singular values, falling along the last axis; other axes are a stack, which shares one rank, and
      counts by its mean share.
    budget: the sum of the ranks, at least `least` times the number of leaves. Where the spectra hold fewer values in
      all, every leaf gets as many as it has.
    least: the smallest rank of a leaf.

  Returns:
    Path -> `{"rank": r}`, which `LoraConfig(overrides=...)` and `compress(tree, rank=...)` take.

  Raises:
    ValueError: on a budget too small, and on spectra that are empty, negative or not finite, naming the leaf.

  Example:
    >>> import jaxlora
    >>> jaxlora.allocate({"query": [3.0, 2.0, 1.0], "value": [5.0, 0.1, 0.1]}, budget=4)
    {'query': {'rank': 3}, 'value': {'rank': 1}}

  Source: Paischer et al., "One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation"
  (arXiv:2410.07170), section 3.2.
  """
  shares = {path: _shares(path, values) for path, values in spectra.items()}
  if not shares:
    raise ValueError("allocate: spectra is empty; expected path -> singular values, as jaxlora.spectrum returns them.")
  if least < 1 or budget < least * len(shares):
    raise ValueError(
      f"allocate: a budget of {budget} does not give {len(shares)} leaves a rank of {least} each; expected a budget of"
      f" at least {max(least, 1) * len(shares)}, and least >= 1."
    )
  ranks = {path: min(least, len(share)) for path, share in shares.items()}
  rest = [
    (-share[k], order, path)
    for order, (path, share) in enumerate(shares.items())
    for k in range(ranks[path], len(share))
  ]
  for _, _, path in sorted(rest)[: max(0, budget - sum(ranks.values()))]:
    ranks[path] += 1
  return {re.escape(path): {"rank": rank} for path, rank in ranks.items()}


def _shares(path: str, values: Any) -> np.ndarray:
  s = np.asarray(values, np.float64)
  if s.ndim < 1 or s.size == 0 or not np.isfinite(s).all() or (s < 0).any():
    raise ValueError(f"allocate: {path}: found {values!r}, expected finite singular values of at least 0.")
  squares = s.reshape(-1, s.shape[-1]) ** 2
  total = squares.sum(axis=1, keepdims=True)
  return (squares / np.where(total > 0, total, 1)).mean(axis=0)


# ----------------------------------------------------------------------------------------------------------------------
# The update of a leaf.


def delta_factors(weight: LoraWeight) -> tuple[jax.Array, jax.Array]:
  """`(a, b)` with `delta = sum_r a b`: the scale is in `b`."""
  return weight.a, weight.b * jnp.asarray(weight.scale, weight.b.dtype)


@jax.jit
def product_svd(a: jax.Array, b: jax.Array) -> LowRank:
  """The decomposition of `a^T b`, (stack, in, out), for thin `a` (stack, rank, in) and `b` (stack, rank, out).

      a^T = Qa Ra,  b^T = Qb Rb,  Ra Rb^T = U S V^T   =>   a^T b = (Qa U) S (Qb V)^T

  Nothing larger than a factor is formed.
  """
  dtype = wide(a, b)
  (qa, ra), (qb, rb) = (jnp.linalg.qr(factor.astype(dtype).mT) for factor in (a, b))
  core = _svd(matmul(ra, rb.mT))
  return core._replace(u=matmul(qa, core.u), vt=matmul(core.vt, qb.mT))


def delta_svd(weight: LoraWeight) -> LowRank:
  a, b = delta_factors(weight)
  return product_svd(thin(a, weight.roles), thin(b, weight.roles))


def with_delta(weight: LoraWeight, found: LowRank, dtype: Any = None) -> LoraWeight:
  """A plain LoRA weight on the same base whose update is `found`, (stack, in, out), with alpha = rank (scale 1)."""
  shape, rank = tuple(weight.base.shape), found.rank
  dtype = dtype or wider_dtype(weight.a.dtype, weight.b.dtype)
  a, b = found.factors()
  return LoraWeight(
    base=weight.base,
    a=a.reshape(factor_shape(shape, weight.roles, "i", rank)).astype(dtype),
    b=b.reshape(factor_shape(shape, weight.roles, "o", rank)).astype(dtype),
    roles=weight.roles,
    rank=rank,
    alpha=float(rank),
    dropout=weight.dropout,
  )


@dataclasses.dataclass(frozen=True)
class LeafTruncation:
  """How one leaf was brought to a rank.

  Attributes:
    path: its path.
    rank: the rank it has now; `None` for a leaf that is kept whole, or left out.
    norm: the Frobenius norm of the update before.
    residual: the Frobenius norm of what was lost, over `norm`: 0 is exact, 1 is everything.
  """

  path: str
  rank: int | None
  norm: float
  residual: float


@dataclasses.dataclass(frozen=True)
class Truncation:
  """What was lost, leaf by leaf; prints as a table.

  Attributes:
    leaves: the leaves whose update is not zero, or was adapted.
  """

  leaves: tuple[LeafTruncation, ...]

  @property
  def residual(self) -> float:
    """The Frobenius norm of all that was lost, over that of all updates."""
    whole = math.sqrt(sum(leaf.norm**2 for leaf in self.leaves))
    return math.sqrt(sum((leaf.residual * leaf.norm) ** 2 for leaf in self.leaves)) / whole if whole else 0.0

  def __str__(self) -> str:
    rows = [("leaf", "rank", "norm", "residual")]
    rows += [
      (leaf.path, "-" if leaf.rank is None else str(leaf.rank), f"{leaf.norm:.4g}", f"{leaf.residual:.2e}")
      for leaf in self.leaves
    ]
    return "\n".join([table(rows), f"residual of all {self.residual:.2e}"])


def truncated(path: str, rank: int | None, norm: Any, error: Any) -> LeafTruncation:
  """A leaf's row, from the norms and relative errors of its slices."""
  if not is_concrete(norm, error):
    raise ValueError(f"{path}: with_report=True reads values, which are not known under jit; call it outside.")
  norms = np.asarray(norm, np.float64)
  whole, lost = (math.sqrt(float((part**2).sum())) for part in (norms, norms * np.asarray(error, np.float64)))
  return LeafTruncation(path, rank, whole, lost / whole if whole else 0.0)


# ----------------------------------------------------------------------------------------------------------------------
# Whole trees.


def spectrum(tree: Any) -> dict[str, jax.Array]:
  """The singular values of every update, from its thin factors; no update is formed.

  Args:
    tree: what `adapt` returned, trained or not.

  Returns:
    Path -> singular values, falling, `(*stack, rank)`, at most as many as the smaller side of the weight. Leaves
    trained whole are not in it.

  Raises:
    ValueError: if the tree has no adapted weight or is a half; where factors are not finite, naming the leaves.

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


def lora_leaves(tree: Any, what: str) -> list[tuple[str, LoraWeight]]:
  """The low-rank leaves of a whole tree, with finite factors."""
  check_adapted(tree, what)
  leaves = [(path, node) for path, node in adapted_leaves(tree) if isinstance(node, LoraWeight)]
  check_finite([(f"{path} ({n})", x) for path, w in leaves for n, x in (("a", w.a), ("b", w.b))], what)
  return leaves


def compress(
  tree: Any,
  *,
  rank: int | Mapping[str, Mapping[str, int]] | None = None,
  energy: float | None = None,
  with_report: bool = False,
) -> Any:
  """Brings every update to a lower rank, by the best approximation there is; no update is formed.

      a^T b  ->  sum_{k <= rank} s_k u_k v_k^T,    as factors sqrt(s) u and sqrt(s) v, with alpha = rank (scale 1)

  Args:
    tree: what `adapt` returned, trained. Leaves trained whole stay as they are.
    rank: the largest rank of a leaf; or path regex -> `{"rank": r}` for each, as `allocate` returns it. A leaf of
      no higher rank stays as it is.
    energy: instead of a rank: the share of each update's squared Frobenius norm to keep, in (0, 1].
    with_report: whether to return a `Truncation` as well.

  Returns:
    The tree, or `(tree, Truncation)` with what each leaf lost.

  Raises:
    ValueError: on neither or both of rank and energy, a leaf that no regex matches, factors that are not finite.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=4), jax.random.key(0))
    >>> smaller, report = jaxlora.compress(tree, rank=2, with_report=True)
    >>> smaller["kernel"].rank, report.residual
    (2, 0.0)
  """
  weights = dict(lora_leaves(tree, "compress"))
  limits = _limits(rank, energy, list(weights))
  rows: list[LeafTruncation] = []

  def one(path: str, node: Any) -> Any:
    if path not in weights:
      return node
    new, norm, error = _compressed(node, limits[path], energy)
    if with_report:
      rows.append(truncated(path, new.rank, norm, error))
    return new

  nodes, treedef = _paths.flatten(tree, is_leaf=is_adapted)
  new = jax.tree_util.tree_unflatten(treedef, [one(*pair) for pair in nodes])
  return (new, Truncation(tuple(rows))) if with_report else new


def _limits(rank: Any, energy: Any, paths: Sequence[str]) -> dict[str, int | None]:
  """The largest rank of each leaf; `None` where the energy says it."""
  if not isinstance(rank, Mapping):
    return dict.fromkeys(paths, rank_or_energy(rank, energy, "compress"))
  fields = {path: first_match(rank, path) for path in paths}
  missing = [path for path, found in fields.items() if not isinstance(found, Mapping) or "rank" not in found]
  if missing:
    raise ValueError(
      f"compress: rank says nothing of {listed(missing)}; expected a regex for every adapted leaf and {{'rank': r}} for"
      " each, as jaxlora.allocate returns them."
    )
  return {path: rank_or_energy(found["rank"], energy, f"compress: {path}") for path, found in fields.items() if found}


def _compressed(weight: LoraWeight, rank: int | None, energy: float | None) -> tuple[LoraWeight, jax.Array, jax.Array]:
  """The weight at its new rank, the norms of its slices before, and the share of them that is lost."""
  found = delta_svd(weight)
  if rank is None:
    rank = rank_of_energy(found.s, energy, max(found.u.shape[-2], found.vt.shape[-1]))
  norm, cut = frobenius(found.s), found.cut(min(rank, found.rank))
  return weight if rank >= weight.rank else with_delta(weight, cut), norm, cut.error
