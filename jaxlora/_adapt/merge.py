"""`merge` and `strip`: plain parameters again."""

from collections.abc import Sequence
import functools
from typing import Any, NamedTuple
import warnings

import jax
import jax.numpy as jnp

from jaxlora._base.coded import decoded
from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.memory import moved, on_device, space_of
from jaxlora._base.paths import flatten, opened
from jaxlora._base.programs import one_program
from jaxlora._base.rounding import RoundingWarning, notable
from jaxlora._base.text import listed
from jaxlora._weight.checks import check_parts, check_together, check_values, check_weight
from jaxlora._weight.partitioned import with_plain_boxes
from jaxlora._weight.tree import adapted_leaves, map_adapted
from jaxlora._weight.weight import FullWeight, is_adapted, is_leaf_node, parts


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
  tree = opened(tree)
  nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
  adapted = [(path, node) for path, node in nodes if is_adapted(node)]
  for path, node in adapted:
    check_weight(node, f"merge: {path}")
    check_together(node, f"merge: {path}")
    check_values(node, f"merge: {path}")
  merged = [_merged(node, dtype) if is_adapted(node) else Merged(node) for _, node in nodes]
  paths = [path for path, _ in nodes]
  broken = [f"{path} ({name})" for path, one in zip(paths, merged, strict=True) for name in one.broken]
  if broken:
    raise ValueError(
      f"merge: found NaN or infinite values in {listed(broken)}, expected finite factors and sums. Training has"
      " diverged: go back to an earlier checkpoint; nothing was merged."
    )
  if found := notable({path: one.lost for path, one in zip(paths, merged, strict=True)}):
    warnings.warn(
      f"merge: rounding to the weight's dtype loses more than a tenth of the update in {found}. Pass"
      " dtype=jnp.float32 to keep it.",
      RoundingWarning,
      stacklevel=2,
    )
  return with_plain_boxes(jax.tree_util.tree_unflatten(treedef, [one.leaf for one in merged]))


class Merged(NamedTuple):
  """A plain leaf, and what was found while it was formed.

  Attributes:
    leaf: the weight.
    broken: the parts that are NaN or infinite; where none is, the sum, if the weight's dtype cannot hold it.
    lost: the share of the update that rounding takes, `||stored - exact|| / ||exact - base||`.
  """

  leaf: Any
  broken: Sequence[str] = ()
  lost: float = 0.0


def _merged(node: Any, dtype: Any) -> Merged:
  """A node's plain weight. Inside of a trace nothing is known of its values."""
  dtype = node.base.dtype if dtype is None else jnp.dtype(dtype)
  held = parts(node)
  if any(isinstance(part, jax.core.Tracer) for part in jax.tree.leaves(held)):
    return Merged(_formed(node, dtype)[0])
  here = node.with_parts({name: on_device(part) for name, part in held.items()})
  leaf, finite, lost = _formed_and_checked(here, dtype)
  leaf = node.value if isinstance(node, FullWeight) and dtype == node.value.dtype else moved(leaf, space_of(node.base))
  if isinstance(lost, jax.core.Tracer):  # a trace around this call, of which the tree is a constant
    return Merged(leaf)
  broken = [name for name in held if name != "base" and not finite[name]]
  return Merged(leaf, broken or [_SUM] * (not finite[_SUM]), float(lost))


_SUM = "base + A B"


@functools.partial(one_program, static_argnums=1)
def _formed_and_checked(node: Any, dtype: Any) -> tuple[jax.Array, dict[str, jax.Array], jax.Array]:
  node = node.with_parts({"base": decoded(node.base)})
  stored, exact = _formed(node, dtype)
  finite = {name: jnp.isfinite(part).all() for name, part in parts(node).items() if name != "base"}
  finite[_SUM] = ~(jnp.isfinite(node.base) & ~jnp.isfinite(stored)).any()  # a base may hold infinities of its own
  return stored, finite, _lost_share(node.base, exact, stored)


def _formed(node: Any, dtype: Any) -> tuple[jax.Array, jax.Array]:
  """The plain weight in a dtype, and before it is rounded to it."""
  if isinstance(node, FullWeight):
    return node.value.astype(dtype), node.value
  wide = wider_dtype(jnp.float32, functools.reduce(wider_dtype, [part.dtype for part in parts(node).values()]))
  exact = node.materialize(wide)
  return exact.astype(dtype), exact


def _lost_share(base: jax.Array, exact: jax.Array, stored: jax.Array) -> jax.Array:
  """The share of an update that rounding takes; 0 where nothing finite is lost, and of what 4 bytes hold."""
  if stored.dtype.itemsize >= 4:
    return jnp.zeros((), jnp.float32)
  update, loss = (
    jnp.sum(jnp.square(x)) for x in (exact - base.astype(exact.dtype), stored.astype(exact.dtype) - exact)
  )
  share = jnp.sqrt(loss / update)
  return jnp.where(jnp.isfinite(share), share, 0)


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
  tree = opened(tree)
  for path, node in adapted_leaves(tree):
    check_parts(node, f"strip: {path}", ("base",))
  return with_plain_boxes(map_adapted(lambda w: w.base, lambda w: w.base, lambda x: x, tree))
