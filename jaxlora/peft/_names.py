"""How the paths of a tree and the names of torch's modules meet."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import re

from jaxlora._base.paths import components
from jaxlora._base.patterns import nearest
from jaxlora.peft._records import PeftError

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
  *modules, leaf = components(path)
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
        f" leaf's module). Nearest: {', '.join(nearest(pattern, paths))}."
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
  parts = name_tokens(module, numbered=_NUMBERED)
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


def name_tokens(name: str, numbered: re.Pattern[str] = re.compile(r"(.+)_(\d+)")) -> list[str]:
  """A path or a name in parts: `layers_0` is two of them. `params` is Flax's, and part of no name."""
  parts = [part for part in re.split(r"[/.]", name) if part]
  if parts[:1] == ["params"] and len(parts) > 1:
    parts = parts[1:]
  found = [(part, numbered.fullmatch(part)) for part in parts]
  return [piece for part, match in found for piece in (match.groups() if match else (part,))]


def ends_with(path: str, ending: str) -> bool:
  """Whether a leaf is the weight of a module whose name in torch ends so, as PEFT's `target_modules` say it."""
  module, parameter = split_path(path)
  want, have = name_tokens(ending), name_tokens(module)
  return parameter == "weight" and bool(want) and have[-len(want) :] == want
