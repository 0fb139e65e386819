"""Trees whose embedding may be their head, too: what becomes of an adapter's two modules in one leaf."""

from collections.abc import Mapping
from typing import Any

from jaxlora.peft._names import Key, module_of, split_path
from jaxlora.peft._places import Place
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import KnownRoles, shape_of_leaf
from jaxlora.peft._tied import (
  HEADLESS,
  Uses,
  head_name,
  is_embedding,
  is_head,
  shared_by_several,
  uses_of,
  without_head,
)


def one_leaf_for_both_uses(
  adapter: Adapter,
  leaves: Mapping[str, Any],
  places: Mapping[Key, Place],
  known: KnownRoles,
  probed: bool,
  problems: list[str],
) -> Adapter:
  """The adapter for a tree whose embedding may be its head, too: without the head where both become the same.

  Where they do not, one leaf cannot say it: that is added to `problems`, unless the tree has a head of its own, or
  the probe or the task shows that it has none.
  """
  if (problem := shared_by_several(adapter)) is not None:
    problems.append(problem)
  uses = uses_of(adapter)
  if uses is None:
    return adapter
  table = places.get((uses.embedding, "weight")) if uses.embedding else _token_embedding(leaves)
  head = places.get((uses.head, "weight")) if uses.head else None
  if table is None:
    return adapter
  shapes = {path: shape_of_leaf(leaf) for path, leaf in leaves.items()}
  own = own_head(shapes, table.path) if head is None else head.path
  name = head_name(uses.embedding or module_of(table.path), map(module_of, leaves))
  if (own is not None and own != table.path) or (uses.head is None and name is None):
    return adapter
  tied = table.path in known.tied
  if uses.alike:
    return without_head(adapter, uses.head) if uses.head else adapter
  headless = (probed and not tied) or adapter.config.get("task_type") in HEADLESS
  if uses.head is None and headless:
    return adapter
  problems.append(_problem(uses, table.path, uses.head or name, tied))
  return without_head(adapter, uses.head) if uses.head else adapter


def _token_embedding(leaves: Mapping[str, Any]) -> Place | None:
  """The leaf of a tree that is its token embedding, by its name; `None` where none or several are."""
  found = [path for path in leaves if split_path(path)[1] == "weight" and is_embedding(module_of(path))]
  return Place(found[0]) if len(found) == 1 else None


def own_head(shapes: Mapping[str, tuple[int, ...]], embedding: str) -> str | None:
  """The leaf of a tree that is a head beside its embedding, by its name or by the vocabulary among its axes.

  Args:
    shapes: of the leaves, by path.
    embedding: the path of the embedding.
  """
  vocabulary = max(shapes[embedding], default=0)
  for path in shapes:
    name, parameter = module_of(path), split_path(path)[1]
    if path == embedding or parameter != "weight" or path.endswith("embedding") or is_embedding(name):
      continue
    if is_head(name) or (len(shapes[path]) > 1 and vocabulary in shapes[path] and vocabulary > min(shapes[embedding])):
      return path
  return None


def _problem(uses: Uses, path: str, head: str | None, known_tied: bool) -> str:
  """What is wrong where a tree has one leaf for both uses, and the adapter changes them differently."""
  changed = uses.embedding if uses.head is None else uses.head if uses.embedding is None else "both, differently"
  what = "PEFT adapts the look-up alone" if uses.head is None else f"PEFT adapts {changed}"
  why = "this leaf is the head's weight, too" if known_tied else "no leaf of the tree is a head: this one may be both"
  leaf = f"{(head or 'lm_head').replace('.', '/')}/kernel"
  remedy = f"Give the tree a head of its own: {leaf}, with the embedding's values transposed"
  if not known_tied and uses.head is None:
    remedy += (
      "; or, where the model has no head, pass probe= (jaxlora.peft.load(..., probe=lambda p: ...)), which shows it"
    )
  return f"{path} ({uses.embedding or uses.head}): {what}, and {why}. {remedy}"
