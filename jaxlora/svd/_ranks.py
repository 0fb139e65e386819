"""Ranks: checks, the rank that keeps a share of the energy, and a budget of ranks allocated over leaves."""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.checks import is_known


def check_rank(rank: int, shape: Sequence[int], what: str) -> None:
  """Raises on a rank that a matrix cannot have."""
  most = min(shape)
  if rank > most:
    raise ValueError(
      f"{what}: rank {rank} was asked of a {shape[0]} x {shape[1]} matrix, which has {most} singular values. Rank"
      f" {most} keeps all of it and is no approximation; use rank={most} for that, or less for one that is."
    )


def rank_or_energy(rank: Any, energy: Any, what: str) -> int | None:
  """The rank, checked; `None` where an energy is given instead."""
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
  if not is_known(s):
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
