"""Adapters of one small base, banks of them, and each row with its adapter alone: what a bank is compared with."""

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from tests import helpers

WAYS = ("gathered", "row by row", "wide")
IDS = (2, -1, 0, 1, 2, 0)


def params_of(dtype=jnp.float32):
  return {
    "up": {"kernel": helpers.array(1, (6, 8), dtype), "bias": helpers.array(2, (8,), dtype)},
    "down": {"kernel": helpers.array(3, (8, 5), dtype), "bias": helpers.array(4, (5,), dtype)},
  }


def mlp(params, x):
  hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][(None,) * (x.ndim - 1)])
  return hidden @ params["down"]["kernel"] + params["down"]["bias"][(None,) * (x.ndim - 1)]


def adapter(seed, rank=2, alpha=3.0, targets=".*kernel", train=None, params=None, **more):
  params = params_of() if params is None else params
  return helpers.adapted(params, seed, seed=seed, rank=rank, alpha=alpha, targets=targets, train=train, **more)


def adapters(dtype=jnp.float32):
  """Of different ranks, scales and leaves."""
  params = params_of(dtype)
  return [
    adapter(10, 1, 3, params=params),
    adapter(20, 2, 5, targets="up/kernel", params=params),
    adapter(30, 3, 7, train=["down/bias"], scaling="rslora", params=params),
  ]


def bank_of(trees, **options):
  return jaxlora.stack({f"adapter {k}": tree for k, tree in enumerate(trees)}, **options)


def data(rows=6, dtype=jnp.float32):
  return helpers.array(5, (rows, 4, 6), dtype)


def one_by_one(fn, base, trees, ids, *args):
  """Each row with its adapter alone."""
  rows = [
    jaxlora.wrap(fn)(trees[k] if k >= 0 else base, *(arg[row : row + 1] for arg in args)) for row, k in enumerate(ids)
  ]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def close(got, want, tolerance=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def forms(bank):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), bank.factors)


def other_base():
  params = params_of()
  params["up"]["kernel"] = jnp.ones((7, 8))
  return params
