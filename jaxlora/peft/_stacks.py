"""Which axes of a leaf are stacked: those along which the layers of a scanned module lie.

They need not lead: a module that is scanned over axis 1 has kernels (in, layers, out) and norms (features, layers). All
leaves of one scanned module have them on the same axis from the front, or all on the last.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import itertools
import re

from jaxlora._base.paths import components

Stack = tuple[int, ...]  # the stacked axes, in the order of the indices in torch's name


@dataclasses.dataclass(frozen=True)
class Stacked:
  """A leaf with stacked axes.

  Attributes:
    shape: of the leaf.
    lists: for each index in torch's name, the list that it counts in, such as `model.layers.{}`.
    candidates: the axes that may be the stacked ones.
  """

  shape: tuple[int, ...]
  lists: Sequence[str]
  candidates: Sequence[Stack]


def any_axes(ndim: int, count: int) -> list[Stack]:
  return list(itertools.combinations(range(ndim), count))


def axes_by_roles(roles: str) -> Stack:
  return tuple(d for d, role in enumerate(roles) if role == "s")


# What scanned axes are called in metadata.
_NAMES = frozenset({"layers", "layer", "blocks", "block", "stages", "stage", "experts", "expert", "exp"})


def axes_by_names(names: Sequence[object] | None) -> Stack:
  """The axes that metadata calls stacked."""
  return tuple(d for d, name in enumerate(names or ()) if name in _NAMES)


def lists_of(template: str) -> list[str]:
  """The lists that a torch name with `{}` counts in, by the number of the index: `deep.{}`, `deep.{}.expert.{}`."""
  found = {}
  for k, place in enumerate(re.finditer(r"\{(\d*)\}", template)):
    found[int(place[1] or k)] = re.sub(r"\{\d+\}", "{}", template[: place.end()])
  return [found[k] for k in sorted(found)]


def settle(leaves: Mapping[str, Stacked]) -> dict[str, Stack]:
  """The stacked axes, by path, of leaves for which just one candidate agrees with all leaves of the same lists.

  Where no leaf is of the same list, those nearest by path count whose axes are told. Where no candidate agrees with
  them all, a single one stands.
  """
  by_list: dict[str, dict[str, Stacked]] = {}
  for path, leaf in leaves.items():
    for name in leaf.lists:
      by_list.setdefault(name, {})[path] = leaf
  told = {path: leaf for path, leaf in leaves.items() if len(leaf.candidates) == 1}
  settled = {}
  for path, leaf in leaves.items():
    found = list(leaf.candidates)
    if len(found) > 1:
      beside = {other: x for name in leaf.lists for other, x in by_list[name].items() if other != path}
      others = list((beside or _nearest(path, told)).values())
      found = [axes for axes in found if _agrees(leaf, axes, others, same=bool(beside))]
    if len(found) == 1:
      settled[path] = found[0]
  return settled


def _nearest(path: str, leaves: Mapping[str, Stacked]) -> dict[str, Stacked]:
  """The leaves of the smallest module that this leaf is in with any of them."""
  modules = components(path)[:-1]
  for k in range(len(modules), 0, -1):
    start = "/".join(modules[:k]) + "/"
    if found := {other: leaf for other, leaf in leaves.items() if other.startswith(start) and other != path}:
      return found
  return {}


def _agrees(leaf: Stacked, axes: Stack, others: Sequence[Stacked], same: bool) -> bool:
  """Whether all other leaves may have the stacks of the same lists, or else any, on these axes, counted in one way."""
  return any(all(_shares(leaf, axes, other, same, place) for other in others) for place in _PLACES)


def _shares(
  leaf: Stacked, axes: Stack, other: Stacked, same: bool, place: Callable[[Stack, int, int], int | None]
) -> bool:
  """Whether another leaf may have its stacks on the same axes, and of the same sizes."""

  def matches(k: int, others: Stack) -> bool:
    mine = leaf.shape[axes[k]], place(axes, len(leaf.shape), k)
    counted = [n for n, name in enumerate(other.lists) if not same or name == leaf.lists[k]]
    theirs = [(other.shape[others[n]], place(others, len(other.shape), n)) for n in counted]
    return (mine[1] is not None and mine in theirs) or (same and not theirs)

  return any(all(matches(k, others) for k in range(len(axes))) for others in other.candidates)


# The place of a stacked axis: from the front, from the front without the other stacked axes, or the last.
_PLACES: Sequence[Callable[[Stack, int, int], int | None]] = (
  lambda axes, ndim, k: axes[k],
  lambda axes, ndim, k: axes[k] - sum(d < axes[k] for d in axes),
  lambda axes, ndim, k: -1 if axes[k] == ndim - 1 else None,
)


def untold(path: str, leaf: Stacked) -> str:
  """For an error message: that nothing tells a leaf's stacked axes."""
  shown = " or ".join("axis " + " and ".join(map(str, axes)) for axes in leaf.candidates[:4])
  return (
    f"{path}: nothing tells which axis of shape {leaf.shape} is that of the layers: {shown}. Say it:"
    f" axes={{{re.escape(path)!r}: roles}} with 's' for it, such as 'so' or 'os' for a vector of each layer"
  )
