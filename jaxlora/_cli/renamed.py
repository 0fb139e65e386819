"""Which tensor of a torch model each parameter of an adapter is: by `--names`, or by what is alike in the names."""

from collections.abc import Collection, Mapping
import re
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.text import listed
from jaxlora._cli.result import BadFile
from jaxlora.peft._for_leaves import named_for_leaves, targets_of_parts
from jaxlora.peft._names import Names, check_names, given_target
from jaxlora.peft._nesting import unnested
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import known_roles


def parameters_of(adapter: Adapter) -> list[str]:
  """The names of all parameters that an adapter changes; experts in one parameter are that one."""
  experts = {own for packed in adapter.packed.values() for own in packed.modules}
  plain = [f"{name}.weight" for name in adapter.modules if name not in experts]
  return [*plain, *adapter.packed, *adapter.whole, *adapter.tokens]


def tensors_of(adapter: Adapter, names: Names, shapes: Mapping[str, Any]) -> tuple[Adapter, dict[str, str]]:
  r"""The tensor of each parameter of an adapter, whether the model has it or not; and the adapter with one for each.

  Names that are not given are those of the model; or those of another version of transformers, which nests a
  vision-language model in another way; or theirs joined by `_`, as kohya's scripts do; or they differ by one beginning
  for all of them, the one with which most are found: files of a bare model lack the beginning that it has inside one
  with a head (`transformer.h.0`, `h.0`).

  Args:
    adapter: PEFT's.
    names: regex over the model's names, joined by "/" or "\." -> the adapter's name; or parts, as in `jaxlora.peft`.
    shapes: of the model's tensors by name.

  Raises:
    BadFile: where `names` does not fit, or several beginnings fit equally well.
  """
  adapter, given = _by_names(adapter, names, shapes)
  rest = [name for name in parameters_of(adapter) if name not in given]
  free = shapes.keys() - set(given.values())
  trials = [{name: name for name in rest}, _by_nesting(rest, free), _by_joining(rest, free)]
  trials += _by_beginnings(rest, free)
  found = [sum(tensor in free for tensor in trial.values()) for trial in trials]
  best = [trial for trial, count in zip(trials, found, strict=True) if count == max(found)]
  if max(found) > max(found[:3]) and any(trial != best[0] for trial in best):
    name = next(name for name in rest if len({trial[name] for trial in best}) > 1)
    several = listed(sorted({trial[name] for trial in best}))
    raise BadFile(f"{name}: may be any of {several}. Say which by --names.")
  return adapter, given | best[0]


def _by_names(adapter: Adapter, names: Names, shapes: Mapping[str, Any]) -> tuple[Adapter, dict[str, str]]:
  """The tensors that `names` gives, by the adapter's parameters."""
  if not names:
    return adapter, {}
  tensors = {name.replace(".", "/"): name for name in shapes}
  leaves = {path: jax.ShapeDtypeStruct(tuple(shapes[name]), jnp.float32) for path, name in tensors.items()}
  names = {_joined_by_slashes(pattern, leaves): value for pattern, value in names.items()}
  check_names(names, leaves)
  known = known_roles(leaves, None, None, None)
  parts, problems = targets_of_parts(leaves, names, known), list[str]()
  adapter = named_for_leaves(adapter, leaves, parts, known, problems)
  given: dict[str, str] = {}
  for path, tensor in tensors.items():
    target = parts.get(path) or given_target(path, names)
    if target is None:
      continue
    if target.stacked and target.packed is None:
      problems.append(f"{tensor}: {target.module}: a tensor of a torch model has no stacked layers: leave out the {{}}")
    name = target.packed or f"{target.module}.{target.parameter or 'weight'}"
    if name in given:
      problems.append(f"{tensor}, {given[name]}: both are {name}. Tell them apart by --names")
    given[name] = tensor
  if problems:
    raise BadFile("--names: " + "; ".join(problems))
  parameters = set(parameters_of(adapter))
  return adapter, {name: tensor for name, tensor in given.items() if name in parameters}


def _joined_by_slashes(pattern: str, paths: Collection[str]) -> str:
  r"""A pattern over names joined by "/"; one that joins them by `\.`, as torch does, is rewritten."""
  matches = lambda one: any(re.fullmatch(one, text) for path in paths for text in (path, path.rpartition("/")[0]))
  try:
    return pattern if matches(pattern) or not matches(pattern.replace(r"\.", "/")) else pattern.replace(r"\.", "/")
  except re.error:
    return pattern  # `check_names` says what is wrong with it


def _by_nesting(names: Collection[str], tensors: Collection[str]) -> dict[str, str]:
  """The tensors that are called alike once the nesting of vision-language models is left out."""
  found: dict[tuple[str, ...], list[str]] = {}
  for tensor in tensors:
    found.setdefault(unnested(tuple(tensor.split("."))), []).append(tensor)
  alike = {name: found.get(unnested(tuple(name.split("."))), []) for name in names}
  return {name: name if name in tensors or len(own) != 1 else own[0] for name, own in alike.items()}


def _by_joining(names: Collection[str], tensors: Collection[str]) -> dict[str, str]:
  """The tensors whose names are these once the components are joined by `_`, as kohya's scripts do."""
  found: dict[str, list[str]] = {}
  for tensor in tensors:
    module, _, parameter = tensor.rpartition(".")
    found.setdefault(f"{module.replace('.', '_')}.{parameter}", []).append(tensor)
  return {name: own[0] if len(own := found.get(name, [])) == 1 else name for name in names}


def _by_beginnings(names: Collection[str], tensors: Collection[str]) -> list[dict[str, str]]:
  """The tensors with one beginning taken off all names, or put before them."""
  beginnings = sorted({name.split(".", 1)[0] + "." for name in (*names, *tensors)})
  changes = [*((b, "") for b in beginnings), *(("", b) for b in beginnings)]  # (removed, added)
  return [{name: added + name.removeprefix(removed) for name in names} for removed, added in changes]
