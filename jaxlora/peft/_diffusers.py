"""LoRAs of diffusion models: the keys of diffusers, of its earlier versions, and of kohya's scripts. No files here."""

from collections.abc import Mapping
import json
import re
from typing import Any

import numpy as np

from jaxlora._base.text import listed
from jaxlora.peft._config import config_of
from jaxlora.peft._layout import magnitude_to_torch
from jaxlora.peft._patterns import values_by_pattern
from jaxlora.peft._records import Adapter, Module
from jaxlora.peft._sgm import of_diffusers

DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"

METADATA = "lora_adapter_metadata"  # in the header of the file: JSON of PEFT's options, by component

# kohya's prefixes, and diffusers' names for the components of a pipeline.
_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder", "lora_te2_": "text_encoder_2"}

_COMPONENTS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "prior", "controlnet")

# The ends of keys, and which part of a module they are; those of `to_q_lora.down` are the oldest.
_PARTS = {
  "lora_A.weight": "a", "lora_B.weight": "b", "lora_down.weight": "a", "lora_up.weight": "b", "lora.down.weight": "a",
  "lora.up.weight": "b", "lora_linear_layer.down.weight": "a", "lora_linear_layer.up.weight": "b", "alpha": "alpha",
  "dora_scale": "magnitude", "lora_magnitude_vector": "magnitude", "lora_magnitude_vector.weight": "magnitude",
}  # fmt: skip

_KEY = re.compile(rf"(?P<module>.+)\.(?P<part>{'|'.join(map(re.escape, _PARTS))})")

_OLDEST = re.compile(r"(?P<before>.+)\.processor\.(?P<name>to_[qkv]|to_out)_lora\.(?P<half>down|up)\.weight")


def is_diffusers(keys: Any) -> bool:
  """Whether the keys of some tensors are those of a diffusion model's LoRA."""
  return any(_OLDEST.fullmatch(key) or _split(key) is not None for key in keys)


def _split(key: str) -> tuple[str, str, str] | None:
  """Component, module, and part of a key."""
  found = _KEY.fullmatch(key)
  if found is None:
    return None
  module, part = found["module"], _PARTS[found["part"]]
  for prefix, component in _KOHYA.items():
    if module.startswith(prefix) and "." not in module:
      return component, of_diffusers(module.removeprefix(prefix)), part
  component, _, rest = module.partition(".")
  return (component, rest, part) if component in _COMPONENTS and rest else None


def adapter_of_diffusers(
  tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str], component: str | None, problems: list[str]
) -> Adapter:
  """The adapter of one component of a pipeline, such as `unet`.

  kohya's names have `_` where torch's have `.`, and are found on a tree as such. Alpha is beside the factors, or in the
  file's metadata; where it is in neither, it is the rank, as diffusers takes it.

  Args:
    tensors: by key.
    metadata: of the file.
    component: which one, where there are several.
    problems: what is wrong is added to these.

  Source: `diffusers/utils/state_dict_utils.py` and `diffusers/loaders/lora_base.py` of diffusers 0.42; kohya's
  `networks/lora.py`.
  """
  components: dict[str, dict[str, dict[str, np.ndarray]]] = {}
  for key, tensor in tensors.items():
    if old := _OLDEST.fullmatch(key):
      projection = old["name"] + (".0" if old["name"] == "to_out" else "")
      key = f"{old['before']}.{projection}.lora.{old['half']}.weight"
    found = _split(key)
    if found is None:
      problems.append(
        f"{key}: unknown; expected the lora_A and lora_B, or lora_down and lora_up, of a component:"
        f" {', '.join(_COMPONENTS)}. (LoHa, LoKr and Tucker's lora_mid are not read here.)"
      )
      continue
    own, name, part = found
    components.setdefault(own, {}).setdefault(name, {})[part] = tensor
  if component is None and len(components) > 1:
    problems.append(f"holds {listed(sorted(components))}. Say which: adapter_name={sorted(components)[0]!r}")
  chosen = component if component is not None else next(iter(components), None)
  if chosen is not None and chosen not in components:
    problems.append(f"adapter_name: found {chosen!r}, the file holds {listed(sorted(components))}")
  options, found_parts = _options(metadata, chosen, problems), components.get(chosen or "", {})
  alphas = values_by_pattern(options, "alpha_pattern", found_parts, problems) if options else {}
  modules = {}
  for name, parts in found_parts.items():
    scaling = "rslora" if options.get("use_rslora") else "standard"
    if (module := _module(name, parts, alphas.get(name), scaling, problems)) is not None:
      modules[name] = module
  config = config_of(modules, {}) if modules and not problems else {}
  kohya = any(key.startswith(tuple(_KOHYA)) for key in tensors)
  return Adapter(modules, {}, {}, config, form="kohya" if kohya else "diffusers")


def _options(metadata: Mapping[str, str], component: str | None, problems: list[str]) -> dict[str, Any]:
  """PEFT's options of a component, by the file's metadata."""
  if METADATA not in metadata:
    return {}
  try:
    found = json.loads(metadata[METADATA])
    prefix = f"{component}."
    options = {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}
  except (ValueError, AttributeError, RecursionError) as error:
    problems.append(f"{METADATA}: not readable as JSON ({type(error).__name__})")
    return {}
  if options.get("lora_bias"):
    problems.append(f"{METADATA}: a bias in lora_B, which is not read here")
  return options


def _module(name: str, parts: Mapping[str, np.ndarray], told: Any, scaling: str, problems: list[str]) -> Module | None:
  """A module of its parts; `told` is its alpha by the file's metadata, `None` where there is none."""
  a, b, alpha, magnitude = (parts.get(part) for part in ("a", "b", "alpha", "magnitude"))
  shapes = {part: tensor.shape for part, tensor in parts.items()}
  fits = a is not None and b is not None and a.ndim == b.ndim and a.ndim in (2, 4) and b.shape[1] == len(a)
  if a is None or b is None or not fits or any(size != 1 for size in b.shape[2:]):
    problems.append(f"{name}: found {shapes}, expected (rank, in, ...) and (out, rank, ...)")
    return None
  if alpha is not None and alpha.size != 1:
    problems.append(f"{name}: alpha has shape {alpha.shape}, expected one number")
    return None
  if magnitude is not None and (magnitude.size != len(b) or max(magnitude.shape) != len(b)):
    problems.append(f"{name}: a magnitude of shape {magnitude.shape}, expected one number for each of {len(b)} outputs")
    return None
  value = float(alpha.reshape(())) if alpha is not None else float(len(a) if told is None else told)
  kind = "linear" if a.ndim == 2 else "conv"
  norms = None if magnitude is None else magnitude_to_torch(magnitude, kind, a.ndim)
  return Module(name, kind, a, b, value, scaling, norms)
