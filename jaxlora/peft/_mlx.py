"""mlx-lm's adapters: `adapters.safetensors` with `lora_a` (in, rank) and `lora_b` (rank, out). No files here."""

from collections.abc import Mapping
import math
import re
from typing import Any
import warnings

import numpy as np

from jaxlora.peft._config import config_of
from jaxlora.peft._patterns import is_number
from jaxlora.peft._records import Adapter, Module, PeftWarning, fail
from jaxlora.peft._tied import is_embedding, uses_of, without_head

MLX_WEIGHTS = "adapters.safetensors"

_KEY = re.compile(r"(?P<module>.+)\.(?P<part>lora_a|lora_b|m)")

_EXPERTS = ".switch_mlp."  # mlx-lm's name of a layer's stacked experts, `experts` in transformers

_LAYER = re.compile(r".*?\.?(?:layers|h|blocks)\.\d+\.(?P<rest>.+)")


def is_mlx(config: Mapping[str, Any]) -> bool:
  """Whether an `adapter_config.json` is mlx-lm's."""
  return "peft_type" not in config and ("lora_parameters" in config or "fine_tune_type" in config)


def adapter_of_mlx(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], problems: list[str]) -> Adapter:
  """The adapter of mlx-lm's tensors and configuration, with the scale that mlx-lm gives it: `lora_parameters.scale`.

  Args:
    tensors: by key.
    config: `adapter_config.json`.
    problems: what is wrong is added to these.

  Source: `LoRALinear`, `LoRASwitchLinear`, `LoRAEmbedding` and `DoRALinear` in `mlx_lm/tuner/`, of mlx-lm 0.32.
  """
  kind = config.get("fine_tune_type") or ("dora" if config.get("use_dora") else "lora")
  if kind not in ("lora", "dora"):
    problems.append(f"fine_tune_type: found {kind!r}: a model's weights, and no adapter; expected 'lora' or 'dora'")
  scale, dropout = _parameters(config, problems)
  parts_by_module: dict[str, dict[str, np.ndarray]] = {}
  for key, tensor in tensors.items():
    if found := _KEY.fullmatch(key):
      parts_by_module.setdefault(found["module"], {})[found["part"]] = tensor
    else:
      problems.append(f"{key}: unknown; expected lora_a and lora_b of a module, as mlx-lm writes them")
  modules: dict[str, Module] = {}
  for name, parts in parts_by_module.items():
    for module in _modules(name, parts, scale, kind, problems):
      modules[module.name] = module
  if not modules and not problems:
    problems.append(f"{MLX_WEIGHTS} holds no adapter")
  if problems:
    return Adapter(modules, {}, {}, dict(config), form="mlx-lm")
  about = {"base_model_name_or_path": config.get("model")}
  return Adapter(modules, {}, {}, config_of(modules, {}, dropout=dropout) | about, form="mlx-lm")


def _parameters(config: Mapping[str, Any], problems: list[str]) -> tuple[Any, Any]:
  """The scale and the dropout of a configuration."""
  found = config.get("lora_parameters")
  parameters: Mapping[str, Any] = found if isinstance(found, Mapping) else {}
  scale, dropout, alpha, rank = (parameters.get(name) for name in ("scale", "dropout", "alpha", "rank"))
  if not is_number(scale):
    problems.append(
      f"lora_parameters: scale: found {scale!r}, expected a number, as mlx-lm does. Write it into adapter_config.json:"
      " the factor before lora_a @ lora_b"
    )
  elif is_number(alpha) and alpha != rank:
    warnings.warn(
      f"lora_parameters: alpha {alpha} is left aside, as mlx-lm does: the scale is {scale}. Versions of early 2024"
      f" multiplied it by alpha / rank; if one of those trained this, write scale {scale} * {alpha} / {rank} there.",
      PeftWarning,
      stacklevel=6,
    )
  return scale if is_number(scale) else 1.0, dropout if is_number(dropout) else 0.0


def _modules(name: str, parts: Mapping[str, np.ndarray], scale: float, kind: str, problems: list[str]) -> list[Module]:
  """The modules of one of mlx-lm's: several where it holds experts."""
  a, b, magnitude = (parts.get(part) for part in ("lora_a", "lora_b", "m"))
  if a is None or b is None or (magnitude is not None) != (kind == "dora"):
    problems.append(f"{name}: found {', '.join(sorted(parts))}; expected lora_a and lora_b, and m with DoRA alone")
    return []
  if a.ndim == b.ndim == 3 and len(a) == len(b) and a.shape[1] == b.shape[2] and magnitude is None:
    if _EXPERTS not in name:
      problems.append(f"{name}: lora_a of shape {a.shape}: experts, in no switch_mlp")
      return []
    names = [name.replace(_EXPERTS, f".experts.{e}.") for e in range(len(a))]
    return [Module(own, "linear", a[e], b[e], scale * a.shape[1]) for e, own in enumerate(names)]
  if a.ndim != 2 or b.ndim != 2 or a.shape[1] != len(b):
    problems.append(f"{name}: lora_a has shape {a.shape}, lora_b {b.shape}; expected (in, rank) and (rank, out)")
    return []
  if magnitude is not None and is_embedding(name):
    problems.append(
      f"{name}: mlx-lm's DoRA of an embedding has a magnitude for each token, and PEFT's for each feature"
    )
    return []
  if magnitude is not None and magnitude.shape != (b.shape[1],):
    problems.append(f"{name}: m has shape {magnitude.shape}, expected one number for each of {b.shape[1]} outputs")
    return []
  return [Module(name, "embedding" if is_embedding(name) else "linear", a.T, b.T, scale * len(b), magnitude=magnitude)]


def mlx_of(adapter: Adapter, subject: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
  """The tensors and the configuration of an adapter as mlx-lm has them.

  mlx-lm has one rank and one scale: smaller ranks are filled up with zeros, and what differs of the scales goes into
  lora_b.

  Raises:
    PeftError: listing what mlx-lm's adapters cannot hold.
  """
  uses = uses_of(adapter)
  if uses is not None and uses.alike and uses.head is not None:
    adapter = without_head(adapter, uses.head)  # mlx-lm adapts both uses of a tied embedding by the one module
  modules = adapter.modules
  problems = [f"{name}: mlx-lm's adapters hold factors alone, and this is trained whole" for name in adapter.whole]
  problems += [f"{name}: mlx-lm's adapters hold no rows of an embedding" for name in adapter.tokens]
  problems += [
    f"{name}: mlx-lm adapts linear layers and embeddings, this is a convolution"
    for name, module in modules.items()
    if module.kind == "conv"
  ]
  problems += [
    f"{name}: mlx-lm has no DoRA of embeddings that is PEFT's"
    for name, module in modules.items()
    if module.kind == "embedding" and module.magnitude is not None
  ]
  problems += [
    f"{name}: experts, which mlx-lm stacks in a switch_mlp: not written. Merge them into the base (jaxlora.merge)"
    for name in modules
    if re.search(r"\.experts\.\d+\.", name)
  ]
  if problems:
    raise fail(subject, problems)
  rank = max(module.rank for module in modules.values())
  scale = next(iter(modules.values())).scale
  tensors: dict[str, np.ndarray] = {}
  for name, module in modules.items():
    a = np.zeros((math.prod(module.a.shape[1:]), rank), module.a.dtype)
    b = np.zeros((rank, len(module.b)), module.b.dtype)
    ratio = module.scale / scale
    a[:, : module.rank] = module.a.T
    b[: module.rank] = module.b.T if ratio == 1 else module.b.T * b.dtype.type(ratio)
    tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
    if module.magnitude is not None:
      tensors[f"{name}.m"] = module.magnitude
  dora = any(module.magnitude is not None for module in modules.values())
  keys = {found["rest"] if (found := _LAYER.fullmatch(name)) else name for name in modules}
  return tensors, {
    "fine_tune_type": "dora" if dora else "lora",
    "num_layers": -1,  # all of them: modules without factors here are made anew, with an update of zero
    "lora_parameters": {"rank": rank, "scale": scale, "dropout": adapter.dropout, "keys": sorted(keys)},
  }
