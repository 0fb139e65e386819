"""How the paths of a tree and the names of torch's modules meet."""

from collections.abc import Collection, Iterable, Mapping, Sequence
import dataclasses
import itertools
import re

from jaxlora import _paths
from jaxlora._peft_file import PeftError

Names = Mapping[str, str] | None
Key = tuple[str, str]  # a torch module's name, and its parameter

# What torch calls the leaves of Flax's layers; a leaf of another name is the weight of a module of its own name.
PARAMETERS = {
  "kernel": "weight",
  "embedding": "weight",
  "scale": "weight",
  "weight": "weight",
  "w": "weight",
  "bias": "bias",
  "b": "bias",
}
# Modules that are lists in torch: `layers_0` and `layers/0` are `layers.0`, a scanned `layers` is all of `layers.{}`.
_LISTS = ("layers", "layer", "h", "blocks", "block", "stages", "experts")
_NUMBERED = re.compile(rf"({'|'.join(_LISTS)})_(\d+)")
# What the models of the Hugging Face Hub begin with, told by the first component without it.
_BEGINNINGS = {
  **dict.fromkeys(("h", "wte", "wpe", "ln_f"), "transformer"),
  **dict.fromkeys(("layers", "embed_tokens", "norm"), "model"),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """The torch parameter that a leaf is.

  Attributes:
    module: name of the module; `{}` stands for the index along a stacked axis.
    parameter: `weight` or `bias`; `None` for a leaf that Flax's layers do not have.
    stacked: how many stacked axes the name has places for.
  """

  module: str
  parameter: str | None
  stacked: int

  def name(self, index: Sequence[int]) -> str:
    return self.module.format(*index) if self.stacked else self.module


def split_path(path: str) -> tuple[str, str | None]:
  """The path of the module that a leaf belongs to, and torch's name for the leaf, if it has one."""
  *modules, leaf = _paths.components(path)
  if leaf in PARAMETERS and modules:
    return "/".join(modules), PARAMETERS[leaf]
  return path, None


def key_of(parameter: str) -> Key:
  """`classifier.weight` in two."""
  module, _, name = parameter.rpartition(".")
  return module, name


def check_names(names: Names, paths: Collection[str]) -> None:
  """Raises unless `names` maps regexes to strings, and each matches something."""
  if names is None:
    return
  if not isinstance(names, Mapping) or not all(isinstance(x, str) for item in names.items() for x in item):
    raise TypeError(f"names: found {names!r}, expected a dict of regexes over paths and the torch names they become.")
  for pattern in names:
    try:
      regex = re.compile(pattern)
    except re.error as error:
      raise ValueError(f"names: {pattern!r} is not a regular expression ({error}).") from error
    if not any(_match(regex, path) for path in paths):
      raise PeftError(
        f"names: {pattern!r} matches none of the {len(paths)} leaves (a regex must match a whole path, or that of the"
        f" leaf's module). Nearest: {', '.join(_paths.nearest(pattern, paths))}."
      )


def _match(pattern: re.Pattern[str], path: str) -> re.Match[str] | None:
  return pattern.fullmatch(path) or pattern.fullmatch(split_path(path)[0])


def given_target(path: str, names: Names) -> Target | None:
  """What `names` says of a leaf."""
  for pattern, template in (names or {}).items():
    found = _match(re.compile(pattern), path)
    if found is None:
      continue
    try:
      name = found.expand(template)
      places = len(re.findall(r"\{\d*\}", name))
      name.format(*range(places))
    except (re.error, IndexError, KeyError, ValueError) as error:
      raise ValueError(
        f"names[{pattern!r}]: {template!r} is no template ({error}); expected a torch module's name, with \\1 for a"
        " group of the pattern and {} for the index of a stacked layer."
      ) from error
    module, parameter = name, split_path(path)[1]
    for ending in ("weight", "bias"):
      if name.endswith(f".{ending}"):
        module, parameter = name.removesuffix(f".{ending}"), ending
    return Target(module, parameter, places)
  return None


def default_target(path: str, stacked: int) -> Target:
  """What a leaf is called by the habits of the Hugging Face Hub."""
  module, parameter = split_path(path)
  parts = _tokens(module, numbered=_NUMBERED)
  if stacked:
    places = scanned_lists(parts)
    if len(places) != stacked:
      raise PeftError(
        f"{path}: nothing tells where torch's name has the index of its {stacked} stacked axis. Say it:"
        f" names={{{re.escape(module)!r}: 'the.module.{{}}.name'}}, with {{}} for the index"
      )
    for k in reversed(places):
      parts.insert(k + 1, "{}")
  beginning = _BEGINNINGS.get(parts[0])
  return Target(".".join([beginning, *parts] if beginning else parts), parameter, stacked)


def scanned_lists(parts: Sequence[str]) -> list[int]:
  """Which components name a list of modules whose index does not follow: those of scanned layers."""
  return [k for k, part in enumerate(parts) if part in _LISTS and not "".join(parts[k + 1 : k + 2]).isdecimal()]


def _tokens(name: str, numbered: re.Pattern[str] = re.compile(r"(.+)_(\d+)")) -> list[str]:
  """A path or a name in parts: `layers_0` is two of them. `params` is Flax's, and part of no name."""
  parts = [part for part in re.split(r"[/.]", name) if part]
  if parts[:1] == ["params"] and len(parts) > 1:
    parts = parts[1:]
  found = [(part, numbered.fullmatch(part)) for part in parts]
  return [piece for part, match in found for piece in (match.groups() if match else (part,))]


# ----------------------------------------------------------------------------------------------------------------------
# From torch's names to leaves.


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
      near = (
        ", ".join(_paths.nearest(key[0].replace(".", "/"), paths)) if len(problems) < _MOST_NEAR else "not looked for"
      )
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
    leaves.setdefault((tuple(_tokens(module)), parameter or "weight"), []).append(path)
  tokens = {key: tuple(_tokens(key[0])) for key in wanted}

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


def ends_with(path: str, ending: str) -> bool:
  """Whether a leaf is the weight of a module whose name in torch ends so, as PEFT's `target_modules` say it."""
  module, parameter = split_path(path)
  want, have = _tokens(ending), _tokens(module)
  return parameter == "weight" and bool(want) and have[-len(want) :] == want
