"""Experts in one parameter of torch whose A may be that of the outputs: the leaves tell."""

from collections.abc import Mapping
import dataclasses
from typing import Any

from jaxlora.peft._names import Key
from jaxlora.peft._packed import orientation_for, turned
from jaxlora.peft._places import Place
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import KnownRoles, shape_of_leaf


def oriented(
  adapter: Adapter, places: Mapping[Key, Place], leaves: Mapping[str, Any], known: KnownRoles, problems: list[str]
) -> Adapter:
  """The adapter with the A of such experts as that of the inputs, which the sizes of the leaves tell.

  Args:
    adapter: with one module for each leaf.
    places: the leaf of each parameter.
    leaves: of the tree, by path.
    known: roles of the tree.
    problems: experts of which nothing tells are added to these.
  """
  modules = dict(adapter.modules)
  for name, packed in adapter.packed.items():
    place = places.get((packed.modules[0], "weight"))
    if packed.oriented or (place is None and packed.modules[0] in modules):
      continue
    if place is None:
      problems.append(
        f"{name}: nothing tells whether its A is that of the inputs. Merge the adapter in PEFT (merge_and_unload)"
      )
      continue
    shape, roles = shape_of_leaf(leaves[place.path]), known.given.get(place.path)
    if roles is None and place.path.endswith("/kernel") and len(shape) == len(place.index) + 2:
      roles = "s" * len(place.index) + "io"
    turn = None if roles is None else orientation_for(packed, modules, shape, roles)
    if turn is None:
      problems.append(
        f"{place.path} ({name}): PEFT's versions take A for the inputs or for the outputs of such a parameter, and"
        f" shape {shape} does not tell which; say axes={{pattern: roles}} or probe=, or, where the two are of one size,"
        " merge the adapter in PEFT (merge_and_unload)"
      )
    elif turn:
      modules |= turned(packed, modules)
  return dataclasses.replace(adapter, modules=modules)
