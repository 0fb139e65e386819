"""`adapter_config.json`: made for an adapter, and checked where one is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from jaxlora._base.text import short
from jaxlora.peft._conv1d import is_named_conv1d
from jaxlora.peft._patterns import exact_patterns, is_number, target_modules
from jaxlora.peft._records import Module, Packed
from jaxlora.peft._serve_checks import module_saved_with


def config_of(
  modules: Mapping[str, Module],
  whole: Mapping[str, np.ndarray],
  *,
  bias: str = "none",
  known: Collection[str] | None = None,
  dropout: float = 0.0,
  packed: Mapping[str, Packed] = MappingProxyType({}),
  conv1d: bool = True,
  heads: Sequence[str] = (),
) -> dict[str, Any]:
  """The configuration with which `PeftModel.from_pretrained` builds an adapter of these modules and parameters.

  Args:
    modules: the adapted modules by name; all of them have a magnitude, or none.
    whole: tensors that replace a parameter, by parameter name: biases of adapted modules, and every parameter of each
      module to save.
    bias: PEFT's option of that name, which says which biases are saved.
    known: the names of all modules that the torch model has, to find short names that only the adapted modules have;
      `None` if they are not known.
    dropout: of all modules. PEFT has none on parameters that hold several experts: with those it is 0.
    packed: the parameters that hold several experts, by name.
    conv1d: whether modules of GPT-2's names are its Conv1D.
    heads: ends of the names of modules that PEFT saves whole for the task, whatever they consist of.

  Raises:
    PeftError: if PEFT's patterns cannot tell the adapted modules from others.
  """
  saved = sorted({module_saved_with(name, heads) or name for name in _modules_to_save(whole, modules, bias)})
  scalings = {module.scaling for module in modules.values()}
  # One option says how alpha becomes a scale; where the modules differ, alpha is told as the standard one takes it.
  alphas = {
    name: module.alpha if len(scalings) == 1 else module.scale * module.rank for name, module in modules.items()
  }
  together = {name for entry in packed.values() for name in entry.modules}
  plain = sorted(set(modules) - together)
  firsts = {name: name for name in modules if name not in together}
  firsts |= {name: entry.modules[0] for name, entry in packed.items()}
  settings = {name: (modules[own].rank, _integral(alphas[own])) for name, own in firsts.items()}
  rank, alpha = max(settings.values(), key=list(settings.values()).count, default=(8, 8))
  others = (set(modules if known is None else known) | set(modules)) - together
  return {
    "peft_type": "LORA",
    "task_type": None,
    "base_model_name_or_path": None,
    "auto_mapping": None,
    "revision": None,
    "inference_mode": True,
    "r": rank,
    "lora_alpha": alpha,
    "lora_dropout": 0.0 if packed else dropout,
    "target_modules": target_modules(plain, others, saved, complete=known is not None)
    if plain
    else _NO_MODULES[bool(packed)],
    "modules_to_save": saved or None,
    "bias": bias,
    "use_rslora": scalings == {"rslora"},
    "use_dora": any(module.magnitude is not None for module in modules.values()),
    "fan_in_fan_out": conv1d and bool(modules) and all(map(is_named_conv1d, modules)),
    "init_lora_weights": True,  # readers such as vLLM's refuse any other; what the file holds starts from the base
    "rank_pattern": exact_patterns({name: setting[0] for name, setting in settings.items()}, rank),
    "alpha_pattern": exact_patterns({name: setting[1] for name, setting in settings.items()}, alpha),
    "layers_to_transform": None,
    "layers_pattern": None,
  } | ({"target_parameters": _target_parameters(packed)} if packed else {})


# `target_modules` where no module is adapted: PEFT refuses an empty list unless parameters are adapted, and knows this
# word for files of modules that are saved whole (`peft/utils/constants.py`).
_NO_MODULES: dict[bool, list[str] | str] = {True: [], False: "dummy-target-modules"}


def _target_parameters(packed: Collection[str]) -> list[str]:
  """Ends of the names of adapted parameters, with their module: `experts.gate_up_proj`. PEFT knows them since 0.17."""
  return sorted({".".join(name.split(".")[-2:]) for name in packed})


def _modules_to_save(whole: Mapping[str, np.ndarray], adapted: Collection[str], bias: str) -> set[str]:
  """The modules whose parameters are in `whole` and are no biases that the `bias` option covers."""
  names = {name.rpartition(".")[::2] for name in whole}
  weights = {module for module, parameter in names if parameter != "bias"}
  biases_alone = {module for module, parameter in names if parameter == "bias"} - weights - set(adapted)
  return weights | (biases_alone if bias != "all" else set())


def _integral(alpha: float) -> float:
  """An `int` where alpha is a whole number, as PEFT writes it."""
  return int(alpha) if float(alpha).is_integer() else float(alpha)


# Options that make another function of the factors, or that begin from another base.
_UNSUPPORTED = {
  "lora_bias": "a bias in lora_B",
  "layer_replication": "layers that share their base",
  "alora_invocation_tokens": "activated LoRA",
  "use_qalora": "QALoRA",
  "use_bdlora": "block-diagonal LoRA",
  "arrow_config": "Arrow",
  "kasa_config": "KaSA",
  "monteclora_config": "MonteCLoRA",
}

_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # the others change the base when they start


def unsupported_options(config: Mapping[str, Any]) -> Iterator[str]:
  """The options of a configuration that ask for another method than LoRA, as reasons not to use the adapter."""
  for field, method in _UNSUPPORTED.items():
    if config.get(field):
      yield f"{field}: {method}: not supported; merge it in PEFT (merge_and_unload), or train it as plain LoRA"
  init = config.get("init_lora_weights", True)
  plain = init is None or isinstance(init, bool) or (isinstance(init, str) and init.lower() in _PLAIN_INITS)
  if not plain:
    yield (
      f"init_lora_weights: {short(init)} changes the base weights when it starts, and the file holds the factors of"
      " that other base. Save it as plain LoRA: PEFT's save_pretrained(folder,"
      " path_initial_model_for_weight_conversion=...)"
    )


def malformed_options(config: Mapping[str, Any]) -> Iterator[str]:
  """What is wrong with the fields of a configuration. Ranks and alphas are checked where their patterns are read."""
  if config.get("peft_type") != "LORA":
    yield f"peft_type: found {short(config.get('peft_type'))}, expected 'LORA'"
  choices_of: Mapping[str, Sequence[Any]] = {"use_rslora": (True, False, None), "bias": ("none", "all", "lora_only")}
  for field, choices in choices_of.items():
    if field in config and not any(
      type(config[field]) is type(choice) and config[field] == choice for choice in choices
    ):
      yield f"{field}: found {short(config[field])}, expected one of {', '.join(map(repr, choices))}"
  saved = config.get("modules_to_save")
  if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
    yield f"modules_to_save: found {short(saved)}, expected a list of names"
  dropout = config.get("lora_dropout", 0.0)
  if not (is_number(dropout) and 0 <= dropout < 1):
    yield f"lora_dropout: found {short(dropout)}, expected a probability in [0, 1)"
