"""The leaves of a tree that the parameters of a torch model belong to."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import itertools
import re
import types

from jaxlora._base.patterns import nearest
from jaxlora.peft._names import Key, Names, Target, given_target, name_parts, split_path
from jaxlora.peft._nesting import unnested


@dataclasses.dataclass(frozen=True)
class Place:
  """Where a torch parameter belongs: a leaf, and the index along its stacked axes."""

  path: str
  index: tuple[int, ...] = ()


def find_places(
  keys: Iterable[Key], paths: Collection[str], names: Names, parts: Mapping[str, Target] = types.MappingProxyType({})
) -> tuple[dict[Key, Place], dict[Key, str]]:
  """The leaf of each torch parameter, and what is wrong with those that belong to no leaf, or may belong to several.

  Leaves that `names` does not match are found by their components, which must be those of the parameter's name: as they
  are; without the index of a stacked layer; as another version of transformers nests a vision-language model; joined by
  `_`, as kohya's scripts do; or after one beginning that the tree or the file lacks (`transformer.h.0` and `h/0`), the
  same one for all parameters.

  Args:
    keys: the parameters.
    paths: of the leaves.
    names: as for `load`.
    parts: the targets of leaves that are no one torch module, by path, once it is known how they are stacked.
  """
  keys = list(keys)
  given = {path: target for path in paths if (target := given_target(path, names)) is not None} | dict(parts)
  candidates = _places_by_given_names(keys, given)
  rest = [key for key in keys if key not in candidates]
  candidates |= _places_by_components(rest, [path for path in paths if path not in given])
  places: dict[Key, Place] = {}
  problems: dict[Key, str] = {}
  owners: dict[Place, list[Key]] = {}
  for key in keys:
    found = candidates.get(key, [])
    if len(found) == 1:
      places[key] = found[0]
      owners.setdefault(found[0], []).append(key)
    elif found:
      listed = ", ".join(sorted({place.path for place in found}))
      problems[key] = (
        f"{'.'.join(key)}: may be any of {listed}. Say which by names=; if they are its parts, with"
        " jaxlora.peft.Joined(module, parts)"
      )
    else:
      near = ", ".join(nearest(key[0].replace(".", "/"), paths)) if len(problems) < _MOST_NEAR else "not looked for"
      problems[key] = f"{'.'.join(key)}: no leaf of the tree is called so. Nearest: {near}. Say which by names="
  for place, owning in owners.items():
    if len(owning) > 1:
      listed = ", ".join(".".join(key) for key in owning)
      problems[owning[0]] = f"{place.path}: {listed} all have its name. Tell them apart by names="
  return places, problems


_MOST_NEAR = 5  # finding the nearest names is slow, and a file may hold any number of names


def _places_by_given_names(keys: Sequence[Key], given: Mapping[str, Target]) -> dict[Key, list[Place]]:
  """The candidates among leaves that the user named."""
  exact: dict[Key, list[Place]] = {}
  stacks = []
  for path, target in given.items():
    parameter = target.parameter or "weight"
    if target.stacked:
      stacks.append((path, *index_pattern(target.module), parameter))
    else:
      exact.setdefault((target.module, parameter), []).append(Place(path))
  candidates = {}
  for key in keys:
    found = list(exact.get(key, []))
    for path, regex, order, parameter in stacks:
      if parameter == key[1] and (match := regex.fullmatch(key[0])):
        found.append(Place(path, index_of(match, order)))
    if found:
      candidates[key] = found
  return candidates


def index_pattern(template: str) -> tuple[re.Pattern[str], list[int]]:
  """A regex for the names that a template makes, and the number of the index that each group of it holds.

  An index that a template holds more than once has one group: the others must be equal.
  """
  pieces = re.split(r"\{(\d*)\}", template)
  numbers = [int(number) if number else k for k, number in enumerate(pieces[1::2])]
  order = list(dict.fromkeys(numbers))
  regex = re.escape(pieces[0])
  for k, (number, piece) in enumerate(zip(numbers, pieces[2::2], strict=True)):
    again = number in numbers[:k]
    regex += (rf"(?:\{order.index(number) + 1})" if again else r"(\d{1,6})") + re.escape(piece)
  return re.compile(regex), order


def index_of(match: re.Match[str], order: Sequence[int]) -> tuple[int, ...]:
  """The index along the stacked axes that a match of an `index_pattern` holds."""
  return tuple(int(match.group(1 + order.index(k))) for k in range(len(order)))


Parts = tuple[str, ...]  # the components of a name

_Leaves = Mapping[tuple[Parts, str], list[str]]  # by components and parameter: paths


def _places_by_components(keys: Sequence[Key], paths: Collection[str]) -> dict[Key, list[Place]]:
  """The candidates among leaves whose names are not given, by the components of their paths."""
  leaves: dict[tuple[Parts, str], list[str]] = {}
  for path in paths:
    module, parameter = split_path(path)
    leaves.setdefault((tuple(name_parts(module)), parameter or "weight"), []).append(path)
  parts = {key: tuple(name_parts(key[0])) for key in keys}
  candidates = {key: found for key in keys if (found := _leaves_called(parts[key], key[1], leaves))}
  moved: dict[tuple[Parts, str], list[str]] = {}
  for (leaf_parts, parameter), called in leaves.items():
    moved.setdefault((unnested(leaf_parts), parameter), []).extend(called)
  candidates |= {
    key: found
    for key in keys
    if key not in candidates and (found := _leaves_called(unnested(parts[key]), key[1], moved))
  }
  flat: dict[tuple[str, str], list[Place]] = {}
  for (leaf_parts, parameter), called in leaves.items():
    flat.setdefault(("_".join(leaf_parts), parameter), []).extend(map(Place, called))
  candidates |= {key: flat[key] for key in keys if key not in candidates and "." not in key[0] and key in flat}
  rest = [key for key in keys if key not in candidates]
  # Each change takes a beginning off the file's names, or puts one of the tree's before them.
  file_beginnings = _beginnings(parts[key] for key in rest)
  tree_beginnings = _beginnings(leaf_parts for leaf_parts, _ in leaves)
  changes: list[tuple[Parts, Parts]] = [*((b, ()) for b in file_beginnings), *(((), b) for b in tree_beginnings)]
  if len(changes) * len(rest) > _MOST_TRIALS:  # one model's names have few beginnings
    return candidates
  trials = []
  for removed, added in changes:
    renamed = {key: (*added, *parts[key][len(removed) :]) for key in rest if parts[key][: len(removed)] == removed}
    trials.append({key: found for key in renamed if (found := _leaves_called(renamed[key], key[1], leaves))})
  most = max(map(len, trials), default=0)
  for key in rest:
    best = {place for trial in trials if len(trial) == most for place in trial.get(key, [])}
    if best:
      candidates[key] = sorted(best, key=lambda place: (place.path, place.index))
  return candidates


_MOST_TRIALS = 10**6


def _beginnings(names: Iterable[Parts]) -> set[Parts]:
  """The first one or two components of names, without those that hold an index."""
  found = {parts[:k] for parts in names for k in (1, 2)}
  return {beginning for beginning in found if not any(part.isdecimal() for part in beginning)}


def _leaves_called(parts: Parts, parameter: str, leaves: _Leaves) -> list[Place]:
  """The leaves with these components: all of them, or all but one or two numbers, which are indices of a stack."""
  if (parts, parameter) in leaves:
    return [Place(path) for path in leaves[parts, parameter]]
  numbers = [k for k, part in enumerate(parts) if part.isdecimal() and len(part) <= 6]
  for count in (1, 2):
    found = [
      Place(path, tuple(int(parts[k]) for k in left_out))
      for left_out in itertools.combinations(numbers[:4], count)
      for path in leaves.get((tuple(part for k, part in enumerate(parts) if k not in left_out), parameter), [])
    ]
    if found:
      return found
  return []
