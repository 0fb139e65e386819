"""The introductory article's program with `jaxlora.low_rank`: how good is a low-rank approximation of a data matrix?

    python examples/article.py

It has a stand-in for a pretrained matrix (100 x 100), data X (100 x 10) and binary labels. X is approximated by a
truncated SVD, and a logistic regression is fitted on (approximation Xᵀ)ᵀ; the same regression on X itself is the
reference. The article asks for rank 20 of a matrix with 10 columns. There is no such rank: numpy's slices silently
return rank 10, and the "approximation" is X. Here rank 20 is an error, which the script prints before ranks 10 and
less.

Needs scikit-learn: pip install -e ".[bench]".
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from sklearn.linear_model import LogisticRegression

import jaxlora

ASKED = 20
RANKS = (10, 8, 5, 2, 1)


class Fit(NamedTuple):
  """One regression on an approximation of X."""

  rank: int
  error: float  # of the approximation, relative, in the Frobenius norm
  numbers: int  # in the factors
  accuracy: float  # on the labels
  agreement: float  # share of predictions that equal those of the regression on X itself


def data(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The pretrained stand-in, X, and labels that depend on X."""
  rng = np.random.default_rng(seed)
  pretrained, x = rng.random((100, 100)), rng.random((100, 10))
  scores = (pretrained @ x) @ rng.standard_normal(10) + 2 * x @ rng.standard_normal(10)
  return pretrained, x, (scores > np.median(scores)).astype(int)


def predictions(approximation: np.ndarray, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """The article's classifier: fitted on (approximation Xᵀ)ᵀ, and applied to it."""
  features = (approximation @ x.T).T
  return LogisticRegression(max_iter=10_000).fit(features, labels).predict(features)


def fits(x: np.ndarray, labels: np.ndarray, ranks: tuple[int, ...] = RANKS) -> list[Fit]:
  original = predictions(x, x, labels)
  rows = []
  for rank in ranks:
    found = jaxlora.low_rank(jnp.asarray(x), rank)
    predicted = predictions(np.asarray(found.array()), x, labels)
    numbers = sum(leaf.size for leaf in jax.tree.leaves((found.u, found.s, found.vt)))
    rows.append(
      Fit(rank, float(found.error), numbers, float((predicted == labels).mean()), float((predicted == original).mean()))
    )
  return rows


def refusal(x: np.ndarray, rank: int = ASKED) -> str:
  """The error message for a rank that X cannot have."""
  try:
    jaxlora.low_rank(jnp.asarray(x), rank)
  except ValueError as error:
    return str(error)
  raise AssertionError(f"rank {rank} of a matrix of shape {x.shape} was accepted")


def main() -> None:
  _, x, labels = data()
  print(f"rank {ASKED} of X, {x.shape[0]} x {x.shape[1]}:\n  {refusal(x)}\n")
  print(f"the original, X itself: accuracy {float((predictions(x, x, labels) == labels).mean()):.2f}\n")
  print("rank  error     numbers (X: 1000)  accuracy  agrees with the original")
  for fit in fits(x, labels):
    print(f"{fit.rank:4}  {fit.error:.1e}  {fit.numbers:17}  {fit.accuracy:8.2f}  {fit.agreement:26.2f}")


if __name__ == "__main__":
  main()
