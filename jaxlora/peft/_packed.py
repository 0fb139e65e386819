"""`target_parameters`: LoRA on one parameter that holds all experts, as one module for each expert, and back.

PEFT's lora_A is (experts * rank, in), an expert's rows one behind the other; its lora_B is (out, rank * experts), where
the experts of one rank lie together. Which axis of the parameter A belongs to depends on PEFT's version: up to 0.18 on
the axis before the last, later on the last, unless the model calls it transposed.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import math
import re
from typing import Any

import numpy as np

from jaxlora.peft._names import expert_name
from jaxlora.peft._records import Module, Packed

Parts = Mapping[str, np.ndarray]

_INNER = ".base_layer"

_FIRST = ("gate_up_proj", "mlp1_weight")  # of two parameters of the same experts, the one that their module has first


def packed_parts(
  parts_by_module: dict[str, dict[str, np.ndarray]], config: Mapping[str, Any], problems: list[str]
) -> dict[str, Parts]:
  """Takes the factors of adapted parameters out of `parts_by_module`, and returns them by the parameter's name.

  PEFT wraps the module of a parameter once for each: `experts.base_layer` is the first of them, `experts` the last.
  """
  targets = config.get("target_parameters")
  if not targets:
    return {}
  if not isinstance(targets, list) or not all(isinstance(name, str) and name for name in targets):
    problems.append(f"target_parameters: found {targets!r}, expected a list of names")
    return {}
  wraps: dict[str, list[str]] = {}  # the module of some parameters -> its names, from the inside
  for name in sorted(parts_by_module, key=lambda name: -name.count(_INNER)):
    root = name.split(_INNER)[0] if name.endswith(_INNER) else name
    wraps.setdefault(root, []).append(name)
  found: dict[str, Parts] = {}
  for root, names in wraps.items():
    parameters = _parameters_of(root, targets, config)
    if not parameters:
      continue
    if len(parameters) != len(names):
      problems.append(
        f"{root}: target_parameters names {', '.join(parameters)} of it, the file holds factors for {len(names)}"
      )
      continue
    parts = [parts_by_module.pop(name) for name in names]
    ordered = parameters if len(parts) == 1 else _in_order(parameters, parts)
    if ordered is None:
      problems.append(
        f"{root}: nothing tells which of its {len(parts)} factors are those of {', '.join(parameters)}. Merge the"
        " adapter in PEFT (merge_and_unload)"
      )
      continue
    found |= {f"{root}.{name}": held for name, held in zip(ordered, parts, strict=True)}
  problems += [
    f"target_parameters: names {target!r}, but the file holds no factors for it"
    for target in targets
    if not problems and not any(f".{name}".endswith(f".{target}") for name in found)
  ]
  return found


def _parameters_of(root: str, targets: Iterable[str], config: Mapping[str, Any]) -> list[str]:
  """The parameters of a module that PEFT adapts by their names."""
  modules = config.get("target_modules")
  adapted = isinstance(modules, list) and any(f".{root}".endswith(f".{name}") for name in modules)
  found = []
  for target in sorted(targets):
    module, _, parameter = target.rpartition(".")
    if f".{root}".endswith(f".{module}") if module else not adapted:
      found.append(parameter)
  return list(dict.fromkeys(found))


def _in_order(parameters: Sequence[str], parts: Sequence[Parts]) -> list[str] | None:
  """The parameters of several factors, from the inside, by the order in which models have them; else by their sizes."""
  if len(parameters) != 2:
    return None
  firsts = [name for name in parameters if name in _FIRST]
  if len(firsts) != 1:
    return None
  order = [*firsts, *(name for name in parameters if name not in _FIRST)]
  fits = [_orientation(gate_up, down) is not None for gate_up, down in (parts, parts[::-1])]
  return order if fits[0] or not fits[1] else order[::-1]


def _orientation(gate_up: Parts, down: Parts) -> bool | None:
  """Whether A belongs to the outputs, by the sizes of a gate and up projection and of the one down; else `None`."""
  if not ("a" in gate_up and "b" in gate_up and "a" in down and "b" in down):
    return None
  (ins, outs), (inner, out) = ((part["a"].shape[1], part["b"].shape[0]) for part in (gate_up, down))
  if ins == out and outs == 2 * inner:
    return False
  if outs == inner and ins == 2 * out:
    return True
  return None


def unpacked(
  parts: Mapping[str, Parts],
  ranks: Mapping[str, Any],
  alphas: Mapping[str, Any],
  config: Mapping[str, Any],
  problems: list[str],
) -> tuple[dict[str, Module], dict[str, Packed]]:
  """The module of each expert, and what belongs together.

  Args:
    parts: the factors of each adapted parameter, as `packed_parts` returns them.
    ranks: of one expert, by parameter.
    alphas: by parameter.
    config: `adapter_config.json`.
    problems: what is wrong is added to these.
  """
  modules: dict[str, Module] = {}
  packed: dict[str, Packed] = {}
  for name, held in parts.items():
    root, _, parameter = name.rpartition(".")
    a, b, rank = held.get("a"), held.get("b"), ranks[name]
    if a is None or b is None or set(held) - {"a", "b"} or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
      shapes = {part: tensor.shape for part, tensor in held.items()}
      problems.append(f"{name}: found {shapes}, expected lora_A (experts * rank, in) and lora_B (out, rank * experts)")
      continue
    if not isinstance(rank, int) or len(a) % rank:
      problems.append(f"{name}: lora_A has {len(a)} rows, which are no whole number of experts of rank {rank}")
      continue
    experts = len(a) // rank
    other = {p.rpartition(".")[2]: x for p, x in parts.items() if p.rpartition(".")[0] == root and p != name}
    swapped = None
    if len(other) == 1:
      (sibling,) = other.values()
      swapped = _orientation(held, sibling) if parameter in _FIRST else _orientation(sibling, held)
    # A parameter of two axes, a layer's own weight, is (out, in), and A is that of its inputs.
    oriented = swapped is not None or (experts == 1 and parameter == "weight")
    names = tuple(expert_name(name, e if experts > 1 else None) for e in range(experts))
    stack_a, stack_b = a.reshape(experts, rank, -1), b.reshape(len(b), rank, experts)
    for e, own in enumerate(names):
      own_a, own_b = (stack_b[:, :, e].T, stack_a[e].T) if swapped else (stack_a[e], stack_b[:, :, e])
      alpha = float(alphas[name]) if isinstance(alphas[name], (int, float)) else 1.0
      modules[own] = Module(own, "linear", own_a, own_b, alpha, "rslora" if config.get("use_rslora") else "standard")
    if parameter != "weight" or experts > 1:
      packed[name] = Packed(names, oriented)
  return modules, packed


_HABIT = re.compile(r"(?P<root>(?:.+\.)?experts)\.(?P<expert>\d{1,6})\.(?P<name>gate_up_proj|down_proj)")


def packed_by_habit(names: Iterable[str]) -> dict[str, Packed]:
  """The parameters of experts among a model's modules, by their names: the Hub's models with a `gate_up_proj` have one.

  Experts that are modules of their own there have a `gate_proj` and an `up_proj`.
  """
  found: dict[tuple[str, str], dict[int, str]] = {}
  for name in names:
    if match := _HABIT.fullmatch(name):
      found.setdefault((match["root"], match["name"]), {})[int(match["expert"])] = name
  return {
    f"{root}.{parameter}": Packed(tuple(experts[e] for e in sorted(experts)))
    for (root, parameter), experts in found.items()
    if (root, "gate_up_proj") in found
  }


def packed_tensors(packed: Mapping[str, Packed], modules: Mapping[str, Module]) -> dict[str, np.ndarray]:
  """PEFT's tensors of adapted parameters, by the name of a module and `lora_A.weight` or `lora_B.weight`."""
  by_root: dict[str, list[str]] = {}
  for name in sorted(packed, key=lambda name: name.rpartition(".")[2] not in _FIRST):
    by_root.setdefault(name.rpartition(".")[0], []).append(name)
  tensors = {}
  for root, names in by_root.items():
    for k, name in enumerate(names):
      held = [modules[own] for own in packed[name].modules]
      wrapped = root + _INNER * (len(names) - 1 - k)
      tensors[f"{wrapped}.lora_A.weight"] = np.concatenate([module.a for module in held])
      tensors[f"{wrapped}.lora_B.weight"] = np.stack([module.b for module in held], axis=-1).reshape(len(held[0].b), -1)
  return tensors


def packed_problems(packed: Mapping[str, Packed], modules: Mapping[str, Module], whole: Iterable[str]) -> list[str]:
  """What PEFT's `target_parameters` cannot hold of modules that belong together."""
  problems = []
  roots: dict[str, list[str]] = {}
  for name, entry in packed.items():
    root, _, parameter = name.rpartition(".")
    roots.setdefault(root, []).append(parameter)
    held = [modules[own] for own in entry.modules if own in modules]
    if len(held) < len(entry.modules) or len({(module.shape, module.rank, module.scale) for module in held}) > 1:
      problems.append(f"{name}: its experts have several ranks, scales or shapes; PEFT has one of each for a parameter")
    if any(module.magnitude is not None for module in held):
      problems.append(
        f"{name}: PEFT has no DoRA on parameters (target_parameters). Merge it, or train it as plain LoRA"
      )
    if any(tensor.startswith(f"{own}.") for own in entry.modules for tensor in whole):
      problems.append(f"{name}: PEFT saves no expert of {name} whole. Merge it into the base (jaxlora.merge)")
  problems += [
    f"{root}: nothing tells in which order its module has {', '.join(names)}, and PEFT's keys are told apart by that."
    " Merge one of them into the base (jaxlora.merge)"
    for root, names in roots.items()
    if len(names) > 2 or (len(names) == 2 and sum(name in _FIRST for name in names) != 1)
  ]
  return problems


def turned(packed: Packed, modules: Mapping[str, Module]) -> dict[str, Module]:
  """The experts of a parameter with their A for B: the same update, (out, in) of one being (in, out) of the other."""
  return {name: dataclasses.replace(modules[name], a=modules[name].b.T, b=modules[name].a.T) for name in packed.modules}


def orientation_for(packed: Packed, modules: Mapping[str, Module], shape: Sequence[int], roles: str) -> bool | None:
  """Whether the experts of a parameter have A and B the wrong way round, by a leaf; `None` where sizes do not tell."""
  module = modules[packed.modules[0]]
  ins, outs = (math.prod(n for n, role in zip(shape, roles, strict=True) if role == own) for own in "io")
  found = (module.a.shape[1], len(module.b))
  if ins == outs or found not in ((ins, outs), (outs, ins)):
    return None
  return found == (outs, ins)
