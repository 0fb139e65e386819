"""`combine`: one adapter out of several on one base."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from jaxlora._base.checks import check_number
from jaxlora._base.keys import typed_key
from jaxlora.arithmetic._aligned import aligned
from jaxlora.arithmetic._formed import FORMED, METHODS, Plan, to_rank
from jaxlora.arithmetic._sums import Term, exact
from jaxlora.svd._ranks import rank_or_energy
from jaxlora.svd._truncation import Row, Truncation, report_of, warn_of_flag


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
    `"exact"`: that sum to rounding, whatever the ranks, alphas and scalings: the factors concatenated, every scale and
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
  counts slice by slice), and the result is brought back to a rank by a singular value decomposition. What that loses
  can be large, as a thinned-out update has no low rank; `combine_with_report` tells. Leaves trained whole need no rank:
  their differences from the base are combined the same way, without loss.

  Args:
    trees: adapted trees on one base. A leaf that some of them do not adapt has no update there.
    weights: one number for each tree, of any sign; may be traced, with `"exact"`.
    method: one of those above.
    rank: the largest rank of a leaf, for all methods but `"exact"`; by default the largest of the adapters' there.
    density: the share of elements to keep, in (0, 1]; for `"magnitude"`, `"ties"` and `"dare"`.
    key: a random key, for `"dare"`; with it the decompositions are randomised (`low_rank`), in the others, too.
    with_report: an older spelling of `combine_with_report`.

  Returns:
    An adapted tree. Its leaves have alpha = rank (scale 1), the base of the first tree, and
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
  if with_report:
    warn_of_flag("combine")
    return combine_with_report(trees, weights, method, rank=rank, density=density, key=key)
  plan = _plan(trees, weights, method, rank, density, key)

  def one(path: str, terms: list[Term]) -> tuple[Any, Row | None]:
    return (exact(path, terms), None) if method == "exact" else to_rank(path, terms, plan)

  return _combined(trees, weights, one)[0]


def combine_with_report(
  trees: Sequence[Any],
  weights: Sequence[Any],
  method: str = "exact",
  *,
  rank: int | None = None,
  density: float | None = None,
  key: jax.Array | None = None,
) -> tuple[Any, Truncation]:
  """`combine`, and what each leaf lost by its rank.

  Args:
    trees, weights, method, rank, density, key: as for `combine`.

  Returns:
    The tree and a `Truncation`, which prints as a table.

  Raises:
    ValueError, TypeError: as `combine`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5))}
    >>> one, two = (jaxlora.adapt(params, jaxlora.LoraConfig(rank=r), jax.random.key(r)) for r in (1, 2))
    >>> tree, report = jaxlora.combine_with_report([one, two], [0.7, -0.2], "svd", rank=2)
    >>> tree["kernel"].rank, report.residual
    (2, 0.0)
  """
  plan = _plan(trees, weights, method, rank, density, key)
  tree, rows = _combined(trees, weights, lambda path, terms: to_rank(path, terms, plan))
  return tree, report_of(rows)


def _combined(
  trees: Sequence[Any], weights: Sequence[Any], one: Callable[[str, list[Term]], tuple[Any, Row | None]]
) -> tuple[Any, list[Row]]:
  """The tree of the nodes that `one` makes of the terms at each leaf, and the rows of the report."""
  nodes, treedef = aligned(trees, [f"tree {k}" for k in range(len(trees))], "combine")
  made = [
    one(path, [Term(node, weight) for node, weight in zip(group, weights, strict=True)])
    for path, group in nodes.items()
  ]
  tree = jax.tree_util.tree_unflatten(treedef, [node for node, _ in made])
  return tree, [row for _, row in made if row is not None]


def _plan(trees: Sequence[Any], weights: Sequence[Any], method: Any, rank: Any, density: Any, key: Any) -> Plan:
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
