"""`resize`: more tokens for a table of embeddings or a head."""

import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._adapt.layouts import Layouts
from jaxlora._adapt.tokens import token_axis
from jaxlora._base.checks import is_abstract, positive
from jaxlora._base.paths import flatten
from jaxlora._base.patterns import compile_regex, no_match_error
from jaxlora._weight.roles import axes_of, factor_axes
from jaxlora._weight.variant import TOKENS
from jaxlora._weight.weight import FullWeight, LoraWeight, is_leaf_node


def resize(tree: Any, pattern: str, size: int) -> Any:
  """Gives tables of tokens more rows, each the mean of the old ones.

      W (tokens, features) -> W' (size, features),    W'[k] = mean_j W[j]  for each new k

  The mean is as likely as an average token, where zeros would draw probability from all others; in float32 at least.
  Of an adapted table the factors grow along with it: `merge(resize(tree))` is `resize(merge(tree))`. New rows train
  with `LoraConfig(tokens=...)`: resize first, then adapt.

  Args:
    tree: parameters, or a tree with adapted leaves; arrays or `jax.ShapeDtypeStruct`s.
    pattern: a regex over whole paths: an embedding, or a head, or both of an untied model (a head's bias is a leaf of
      its own, which this leaves alone).
    size: tokens afterwards.

  Returns:
    The tree with longer tables, and every other leaf as it was.

  Raises:
    ValueError: on a pattern without a match, a table that is longer already, a leaf that is no table of floats, and
      variants whose parts do not grow with the table; naming the leaf.

  Example:
    >>> import jax.numpy as jnp, jaxlora
    >>> params = {"embed": {"embedding": jnp.arange(6.0).reshape(3, 2)}}
    >>> jaxlora.resize(params, "embed/embedding", 4)["embed"]["embedding"][3]
    Array([2., 3.], dtype=float32)

  Source: Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021.
  """
  size = positive(size, "resize: size")
  compile_regex(pattern, "resize: pattern")
  nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
  leaves = dict(nodes)
  chosen = [path for path in leaves if re.fullmatch(pattern, path)]
  if not chosen:
    raise no_match_error("resize: pattern", pattern, list(leaves))
  bases = {path: node.base if isinstance(node, LoraWeight | FullWeight) else node for path, node in leaves.items()}
  layouts = Layouts.of_tree(tree, bases, {})
  new = {path: _resized(path, leaves[path], bases[path], layouts, size) for path in chosen}
  return jax.tree_util.tree_unflatten(treedef, [new.get(path, node) for path, node in nodes])


def _resized(path: str, node: Any, base: Any, layouts: Layouts, size: int) -> Any:
  axis = node.roles.index("i") if _has_rows(node) else token_axis(path, base, layouts, "resize")
  if base.shape[axis] > size:
    raise ValueError(f"resize: {path}: has {base.shape[axis]} tokens, expected at most the new size, {size}.")
  if isinstance(node, FullWeight):
    return FullWeight(_longer(node.base, axis, size), _longer(node.value, axis, size))
  if not isinstance(node, LoraWeight):
    return _longer(node, axis, size)
  grown = {"base": _longer(node.base, axis, size)}
  if not _has_rows(node):
    if not node.kind.plain or node.kind.gain is not None:
      raise ValueError(
        f"resize: {path}: the variant {node.variant!r} has parts that follow from the whole table. Resize the"
        " parameters first, then adapt them: jaxlora.adapt(jaxlora.resize(params, pattern, size), config, key)."
      )
    own = "a" if axis in axes_of(node.roles, "i") else "b"
    along = factor_axes(node.roles, "i" if own == "a" else "o").index(axis)
    names = [name for name in node.parts() if name in (own, f"{own}0")]
    grown |= {name: _longer(node.parts()[name], along, size) for name in names}
  return node.with_parts(grown)


def _has_rows(node: Any) -> bool:
  return isinstance(node, LoraWeight) and node.variant == TOKENS


def _longer(array: Any, axis: int, size: int) -> Any:
  """An array of so many entries along an axis, the new ones the mean of the old."""
  shape = (*array.shape[:axis], size, *array.shape[axis + 1 :])
  if is_abstract(array):
    return jax.ShapeDtypeStruct(shape, array.dtype)
  missing = size - array.shape[axis]
  if not missing:
    return array
  array = jnp.asarray(array)
  wide = array.astype(jnp.float32) if array.dtype.itemsize < 4 else array
  more = jnp.repeat(wide.mean(axis, keepdims=True).astype(array.dtype), missing, axis)
  return jnp.concatenate([array, more], axis)
