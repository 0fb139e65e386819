"""`merge` and `strip`: plain parameters again."""

import functools
from typing import Any
import warnings

import jax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.paths import flatten
from jaxlora._base.rounding import RoundingWarning, notable
from jaxlora._base.text import listed
from jaxlora._weight.checks import check_parts, check_values, check_weight
from jaxlora._weight.partitioned import with_plain_boxes
from jaxlora._weight.tree import adapted_leaves, map_adapted
from jaxlora._weight.weight import FullWeight, is_adapted, parts


def merge(tree: Any, *, dtype: Any = None) -> Any:
  """Folds every update into its weight: plain parameters again, at no cost to inference.

      W' = W + scale * A B

  Args:
    tree: what `adapt` returned, trained or not.
    dtype: of the merged weights; `None` for each one's own. Sums are formed in float32 or wider, whatever it is.

  Returns:
    Parameters of the original nesting, shapes and dtypes; adapted weights in `dtype`, where it is given.

  Raises:
    ValueError: where factors are NaN or infinite, or overflow the weight's dtype (checked outside `jit`, where values
      are known), naming the leaves; where they do not fit their base, or the tree is a half.

  Warns:
    RoundingWarning: where rounding to the weight's dtype takes more than a tenth of an update's norm (outside `jit`),
      naming the leaves: bfloat16 keeps 8 bits, and a small update is less than the last of them.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jax.tree.map(jnp.shape, merge(tree))
    {'bias': (5,), 'kernel': (6, 5)}
  """
  nodes, treedef = flatten(tree, is_leaf=is_adapted)
  adapted = [(path, node) for path, node in nodes if is_adapted(node)]
  for path, node in adapted:
    check_weight(node, f"merge: {path}")
    check_values(node, f"merge: {path}")
  lost: dict[str, float] = {}
  merged = [_merged(path, node, dtype, lost) for path, node in nodes]
  broken = [
    f"{path} ({name})"
    for (path, node), leaf in zip(nodes, merged, strict=True)
    if is_adapted(node)
    for name in _not_finite(node, leaf)
  ]
  if broken:
    raise ValueError(
      f"merge: found NaN or infinite values in {listed(broken)}, expected finite factors and sums. Training has"
      " diverged: go back to an earlier checkpoint; nothing was merged."
    )
  if found := notable(lost):
    warnings.warn(
      f"merge: rounding to the weight's dtype loses more than a tenth of the update in {found}. Pass"
      " dtype=jnp.float32 to keep it.",
      RoundingWarning,
      stacklevel=2,
    )
  return with_plain_boxes(jax.tree_util.tree_unflatten(treedef, merged))


def _merged(path: str, node: Any, dtype: Any, lost: dict[str, float]) -> Any:
  """A node's plain weight; the share of its update that rounding takes is added to `lost`, where it can be told."""
  if not is_adapted(node):
    return node
  dtype = node.base.dtype if dtype is None else jnp.dtype(dtype)
  if isinstance(node, FullWeight):
    return node.value if dtype == node.value.dtype else node.value.astype(dtype)
  wide = wider_dtype(jnp.float32, functools.reduce(wider_dtype, [part.dtype for part in parts(node).values()]))
  exact = node.materialize(wide)
  if dtype == wide:
    return exact
  stored = exact.astype(dtype)
  if dtype.itemsize < 4 and not any(isinstance(part, jax.core.Tracer) for part in parts(node).values()):
    lost[path] = float(_lost_share(node.base, exact, stored))
  return stored


@jax.jit
def _lost_share(base: jax.Array, exact: jax.Array, stored: jax.Array) -> jax.Array:
  """`||stored - exact|| / ||exact - base||`, by one pass over the three; 0 where nothing finite is lost."""
  update, loss = (
    jnp.sum(jnp.square(x)) for x in (exact - base.astype(exact.dtype), stored.astype(exact.dtype) - exact)
  )
  share = jnp.sqrt(loss / update)
  return jnp.where(jnp.isfinite(share), share, 0)


def _not_finite(node: Any, merged: Any) -> list[str]:
  """The parts of a node that are NaN or infinite; where none is, its sum, if the weight's dtype cannot hold it."""
  held = {**parts(node), "base + A B": merged}
  if any(isinstance(part, jax.core.Tracer) for part in held.values()):
    return []
  finite = {name: jnp.isfinite(part) for name, part in held.items()}
  broken = [name for name in parts(node) if name != "base" and not finite[name].all()]
  overflows = (finite["base"] & ~finite["base + A B"]).any()  # a base may hold infinities of its own
  return broken or ["base + A B"] * bool(overflows)


def strip(tree: Any) -> Any:
  """The base alone, as it was before `adapt`: bit for bit, as it is kept, never computed by subtraction.

  Args:
    tree: what `adapt` returned, trained or not.

  Returns:
    The original parameters.

  Raises:
    ValueError: if the bases are missing, naming the leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> strip(tree)["kernel"] is params["kernel"]
    True
  """
  for path, node in adapted_leaves(tree):
    check_parts(node, f"strip: {path}", ("base",))
  return with_plain_boxes(map_adapted(lambda w: w.base, lambda w: w.base, lambda x: x, tree))
