"""Rows of tables that train, as `LoraConfig.tokens` has them: where they lie, and how they start.

Reading order: the tables that it names -> the nodes.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._adapt.layouts import Layouts
from jaxlora._base.coded import is_coded
from jaxlora._base.patterns import first_match, no_match_error
from jaxlora._weight.placement import beside_its_base
from jaxlora._weight.tokens import ID_DTYPE
from jaxlora._weight.variant import TOKENS
from jaxlora._weight.weight import LoraWeight


def tables_of(
  tokens: Mapping[str, Sequence[int]] | None, leaves: Mapping[str, Any], layouts: Layouts
) -> dict[str, tuple[str, tuple[int, ...]]]:
  """The roles, `i` the axis of the tokens, and the tokens of every table that `tokens` names, by path.

  Raises:
    ValueError: on a pattern without a match, a leaf that is no matrix of floats, an axis that nothing tells, or a token
      beyond the table's end.
  """
  for pattern in tokens or {}:
    if not any(re.fullmatch(pattern, path) for path in leaves):
      raise no_match_error(f"LoraConfig.tokens[{pattern!r}]", pattern, list(leaves))
  found = {}
  for path, leaf in leaves.items():
    if (ids := first_match(tokens, path)) is not None:
      axis = token_axis(path, leaf, layouts, "LoraConfig.tokens")
      if max(ids) >= leaf.shape[axis]:
        raise ValueError(
          f"LoraConfig.tokens: {path}: found token {max(ids)}, expected tokens below {leaf.shape[axis]}, the table's"
          f" length. Add tokens first: params = jaxlora.resize(params, {re.escape(path)!r}, {max(ids) + 1})."
        )
      found[path] = ("io" if axis == 0 else "oi"), tuple(ids)
  return found


def token_axis(path: str, leaf: Any, layouts: Layouts, what: str) -> int:
  """Along which axis of a table or a head its tokens lie."""
  if len(leaf.shape) != 2 or is_coded(leaf) or not jnp.issubdtype(leaf.dtype, jnp.floating):
    kind = "codes" if is_coded(leaf) else f"shape {tuple(leaf.shape)}, dtype {leaf.dtype}"
    raise ValueError(f"{what}: {path}: found {kind}, expected a matrix of floats, (tokens, features) or its transpose.")
  roles = layouts.given.get(path)
  if roles is not None:
    if sorted(roles) != ["i", "o"]:
      raise ValueError(f"{what}: {path}: axes says {roles!r}, expected 'io' or 'oi', 'i' the axis of the tokens.")
    return roles.index("i")
  seen = None if layouts.seen is None else layouts.seen[path].looked_up
  if seen is not None:
    return seen
  if layouts.is_table(path):
    return 0
  clue = layouts.clue(path, 2)
  if clue is None:
    raise ValueError(
      f"{what}: {path}: nothing tells which of its axes, {tuple(leaf.shape)}, is that of the tokens. Say it:"
      f" LoraConfig(axes={{{re.escape(path)!r}: 'io'}}), 'i' the tokens, or pass a probe to adapt."
    )
  return clue.roles.index("o")  # a head: its outputs are the tokens


def with_rows(base: Any, roles: str, ids: Sequence[int], dtype: Any) -> LoraWeight:
  """The table beside rows that have not moved."""
  shape = (len(ids), base.shape[roles.index("o")])
  return rows_weight(base, roles, ids, jnp.zeros(shape, dtype or base.dtype))


def rows_weight(base: Any, roles: str, ids: Sequence[int], moved: jax.Array) -> LoraWeight:
  """The table beside what the rows of its tokens have moved by, (tokens, features)."""
  places = jnp.asarray(ids, ID_DTYPE)
  return beside_its_base(LoraWeight.from_factors(base, places, moved, roles, variant=TOKENS))
