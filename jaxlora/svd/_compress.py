"""`compress`: an adapter at smaller ranks."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax

from jaxlora._base.matrix import frobenius
from jaxlora._base.paths import flatten
from jaxlora._base.patterns import first_match
from jaxlora._base.text import listed
from jaxlora._weight.weight import LoraWeight, is_leaf_node
from jaxlora.svd._ranks import rank_of_energy, rank_or_energy
from jaxlora.svd._truncation import Row, Truncation, report_of, warn_of_flag
from jaxlora.svd._update import delta_svd, lora_leaves, weight_of_svd


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
    with_report: an older spelling of `compress_with_report`.

  Returns:
    The tree.

  Raises:
    ValueError: on neither or both of rank and energy, a leaf that no regex matches, factors that are not finite, a
      variant whose update is no product of factors (DoRA).

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=4), jax.random.key(0))
    >>> jaxlora.compress(tree, rank=2)["kernel"]
    LoraWeight(6x5 io, rank 2, f32)
  """
  if with_report:
    warn_of_flag("compress")
    return compress_with_report(tree, rank=rank, energy=energy)
  return _compressed_tree(tree, rank, energy)[0]


def compress_with_report(
  tree: Any, *, rank: int | Mapping[str, Mapping[str, int]] | None = None, energy: float | None = None
) -> tuple[Any, Truncation]:
  """`compress`, and what each leaf lost by it.

  Args:
    tree, rank, energy: as for `compress`.

  Returns:
    The tree and a `Truncation`, which prints as a table.

  Raises:
    ValueError: as `compress`; under `jit`, where the values that a report needs are not known.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=4), jax.random.key(0))
    >>> smaller, report = jaxlora.compress_with_report(tree, rank=2)
    >>> smaller["kernel"].rank, report.residual
    (2, 0.0)
  """
  new, rows = _compressed_tree(tree, rank, energy)
  return new, report_of(rows)


def _compressed_tree(tree: Any, rank: Any, energy: float | None) -> tuple[Any, list[Row]]:
  weights = dict(lora_leaves(tree, "compress"))
  limits = _limits(rank, energy, list(weights))
  rows: list[Row] = []

  def one(path: str, node: Any) -> Any:
    if path not in weights:
      return node
    new, norm, error = _compressed(node, limits[path], energy)
    rows.append(Row(path, new.rank, norm, error))
    return new

  nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
  return jax.tree_util.tree_unflatten(treedef, [one(*pair) for pair in nodes]), rows


def _limits(rank: Any, energy: Any, paths: Sequence[str]) -> dict[str, int | None]:
  """The largest rank of each leaf; `None` where the energy decides it."""
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
  """The weight at its new rank, the norms of its update's slices, and the relative error of each."""
  found = delta_svd(weight)
  if rank is None:
    rank = rank_of_energy(found.s, energy, max(found.u.shape[-2], found.vt.shape[-1]))
  norm, cut = frobenius(found.s), found.cut(min(rank, found.rank))
  effective = weight.factors()[0].shape[weight.roles.count("s")]
  return weight if rank >= effective else weight_of_svd(weight, cut), norm, cut.error
