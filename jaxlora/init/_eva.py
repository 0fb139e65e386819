"""EVA: A along the directions in which the inputs vary most."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.checks import check_finite
from jaxlora._base.dtypes import wide
from jaxlora._base.keys import leaf_key
from jaxlora._base.matrix import matmul, svd
from jaxlora._base.patterns import first_match
from jaxlora._weight.matrices import thin
from jaxlora._weight.weight import LoraWeight
from jaxlora.init._options import Options, check_missing, orthonormal_rows, random_rows, rows_shape, side, without_start
from jaxlora.init._sketch import Seen, sketcher
from jaxlora.svd._ranks import allocate


def eva(tree: Any, weights: dict[str, LoraWeight], options: Options) -> dict[str, LoraWeight]:
  most = {path: _largest_rank(weight, options.rho) for path, weight in weights.items()}
  counts = {path: min(most[path] + options.oversample, side(weight, "i")) for path, weight in weights.items()}
  seen = Seen()
  sketch = jax.jit(sketcher(options.fn, seen))
  found: dict[str, Directions] = {}
  number = -1
  for number, batch in enumerate(options.batches):
    of_batch = _batch_inputs(sketch, tree, weights, counts, batch, jax.random.fold_in(options.key, number), options)
    missing = {path: seen.reasons.get(path, "never multiplied by") for path in weights if path not in seen.inputs}
    check_missing(missing, options, "no product shows the input")
    for path in seen.inputs:
      found[path] = _joined(found[path], of_batch[path]) if path in found else of_batch[path]
  if number < 0:
    raise ValueError("init_from_data: batches is empty; expected at least one batch.")
  check_finite([(f"the inputs of {path}", directions.s) for path, directions in found.items()], "init_from_data")
  ranks = _allocated_ranks(weights, {path: np.asarray(found[path].s)[:, : most[path]] for path in found}, options.rho)
  return {path: _with_inputs(weights[path], found[path].vt[:, :rank], rank) for path, rank in ranks.items()}


class Directions(NamedTuple):
  """The principal directions of a weight's inputs X ~ U diag(s) vt, without U: s (stack, k), vt (stack, k, in)."""

  s: jax.Array
  vt: jax.Array


def _largest_rank(weight: LoraWeight, rho: float) -> int:
  return min(max(weight.rank, int(rho * weight.rank)), side(weight, "i"), side(weight, "o"))


def _batch_inputs(
  sketch: Callable[..., dict[str, jax.Array]],
  tree: Any,
  weights: dict[str, LoraWeight],
  counts: dict[str, int],
  batch: Any,
  key: jax.Array,
  options: Options,
) -> dict[str, Directions]:
  """The directions of one batch's inputs for every weight, by subspace iteration."""
  a = {p: random_rows(leaf_key(key, p), rows_shape(w, "i", counts[p]), w.a) for p, w in weights.items()}
  q: dict[str, jax.Array] = {}
  for _ in range(1 + options.iterations):
    sketched = sketch(a, tree, batch)
    q = {p: orthonormal_rows(thin(y, weights[p].roles).astype(wide(y))) for p, y in sketched.items()}
    a = {p: x.reshape(a[p].shape).astype(a[p].dtype) for p, x in q.items()}
  inside = sketch(a, tree, batch)  # Q (X^T X), for the Gram matrix within the rows of Q
  return {p: _directions_within(q[p], thin(y, weights[p].roles).astype(wide(y))) for p, y in inside.items()}


@jax.jit
def _directions_within(q: jax.Array, moved: jax.Array) -> Directions:
  """The directions within orthonormal rows q, from `moved = q (X^T X)`:  moved q^T = U S^2 U^T,  V^T = U^T q."""
  core = matmul(moved, q.mT)
  squares, u = jnp.linalg.eigh((core + core.mT) / 2)
  return Directions(jnp.sqrt(jnp.maximum(squares, 0))[..., ::-1], matmul(u[..., ::-1].mT, q))


@jax.jit
def _joined(before: Directions, more: Directions) -> Directions:
  """The directions of two sets of inputs together, cut to as many as each has."""
  rows = jnp.concatenate([part.s[..., None] * part.vt for part in (before, more)], axis=-2)
  found = svd(rows).cut(before.s.shape[-1])
  return Directions(found.s, found.vt)


def _allocated_ranks(weights: dict[str, LoraWeight], spectra: dict[str, np.ndarray], rho: float) -> dict[str, int]:
  """The rank of each leaf: its own, or with `rho > 1` its share of the sum of ranks, by explained variance."""
  own = {path: weights[path].rank for path in spectra}
  if rho == 1 or not own:
    return own
  overrides = allocate(spectra, sum(own.values()))
  dealt = {path: first_match(overrides, path) for path in own}
  return {path: fields["rank"] for path, fields in dealt.items() if fields is not None}


def _with_inputs(weight: LoraWeight, directions: jax.Array, rank: int) -> LoraWeight:
  """The weight with these directions as A, B zero, and its scale unchanged."""
  share = rank / weight.rank
  return dataclasses.replace(
    weight,
    a=directions.reshape(rows_shape(weight, "i", rank)).astype(weight.a.dtype),
    b=jnp.zeros(rows_shape(weight, "o", rank), weight.b.dtype),
    rank=rank,
    alpha=weight.alpha * (share if weight.scaling == "standard" else share**0.5),
    extra=without_start(weight),
  )
