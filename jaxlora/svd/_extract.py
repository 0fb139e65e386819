"""`extract`: a full fine-tune turned into an adapter."""

from collections.abc import Callable
import dataclasses
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.adapt import adapt
from jaxlora._adapt.config import LoraConfig
from jaxlora._base.checks import check_finite, is_concrete
from jaxlora._base.dtypes import wide
from jaxlora._base.keys import leaf_key, typed_key
from jaxlora._base.matrix import frobenius
from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._weight.roles import matrices
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted
from jaxlora.svd._low_rank import low_rank
from jaxlora.svd._ranks import rank_or_energy
from jaxlora.svd._truncation import LeafTruncation, Truncation, truncated
from jaxlora.svd._update import with_delta


def extract(
  base: Any,
  tuned: Any,
  *,
  rank: int | None = None,
  energy: float | None = None,
  config: LoraConfig | None = None,
  probe: Callable[[Any], Any] | None = None,
  key: jax.Array | None = None,
  with_report: bool = False,
) -> Any:
  """An adapter from the difference of two trained trees: a full fine-tune turned into LoRA.

      tuned - base  ~  sum_{k <= rank} s_k u_k v_k^T    leaf by leaf; A = sqrt(s) u^T, B = sqrt(s) v^T / scale

  Without a config, every matrix and kernel that fine-tuning changed is adapted, and every other leaf that it changed
  (biases, norms, kernels too small for the rank) is trained whole, which is exact. With one, its targets are adapted,
  its `train` leaves are kept whole, and it is said which changed leaves are left out.

  Args:
    base: the parameters before fine-tuning: the base of the adapter.
    tuned: the parameters after it: the same tree of the same shapes.
    rank: the rank of every update; `None` with neither `energy`, for the config's own.
    energy: instead of a rank: the share of each difference's squared Frobenius norm to keep, in (0, 1].
    config: targets, axes, ranks by leaf, scale and dtype of the factors, as in `adapt`.
    probe: tells the roles of kernels of more than two axes, as in `adapt`.
    key: a random key, for the randomised decomposition of large weights; `None` for the exact one.
    with_report: whether to return a `Truncation` as well: what each leaf lost.

  Returns:
    An adapted tree on `base`, or `(tree, Truncation)`.

  Raises:
    ValueError: where the trees differ in structure or shapes, or hold what is not finite, naming the leaf; where
      nothing changed; else as `adapt`.

  Example:
    >>> import jax.numpy as jnp, jaxlora
    >>> base = {"kernel": jnp.eye(6, 5), "bias": jnp.zeros(5)}
    >>> tuned = {"kernel": base["kernel"] + jnp.outer(jnp.arange(6.0), jnp.ones(5)), "bias": jnp.ones(5)}
    >>> tree, report = jaxlora.extract(base, tuned, rank=1, with_report=True)
    >>> tree["kernel"].rank, bool(report.residual < 1e-6)
    (1, True)
  """
  told = rank_or_energy(rank, energy, "extract") if config is None or rank is not None or energy is not None else None
  before, after, treedef = _leaf_pairs(base, tuned)
  changed = {path for path, leaf in before.items() if not np.array_equal(np.asarray(leaf), np.asarray(after[path]))}
  if not changed:
    raise ValueError("extract: base and tuned hold the same values: there is no update to extract.")
  plan = _extraction_plan(config, before, changed, told, energy)
  adapted, _ = flatten(adapt(base, plan, jax.random.key(0), probe=probe), is_leaf=is_adapted)
  by_path = dict(adapted)  # zeros in the shapes that the plan says; filled below
  keys = None if key is None else typed_key(key, "extract: key")
  rows: list[LeafTruncation] = []
  for path, node in adapted:
    if isinstance(node, LoraWeight):
      by_path[path], row = _extracted(path, node, after[path], energy, None if keys is None else leaf_key(keys, path))
      rows.append(row)
    elif path in changed:
      norm = jnp.linalg.norm((after[path] - before[path]).astype(wide(before[path])).ravel())
      whole = isinstance(node, FullWeight)
      by_path[path] = dataclasses.replace(node, value=after[path]) if whole else node
      rows.append(truncated(path, None, norm, 0 if whole else 1))
  left_out = [row.path for row in rows if row.rank is None and row.residual]
  if left_out and not with_report:
    warnings.warn(
      f"extract: fine-tuning changed {listed(left_out)}, which the config neither adapts nor trains whole: these"
      " changes are left out. Name them in LoraConfig.train to keep them, or pass with_report=True, which lists them.",
      UserWarning,
      stacklevel=2,
    )
  tree = jax.tree_util.tree_unflatten(treedef, [by_path[path] for path in before])
  return (tree, Truncation(tuple(rows))) if with_report else tree


def _leaf_pairs(base: Any, tuned: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
  """The leaves of both trees by path; raises unless they are of one structure, with known and finite values."""
  (before, treedef), (after, other) = flatten(base, is_adapted), flatten(tuned, is_adapted)
  for path, leaf in (*before, *after):
    if is_adapted(leaf):
      raise ValueError(f"extract: {path} is adapted; expected plain parameters. Merge first (jaxlora.merge).")
  ours, theirs = dict(before), dict(after)
  if treedef != other:
    only = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    raise ValueError(
      f"extract: base and tuned are different trees. Only in base: {listed(only[0]) or 'nothing'}; only in tuned:"
      f" {listed(only[1]) or 'nothing'}. Pass the parameters before and after fine-tuning of one model."
    )
  for path, leaf in ours.items():
    if jnp.shape(leaf) != jnp.shape(theirs[path]) or jnp.result_type(leaf) != jnp.result_type(theirs[path]):
      raise ValueError(
        f"extract: {path} has shape {jnp.shape(leaf)}, dtype {jnp.result_type(leaf)} in base and shape"
        f" {jnp.shape(theirs[path])}, dtype {jnp.result_type(theirs[path])} in tuned; expected the same."
      )
    if not is_concrete(leaf, theirs[path]):
      raise ValueError(f"extract: {path} is traced; call extract outside jit: what changed is told from values.")
  floats = [
    (f"{path} ({name})", tree[path])
    for path, leaf in before
    for name, tree in (("base", ours), ("tuned", theirs))
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  ]
  check_finite(floats, "extract")
  return ours, theirs, treedef


def _extraction_plan(
  config: LoraConfig | None, before: dict[str, Any], changed: set[str], rank: int | None, energy: float | None
) -> LoraConfig:
  """The config to adapt the base with; where there is none, one for all that changed."""
  if config is None:
    small = rank or 0
    kernels = {path for path in changed if np.ndim(before[path]) >= 2 and min(np.shape(before[path])) > small}
    rest = changed - kernels
    return LoraConfig(
      rank=rank or 1,
      targets=lambda path, leaf: path in kernels,
      train=(lambda path, leaf: path in rest) if rest else None,
    )
  variants = {config.variant, *(fields.get("variant", "lora") for fields in (config.overrides or {}).values())}
  if variants != {"lora"}:
    raise ValueError(
      f"extract: LoraConfig.variant is {sorted(variants)}, expected 'lora': the update is a plain product."
    )
  overrides = {pattern: dict(fields) for pattern, fields in (config.overrides or {}).items()}
  if energy is not None and any("rank" in fields for fields in overrides.values()):
    raise ValueError("extract: energy and LoraConfig.overrides both say the rank of a leaf; expected one of the two.")
  for fields in overrides.values():
    fields.pop("init", None)
  return dataclasses.replace(
    config, rank=1 if energy is not None else rank or config.rank, init="kaiming", overrides=overrides or None
  )


def _extracted(
  path: str, weight: LoraWeight, tuned: Any, energy: float | None, key: jax.Array | None
) -> tuple[LoraWeight, LeafTruncation]:
  """The weight with the update that leads from its base to `tuned`."""
  dtype = wide(weight.base, weight.a)
  x = matrices(jnp.asarray(tuned).astype(dtype) - weight.base.astype(dtype), weight.roles)
  norm = frobenius(x, 2)
  if energy is not None:
    found = low_rank(x, energy=energy)
    return with_delta(weight, found, weight.a.dtype), truncated(path, found.rank, norm, found.error)
  found = low_rank(x, weight.rank, key=key)
  new = with_delta(weight, found, weight.a.dtype)
  as_planned = dataclasses.replace(weight, a=new.a, b=new.b / jnp.asarray(weight.scale, new.b.dtype))
  return as_planned, truncated(path, found.rank, norm, found.error)
