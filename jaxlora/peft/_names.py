"""The torch names of a tree's leaves: those that the user gives, and the defaults."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import re
from typing import Any

from jaxlora._base.paths import components
from jaxlora._base.patterns import nearest
from jaxlora.peft._parts import Experts, Joined, Parts, Split
from jaxlora.peft._records import PeftError

# Regex over paths -> name of a torch module, or what the leaf has to do with several, as `save` takes them.
Names = Mapping[str, str | Parts | Experts] | None

Key = tuple[str, str]  # a torch module's name, and the name of its parameter


# Torch's names for the leaves of Flax's layers. A leaf of another name is the weight of a module of its own.
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

_NUMBERED_LIST = re.compile(rf"({'|'.join(_LISTS)})_(\d+)")

_NUMBERED = re.compile(r"(.+)_(\d+)")

# Lists in diffusers' models, whose Flax twins call their members `attentions_0`; and what such a model has of them.
_IN_DIFFUSERS = re.compile(
  r"(down_blocks|up_blocks|attentions|resnets|transformer_blocks|single_transformer_blocks|motion_modules|downsamplers"
  r"|upsamplers|to_out|net|layers|blocks)_(\d+)"
)

_DIFFUSERS = re.compile(r"(?:down_blocks|up_blocks|transformer_blocks|single_transformer_blocks)(?:_\d+)?|mid_block")

# The first component of the Hugging Face Hub's models, by the component that follows it.
_BEGINNINGS = {
  **dict.fromkeys(("h", "wte", "wpe", "ln_f"), "transformer"),
  **dict.fromkeys(("layers", "embed_tokens", "norm"), "model"),
}


@dataclasses.dataclass(frozen=True)
class Target:
  """The torch parameter that a leaf is.

  Attributes:
    module: name of the module; `{}` stands for the index along a stacked axis. With `parts` it is a name for the leaf
      alone, which no torch module has.
    parameter: `weight` or `bias`; `None` for a leaf that Flax's layers do not have.
    stacked: how many stacked axes the name has places for.
    parts: what the leaf has to do with the torch modules of `modules`, where that is not one of it.
    modules: with `parts`, torch's names: of all modules of a `Split`, of the one of a `Joined`.
    part: the leaf's position among the parts of a `Joined`.
    over_stack: whether the modules of a `Split` lie along a stacked axis, the last, and not among the outputs.
    packed: the torch parameter that holds the modules along the last stacked axis, all experts, where one does.
  """

  module: str
  parameter: str | None
  stacked: int
  parts: Parts | None = None
  modules: tuple[str, ...] = ()
  part: int = 0
  over_stack: bool = False
  packed: str | None = None

  def name(self, index: Sequence[int]) -> str:
    """The module's name at an index along the stacked axes."""
    return self.module.format(*index) if self.stacked else self.module

  def torch_names(self, index: Sequence[int]) -> list[str]:
    """The names of the torch modules at an index along the stacked axes: several for a `Split`."""
    if self.parts is None:
      return [self.name(index)]
    names = [module.format(*index) for module in self.modules]
    return [names[index[-1]]] if self.over_stack else names

  def laid_out(self, roles: str | None, shape: Sequence[int]) -> "Target":
    """The target of a leaf whose modules may lie along a stacked axis: its roles tell, or an axis before two others."""
    if not isinstance(self.parts, Split) or self.over_stack or self.parameter == "bias":
      return self
    layer = shape[self.stacked :]
    if roles is not None:
      along_stack = roles.count("s") == self.stacked + 1
    else:
      along_stack = self.parts.groups == 1 < len(self.modules) and len(layer) >= 3 and layer[0] == len(self.modules)
    if not along_stack:
      return self
    module = f"{self.module}[{{{self.stacked}}}]"
    return dataclasses.replace(self, module=module, stacked=self.stacked + 1, over_stack=True)


def expert_name(parameter: str, expert: int | str | None) -> str:
  """`...experts.gate_up_proj`, 3 -> `...experts.3.gate_up_proj`; a layer's `weight` is called like the layer."""
  root, _, name = parameter.rpartition(".")
  parts = [root, *([] if expert is None else [str(expert)]), *([] if name == "weight" else [name])]
  return ".".join(parts)


def split_path(path: str) -> tuple[str, str | None]:
  """The path of a leaf's module, and torch's name for the leaf; the whole path and `None` where torch has none."""
  *modules, leaf = components(path)
  if leaf in PARAMETERS and modules:
    return "/".join(modules), PARAMETERS[leaf]
  return path, None


def module_of(path: str) -> str:
  """The name that a leaf's module has in torch, but for the indices of layers."""
  return split_path(path)[0].replace("/", ".").removeprefix("params.")


def key_of(parameter: str) -> Key:
  """`head.classifier.weight` -> `head.classifier`, `weight`. A parameter of another name is a module of its own."""
  module, _, name = parameter.rpartition(".")
  return (module, name) if name in ("weight", "bias") else (parameter, "weight")


def check_names(names: Names, paths: Collection[str]) -> None:
  """Raises unless `names` maps regexes to strings or parts, and each matches a leaf."""
  if names is None:
    return
  check_types(names)
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


def check_types(names: Any) -> None:
  """Raises a `TypeError` unless `names` maps strings to strings or parts."""
  if not isinstance(names, Mapping) or not all(
    isinstance(pattern, str) and isinstance(value, (str, Split, Joined, Experts)) for pattern, value in names.items()
  ):
    raise TypeError(
      f"names: found {names!r}, expected a dict of regexes over paths and the torch names they become, or Split,"
      " Joined and Experts of jaxlora.peft."
    )


def _match(pattern: re.Pattern[str], path: str) -> re.Match[str] | None:
  return pattern.fullmatch(split_path(path)[0]) or pattern.fullmatch(path)


def given_target(path: str, names: Names) -> Target | None:
  """The torch parameter of a leaf by the first of the user's `names` that matches; `None` if none does.

  Raises:
    PeftError: where a leaf that is to be joined with others does not tell which part it is.
    ValueError: where a name is no template.
  """
  for pattern, value in (names or {}).items():
    found = _match(re.compile(pattern), path)
    if found is None:
      continue
    if isinstance(value, str):
      module, stacked = _expanded(pattern, found, value)
      module, parameter = _without_parameter(path, module)
      return Target(module, parameter, stacked)
    if isinstance(value, Experts):
      name, stacked = _expanded(pattern, found, value.parameter)
      name = _numbered(name)
      return Target(expert_name(name, f"{{{stacked}}}"), "weight", stacked + 1, packed=name)
    return _target_of_parts(path, value, pattern, found)
  return None


def _expanded(pattern: str, found: re.Match[str], template: str) -> tuple[str, int]:
  """A template with the groups of a match put in, and the number of its places for an index."""
  try:
    name = found.expand(template).replace("/", ".")  # a group may hold several components of the path
    stacked = len({number or k for k, number in enumerate(re.findall(r"\{(\d*)\}", name))})
    name.format(*range(stacked))
  except (re.error, IndexError, KeyError, ValueError) as error:
    raise ValueError(
      f"names[{pattern!r}]: {template!r} is no template ({error}); expected a torch module's name, with \\1 for a"
      " group of the pattern and {} for the index of a stacked layer."
    ) from error
  if re.search(r"(?:^|\.)\{\d*\}[^.]", name):
    raise ValueError(
      f"names[{pattern!r}]: {template!r}: {{}} is the index of a layer, and no module of torch has a name that begins"
      " with a number. Name modules that lie along an axis one by one: jaxlora.peft.Split((name, name))."
    )
  return name, stacked


def _without_parameter(path: str, name: str) -> tuple[str, str | None]:
  """A module and its parameter, which a name may end with; else the leaf's own name tells it."""
  for ending in ("weight", "bias"):
    if name.endswith(f".{ending}"):
      return name.removesuffix(f".{ending}"), ending
  return name, split_path(path)[1]


def _target_of_parts(path: str, parts: Parts, pattern: str, found: re.Match[str]) -> Target:
  """The target of a leaf that is a whole of several modules, or a part of one."""
  templates = parts.modules if isinstance(parts, Split) else (parts.module,)
  expanded = [_expanded(pattern, found, template) for template in templates]
  if len({stacked for _, stacked in expanded}) > 1:
    raise ValueError(f"names[{pattern!r}]: {tuple(templates)} have different numbers of places for an index.")
  pairs = [_without_parameter(path, name) for name, _ in expanded]
  modules = tuple(_numbered(module) for module, _ in pairs)
  parameter, stacked = pairs[0][1], expanded[0][1]
  if isinstance(parts, Split):
    return Target(f"[{' | '.join(modules)}]", parameter, stacked, parts, modules)
  own = [part for part in parts.parts if part in components(path)]
  if len(own) != 1:
    raise PeftError(
      f"names[{pattern!r}]: {path}: its path holds {len(own)} of the components {', '.join(parts.parts)}; expected one,"
      " which tells what part of the module it is."
    )
  return Target(f"{modules[0]}[{own[0]}]", parameter, stacked, parts, modules, list(parts.parts).index(own[0]))


def _numbered(template: str) -> str:
  """`layers.{}.experts.{}` -> `layers.{0}.experts.{1}`."""
  count = iter(range(len(template)))
  return re.sub(r"\{\}", lambda _: f"{{{next(count)}}}", template)


def default_target(path: str, stacked: int) -> Target:
  """The torch parameter of a leaf with so many stacked axes, named as models on the Hugging Face Hub name theirs.

  Raises:
    PeftError: if the path does not show where the name has the index along the stacked axes.
  """
  module, parameter = split_path(path)
  of_diffusers = any(map(_DIFFUSERS.fullmatch, components(module)))
  parts = name_parts(module, numbered=_IN_DIFFUSERS if of_diffusers else _NUMBERED_LIST)
  if not parts or (stacked and any(brace in module for brace in "{}")):
    raise PeftError(
      f"{path}: no name for a torch module, which has components, and braces only for the index of a stacked layer. Say"
      f" one: names={{{re.escape(path)!r}: 'the.module.name'}}"
    )
  if stacked:
    lists = scanned_lists(parts)
    if len(lists) != stacked:
      raise PeftError(
        f"{path}: nothing tells where torch's name has the index of its {stacked} stacked axis. Say it:"
        f" names={{{re.escape(module)!r}: 'the.module.{{}}.name'}}, with {{}} for the index"
      )
    for k in reversed(lists):
      parts.insert(k + 1, "{}")
  beginning = _BEGINNINGS.get(parts[0])
  return Target(".".join([beginning, *parts] if beginning else parts), parameter, stacked)


def scanned_lists(parts: Sequence[str]) -> list[int]:
  """The positions of components that name a list of modules and have no index behind them: scanned layers."""
  return [k for k, part in enumerate(parts) if part in _LISTS and not "".join(parts[k + 1 : k + 2]).isdecimal()]


def name_parts(name: str, numbered: re.Pattern[str] = _NUMBERED) -> list[str]:
  """The components of a path or a name; `layers_0` is two, and the `params` that Flax begins with is left out."""
  parts = [part for part in re.split(r"[/.]", name) if part]
  while parts[:1] == ["params"] and len(parts) > 1:
    parts = parts[1:]
  found = [(part, numbered.fullmatch(part)) for part in parts]
  return [piece for part, match in found for piece in (match.groups() if match else (part,))]


def name_ends_with(path: str, ending: str) -> bool:
  """Whether a leaf is the weight of a module whose torch name ends so, which is how `target_modules` picks modules."""
  module, parameter = split_path(path)
  expected, found = name_parts(ending), name_parts(module)
  return parameter == "weight" and bool(expected) and found[-len(expected) :] == expected
