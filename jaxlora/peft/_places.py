"""From torch's names to leaves."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import itertools
import re

from jaxlora._base.patterns import nearest
from jaxlora.peft._names import Key, Names, Target, given_target, name_tokens, split_path


@dataclasses.dataclass(frozen=True)
class Place:
  """Where something of a file belongs: a leaf, and the index along its stacked axes."""

  path: str
  index: tuple[int, ...] = ()


def find_places(wanted: Iterable[Key], paths: Collection[str], names: Names) -> tuple[dict[Key, Place], dict[Key, str]]:
  """The leaf of each (module, parameter) of a file, and what is wrong with those that have none, or may have several.

  Where `names` says nothing, names meet if their parts are the same: as they are, or after one beginning that the tree
  or the file lacks, the same one for all of the file (`transformer.h.0` and `h/0`), or without the index of a stacked
  layer.
  """
  wanted = list(wanted)
  given = {path: target for path in paths if (target := given_target(path, names)) is not None}
  candidates = _by_given_names(wanted, given)
  rest = [key for key in wanted if key not in candidates]
  candidates |= _by_likeness(rest, [path for path in paths if path not in given])
  places, problems = {}, {}
  owners: dict[Place, list[Key]] = {}
  for key in wanted:
    found = candidates.get(key, [])
    if len(found) == 1:
      places[key] = found[0]
      owners.setdefault(found[0], []).append(key)
    elif found:
      listed = ", ".join(sorted({place.path for place in found}))
      problems[key] = f"{'.'.join(key)}: may be any of {listed}. Say which by names="
    else:
      near = ", ".join(nearest(key[0].replace(".", "/"), paths)) if len(problems) < _MOST_NEAR else "not looked for"
      problems[key] = f"{'.'.join(key)}: no leaf of the tree is called so. Nearest: {near}. Say which by names="
  for place, keys in owners.items():
    if len(keys) > 1:
      listed = ", ".join(".".join(key) for key in keys)
      problems[keys[0]] = f"{place.path}: {listed} all have its name. Tell them apart by names="
  return places, problems


_MOST_NEAR = 5  # likeness is slow to tell, and a file may hold any number of names


def _by_given_names(wanted: Sequence[Key], given: Mapping[str, Target]) -> dict[Key, list[Place]]:
  exact: dict[Key, list[Place]] = {}
  stacks = []
  for path, target in given.items():
    parameter = target.parameter or "weight"
    if target.stacked:
      stacks.append((path, *_index_pattern(target.module), parameter))
    else:
      exact.setdefault((target.module, parameter), []).append(Place(path))
  result = {}
  for key in wanted:
    found = list(exact.get(key, []))
    for path, regex, order, parameter in stacks:
      if parameter == key[1] and (match := regex.fullmatch(key[0])):
        found.append(Place(path, tuple(int(match.group(1 + order.index(k))) for k in range(len(order)))))
    if found:
      result[key] = found
  return result


def _index_pattern(template: str) -> tuple[re.Pattern[str], list[int]]:
  """A regex for the names that a template makes, and which index each of its groups is."""
  pieces = re.split(r"\{(\d*)\}", template)
  order = [int(number) if number else k for k, number in enumerate(pieces[1::2])]
  return re.compile(r"(\d{1,6})".join(re.escape(piece) for piece in pieces[::2])), order


def _by_likeness(wanted: Sequence[Key], paths: Collection[str]) -> dict[Key, list[Place]]:
  leaves: dict[tuple[tuple[str, ...], str], list[str]] = {}
  for path in paths:
    module, parameter = split_path(path)
    leaves.setdefault((tuple(name_tokens(module)), parameter or "weight"), []).append(path)
  tokens = {key: tuple(name_tokens(key[0])) for key in wanted}

  def look_up(key: Key, drop: tuple[str, ...] = (), add: tuple[str, ...] = ()) -> list[Place]:
    """The leaves of a name, once it begins otherwise."""
    if tokens[key][: len(drop)] != drop:
      return []
    parts = (*add, *tokens[key][len(drop) :])
    if (parts, key[1]) in leaves:
      return [Place(path) for path in leaves[parts, key[1]]]
    numbers = [k for k, part in enumerate(parts) if part.isdecimal() and len(part) <= 6]
    for count in (1, 2):
      several = [
        Place(path, tuple(int(parts[k]) for k in out))
        for out in itertools.combinations(numbers[:4], count)
        for path in leaves.get((tuple(part for k, part in enumerate(parts) if k not in out), key[1]), [])
      ]
      if several:
        return several
    return []

  found = {key: places for key in wanted if (places := look_up(key))}
  rest = [key for key in wanted if key not in found]
  sides = ([tokens[key] for key in rest], [parts for parts, _ in leaves])
  file, tree = ({parts[:k] for parts in side for k in (1, 2)} for side in sides)
  ways = [(way, ()) for way in file if not _has_number(way)] + [((), way) for way in tree if not _has_number(way)]
  if len(ways) * len(rest) > _MOST_TRIALS:  # names without a beginning in common are not those of one model
    return found
  results = [{key: places for key in rest if (places := look_up(key, *way))} for way in ways]
  most = max(map(len, results), default=0)
  for key in rest:
    best = [place for result in results if len(result) == most for place in result.get(key, [])]
    if best:
      found[key] = sorted(set(best), key=lambda place: (place.path, place.index))
  return found


_MOST_TRIALS = 10**6


def _has_number(parts: Sequence[str]) -> bool:
  return any(part.isdecimal() for part in parts)
