"""`extract`: a full fine-tune turned into an adapter."""

from collections.abc import Callable
import dataclasses
from typing import Any
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.config import LeafPlan, LoraConfig
from jaxlora._adapt.plan import plan_tree
from jaxlora._base.checks import check_finite, is_known
from jaxlora._base.coded import is_coded
from jaxlora._base.dtypes import wide, wider_dtype
from jaxlora._base.keys import leaf_key, typed_key
from jaxlora._base.matrix import frobenius
from jaxlora._base.memory import on_device
from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._weight.matrices import matrices
from jaxlora._weight.partitioned import with_own_names
from jaxlora._weight.placement import beside_its_base
from jaxlora._weight.weight import FullWeight, LoraWeight, is_adapted, is_leaf_node
from jaxlora.svd._low_rank import low_rank
from jaxlora.svd._ranks import rank_or_energy
from jaxlora.svd._truncation import Row, Truncation, report_of, warn_of_flag
from jaxlora.svd._update import factors_of_svd


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
  (biases, norms, kernels too small for the rank) is trained whole, which is exact. With one, its targets are adapted
  and its `train` leaves are kept whole; a warning names the changed leaves that are left out.

  Args:
    base: the parameters before fine-tuning: the base of the adapter.
    tuned: the parameters after it: the same tree of the same shapes.
    rank: the rank of every update; `None` with neither `energy`, for the config's own.
    energy: instead of a rank: the share of each difference's squared Frobenius norm to keep, in (0, 1].
    config: targets, axes, ranks by leaf, scale and dtype of the factors, as in `adapt`.
    probe: tells the roles of kernels of more than two axes, as in `adapt`.
    key: a random key, for the randomised decomposition of large weights; `None` for the exact one.
    with_report: an older spelling of `extract_with_report`.

  Returns:
    An adapted tree on `base`.

  Raises:
    ValueError: where the trees differ in structure or shapes, or hold values that are not finite, naming the leaf;
      where nothing changed; else as `adapt`.

  Example:
    >>> import jax.numpy as jnp, jaxlora
    >>> base = {"kernel": jnp.eye(6, 5), "bias": jnp.zeros(5)}
    >>> tuned = {"kernel": base["kernel"] + jnp.outer(jnp.arange(6.0), jnp.ones(5)), "bias": jnp.ones(5)}
    >>> jaxlora.extract(base, tuned, rank=1)
    {'bias': FullWeight(5, f32), 'kernel': LoraWeight(6x5 io, rank 1, f32)}
  """
  if with_report:
    warn_of_flag("extract")
    return extract_with_report(base, tuned, rank=rank, energy=energy, config=config, probe=probe, key=key)
  tree, rows = _extracted_tree(base, tuned, rank, energy, config, probe, key)
  left_out = [row.path for row in report_of(rows).leaves if row.rank is None and row.residual]
  if left_out:
    warnings.warn(
      f"extract: fine-tuning changed {listed(left_out)}, which the config neither adapts nor trains whole: these"
      " changes are left out. Name them in LoraConfig.train to keep them, or call extract_with_report, which lists"
      " them.",
      UserWarning,
      stacklevel=2,
    )
  return tree


def extract_with_report(
  base: Any,
  tuned: Any,
  *,
  rank: int | None = None,
  energy: float | None = None,
  config: LoraConfig | None = None,
  probe: Callable[[Any], Any] | None = None,
  key: jax.Array | None = None,
) -> tuple[Any, Truncation]:
  """`extract`, and what each leaf lost by it; leaves that are left out have lost everything.

  Args:
    base, tuned, rank, energy, config, probe, key: as for `extract`.

  Returns:
    The adapted tree and a `Truncation`, which prints as a table.

  Raises:
    ValueError: as `extract`.

  Example:
    >>> import jax.numpy as jnp, jaxlora
    >>> base = {"kernel": jnp.eye(6, 5)}
    >>> tuned = {"kernel": base["kernel"] + jnp.outer(jnp.arange(6.0), jnp.ones(5))}
    >>> tree, report = jaxlora.extract_with_report(base, tuned, rank=1)
    >>> tree["kernel"].rank, bool(report.residual < 1e-6)
    (1, True)
  """
  tree, rows = _extracted_tree(base, tuned, rank, energy, config, probe, key)
  return tree, report_of(rows)


def _extracted_tree(
  base: Any, tuned: Any, rank: int | None, energy: float | None, config: LoraConfig | None, probe: Any, key: Any
) -> tuple[Any, list[Row]]:
  asked = rank_or_energy(rank, energy, "extract") if config is None or rank is not None or energy is not None else None
  before, after, treedef = _leaf_pairs(base, tuned)
  changed = {path for path, leaf in before.items() if not np.array_equal(np.asarray(leaf), np.asarray(after[path]))}
  if not changed:
    raise ValueError("extract: base and tuned hold the same values: there is no update to extract.")
  plan = plan_tree(base, _extraction_config(config, before, changed, asked, energy), probe)
  keys = None if key is None else typed_key(key, "extract: key")
  rows: list[Row] = []

  def one(path: str, leaf: Any) -> Any:
    if path in plan.adapted:
      of_leaf = None if keys is None else leaf_key(keys, path)
      weight, row = _extracted(leaf, after[path], *plan.adapted[path], energy, of_leaf)
      rows.append(row)
      return dataclasses.replace(weight, sure=path not in plan.unsure)
    whole = path in plan.whole
    if path in changed:
      norm = jnp.linalg.norm((on_device(after[path]) - on_device(leaf)).astype(wide(leaf)).ravel())
      rows.append(Row(path, None, norm, 0 if whole else 1))
    if not whole:
      return leaf
    return FullWeight(leaf, after[path] if path in changed else jnp.array(leaf, copy=True))  # no alias of the base

  return with_own_names(jax.tree_util.tree_unflatten(treedef, [one(*pair) for pair in before.items()])), rows


def _leaf_pairs(base: Any, tuned: Any) -> tuple[dict[str, Any], dict[str, Any], Any]:
  """The leaves of both trees by path; raises unless they are of one structure, with known and finite values."""
  (before, treedef), (after, other) = flatten(base, is_leaf_node), flatten(tuned, is_leaf_node)
  for path, leaf in (*before, *after):
    if is_adapted(leaf):
      raise ValueError(f"extract: {path} is adapted; expected plain parameters. Merge first (jaxlora.merge).")
    if is_coded(leaf):
      raise ValueError(f"extract: {path} is quantised; expected floats. Go back to them first (jaxlora.dequantize).")
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
    if not is_known(leaf, theirs[path]):
      raise ValueError(f"extract: {path} is traced; call extract outside jit: what changed is told from values.")
  floats = [
    (f"{path} ({name})", tree[path])
    for path, leaf in before
    for name, tree in (("base", ours), ("tuned", theirs))
    if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
  ]
  check_finite(floats, "extract")
  return ours, theirs, treedef


def _extraction_config(
  config: LoraConfig | None, before: dict[str, Any], changed: set[str], rank: int | None, energy: float | None
) -> LoraConfig:
  """The config to adapt the base with; where none is given, one for everything that changed."""
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
  base: Any, tuned: Any, roles: str, plan: LeafPlan, energy: float | None, key: jax.Array | None
) -> tuple[LoraWeight, Row]:
  """A weight on `base` with the update that leads from it to `tuned`."""
  own = plan.dtype or base.dtype
  dtype = wider_dtype(wide(base), own)
  x = matrices(on_device(jnp.asarray(tuned)).astype(dtype) - on_device(base).astype(dtype), roles)
  found = low_rank(x, plan.rank, key=key) if energy is None else low_rank(x, energy=energy)
  a, b = factors_of_svd(found, base.shape, roles, own)
  row = Row(plan.path, found.rank, frobenius(x, 2), found.error)
  if energy is not None:
    return beside_its_base(LoraWeight.from_factors(base, a, b, roles, dropout=plan.dropout)), row
  weight = LoraWeight.from_factors(base, a, b, roles, alpha=plan.alpha, scaling=plan.scaling, dropout=plan.dropout)
  return beside_its_base(weight.with_parts({"b": b / jnp.asarray(weight.scale, b.dtype)})), row
