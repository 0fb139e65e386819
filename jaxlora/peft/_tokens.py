"""PEFT's `trainable_token_indices`: some rows of an embedding or a head, which replace the base's."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._weight.weight import FullWeight
from jaxlora.peft._layout import weight_from_torch, weight_to_torch
from jaxlora.peft._names import Key, key_of
from jaxlora.peft._places import Place
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import KnownRoles, roles_of_layer


def leaves_with_rows(
  adapter: Adapter,
  leaves: Mapping[str, Any],
  places: Mapping[Key, Place],
  new: Mapping[str, Any],
  known: KnownRoles,
  problems: list[str],
) -> dict[str, FullWeight]:
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
      table = tokens.put_into(name, weight_to_torch(np.asarray(leaf), roles, kind))
      value = weight_from_torch(table, leaf.shape, roles, kind)
      found[path] = FullWeight(base=leaf, value=jnp.array(value, leaf.dtype))
    except ValueError as error:
      problems.append(f"{path} ({name}): {error}")
  return found
