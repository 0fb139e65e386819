"""PEFT's `trainable_token_indices`: some rows of an embedding or a head, which replace the base's.

There they are the rows themselves, here what they have moved by: `row = base's row + b`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.tokens import rows_weight
from jaxlora._weight.variant import TOKENS
from jaxlora._weight.weight import LoraWeight, is_leaf_node
from jaxlora.peft._names import Key, key_of
from jaxlora.peft._places import Place
from jaxlora.peft._records import Adapter, PeftError, TokenRows
from jaxlora.peft._roles import KnownRoles, roles_of_layer


def leaves_with_rows(
  adapter: Adapter,
  leaves: Mapping[str, Any],
  places: Mapping[Key, Place],
  new: Mapping[str, Any],
  known: KnownRoles,
  problems: list[str],
) -> dict[str, LoraWeight]:
  """The leaves some rows of which the adapter replaces, by path; what does not fit is added to `problems`.

  Args:
    adapter: with its rows of tokens.
    leaves: of the tree, by path.
    places: of torch's parameters.
    new: the leaves that the adapter changes otherwise.
    known: roles of the tree.
    problems: what is wrong is added to these.
  """
  found = {}
  for name, tokens in adapter.tokens.items():
    place = places.get(key_of(name))
    if place is None:
      continue
    path, leaf = place.path, leaves[place.path]
    try:
      if path in new or path in found:
        raise ValueError("its tokens are trained, and it is adapted or saved whole, too")
      if isinstance(leaf, jax.ShapeDtypeStruct):
        raise ValueError("some of its rows are trained, and the base has a shape alone; load onto the base's values")
      if place.index:
        raise ValueError(f"some of its rows are trained, in layer {place.index} of a stack")
      module, roles = key_of(name)[0], roles_of_layer(path, leaf.shape, known)
      kind = known.kind(path, module, roles)
      axis = 0 if kind == "embedding" else roles.index("o")
      tokens.check(name, (leaf.shape[axis], *(size for d, size in enumerate(leaf.shape) if d != axis)))
      moved = tokens.rows.astype(np.float32) - rows_of(leaf, axis, tokens.indices).astype(np.float32)
      found[path] = rows_weight(leaf, "io" if axis == 0 else "oi", tokens.indices, jnp.asarray(moved))
    except ValueError as error:
      problems.append(f"{path} ({name}): {error}")
  return found


def rows_of(table: Any, axis: int, ids: Sequence[int]) -> np.ndarray:
  """The rows of some tokens, (tokens, features)."""
  found = jnp.take(jnp.asarray(table), jnp.asarray(ids), axis)
  return np.asarray(found if axis == 0 else found.T)


def is_rows(node: Any) -> bool:
  """Whether of a leaf some rows train."""
  return isinstance(node, LoraWeight) and node.variant == TOKENS


def without_rows(tree: Any) -> Any:
  """A tree with the tables themselves in the places of those of which rows train."""
  return jax.tree.map(lambda node: node.base if is_rows(node) else node, tree, is_leaf=is_leaf_node)


def token_rows_of(path: str, node: LoraWeight, subject: str) -> TokenRows:
  """The rows that replace a table's."""
  if node.base is None or node.a is None or isinstance(node.base, jax.ShapeDtypeStruct):
    raise PeftError(
      f"{subject}: {path}: PEFT's rows are whole ones, and this tree has only what they moved by. Save the whole tree,"
      " with the table's values: jaxlora.join(frozen, trainable)."
    )
  ids = [int(token) for token in np.asarray(node.a)]
  moved = np.asarray(node.b).astype(np.float32)
  rows = rows_of(node.base, node.roles.index("i"), ids).astype(np.float32) + moved
  return TokenRows(tuple(ids), rows.astype(np.asarray(node.b).dtype))
