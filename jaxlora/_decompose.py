"""Singular values and low-rank factors: of any matrix, and of an adapter's own update.

The update of an adapter is never formed:
its singular value decomposition comes from QR factors of A and of B, which are as thin as they are.

Reading order: checks -> a matrix -> ranks -> the update of a leaf -> whole trees.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora import _paths
from jaxlora._adapt import adapted_leaves, check_adapted
from jaxlora._axes import factor_shape
from jaxlora._config import first_match
from jaxlora._matrix import LowRank, axes_of, frobenius, product_svd, randomised, svd, thin, wide
from jaxlora._report import table
from jaxlora._targets import listed
from jaxlora._transform import typed_key
from jaxlora._weight import LoraWeight, is_adapted, parts, wider_dtype

# ----------------------------------------------------------------------------------------------------------------------
# What may not be in a matrix.


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
    whole = svd(x)
    return whole.cut(rank_of_energy(whole.s, energy, max(x.shape[-2:])))
  check_rank(rank, x.shape[-2:], "low_rank")
  if key is None:
    return svd(x).cut(rank)
  return randomised(x, rank, typed_key(key, "low_rank: key"), oversample, iterations)


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
  values: np.ndarray = np.asarray(s, np.float64).reshape(-1, s.shape[-1])
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


def is_linear(weight: LoraWeight) -> bool:
  """Whether the adapted weight is the base plus a product of factors; DoRA's gain is none."""
  return weight.kind.gain is None


def check_linear(path: str, weight: LoraWeight, what: str) -> None:
  if not is_linear(weight):
    raise ValueError(
      f"{what}: {path} is of variant {weight.variant!r}, which rescales the whole weight: its update is no product of"
      " thin factors. jaxlora.combine([tree], [1], 'svd', rank=...) gives the best plain LoRA for it, with what that"
      " loses; or go on from the merged parameters (jaxlora.merge)."
    )


def delta_svd(weight: LoraWeight) -> LowRank:
  """The decomposition of a weight's update, (stack, in, out); it must be linear."""
  a, b = weight.factors()
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


def lora_leaves(tree: Any, what: str, linear: bool = True) -> list[tuple[str, LoraWeight]]:
  """The low-rank leaves of a whole tree, with finite factors and, unless it does not matter, linear updates."""
  check_adapted(tree, what)
  leaves = [(path, node) for path, node in adapted_leaves(tree) if isinstance(node, LoraWeight)]
  check_finite([(f"{path} ({n})", x) for path, w in leaves for n, x in parts(w).items() if n != "base"], what)
  for path, weight in leaves if linear else ():
    check_linear(path, weight, what)
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
    rank: the largest rank of a leaf; or path regex -> `{"rank": r}` for each, as `allocate` returns it. A leaf whose
      factors have no more terms stays as it is; others become plain LoRA, whatever their variant or initialiser.
    energy: instead of a rank: the share of each update's squared Frobenius norm to keep, in (0, 1].
    with_report: whether to return a `Truncation` as well.

  Returns:
    The tree, or `(tree, Truncation)` with what each leaf lost.

  Raises:
    ValueError: on neither or both of rank and energy, a leaf that no regex matches, factors that are not finite, a
      variant whose update is no product of factors (DoRA).

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
  effective = weight.factors()[0].shape[weight.roles.count("s")]
  return weight if rank >= effective else with_delta(weight, cut), norm, cut.error
