"""vLLM's, SGLang's and llama.cpp's readers of a PEFT folder, after their sources: the updates that each of them makes.

Each returns the update of every module by name, or raises `Refused` where the real one raises or asserts.
"""

import json
import math
import re

from safetensors.numpy import load_file


class Refused(Exception):
  pass


def opened(folder):
  config = json.loads((folder / "adapter_config.json").read_text())
  tensors = {key: value.astype("float64") for key, value in load_file(folder / "adapter_model.safetensors").items()}
  return config, tensors


def product(a, b, scale, embedding):
  return scale * ((b @ a).T if embedding else b @ a)


def vllm(folder):
  """PEFTHelper (its checks, its one scale), parse_fine_tuned_lora_name, buffers of the rank that r asks for."""
  config, tensors = opened(folder)
  if not all(field in config for field in ("r", "lora_alpha", "target_modules")) or not config["target_modules"]:
    raise Refused("a field is missing")
  if config.get("modules_to_save") or config.get("use_dora") or config.get("bias", "none") != "none":
    raise Refused("a feature")
  if config["r"] > 512:
    raise Refused("the rank")
  scale = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
  halves = {}
  for key, tensor in tensors.items():
    if key.endswith((".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")):
      continue
    parts = key.removeprefix("base_model.model.").split(".")
    if parts[-1] == "weight" and parts[-2] in ("lora_A", "lora_B"):
      name, half = ".".join(parts[:-2]), parts[-2][-1]
    elif parts[-1] in ("lora_embedding_A", "lora_embedding_B"):
      name, half = ".".join(parts[:-1]), "e" + parts[-1][-1]
    else:
      raise Refused(key)
    if tensor.ndim != 2 or tensor.shape[0 if half[-1] == "A" else 1] > config["r"]:
      raise Refused(f"{key}: no buffer of this shape")
    halves.setdefault(name, {})[half] = tensor
  return {
    name: product(both["eA" if "eA" in both else "A"], both["eB" if "eB" in both else "B"], scale, "eA" in both)
    for name, both in halves.items()
  }


def sglang(folder):
  """LoRAConfig, LoRAAdapter (its one scale, what it drops, what it fuses), the memory pool's assertion on shapes."""
  config, tensors = opened(folder)
  targets = config["target_modules"]
  if isinstance(targets, str) and targets not in ("all", "all-linear"):
    raise Refused("target_modules")
  if config.get("use_dora"):
    raise Refused("DoRA")
  if config["lora_alpha"] is None or not targets:
    raise Refused("a field is missing")
  scale, halves = config["lora_alpha"] / config["r"], {}
  for key, tensor in tensors.items():
    layer = re.search(r"layers\.(\d+)\.", key)
    if layer is None and "embed_tokens" not in key and "lm_head" not in key:
      continue  # left out, without a word
    found = re.fullmatch(r"(?:base_model\.model\.)?(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", key)
    if found is None:
      if layer is None:
        continue
      raise Refused(f"{key}: no target")
    half = found[2] or found[3]
    if tensor.ndim != 2 or tensor.shape[0 if half == "A" else 1] != config["r"]:
      raise Refused(f"{key}: the buffer's shape is another")
    halves.setdefault(found[1], {})[half] = tensor, found[3] is not None
  for name in halves:
    stem, _, last = name.rpartition(".")
    needs = {"q_proj": ["v_proj"], "k_proj": ["q_proj", "v_proj"], "v_proj": ["q_proj"], "gate_proj": ["up_proj"]}
    for other in needs.get(last, []):
      if f"{stem}.{other}" not in halves:
        raise Refused(f"{name}: no {other}")
  return {name: product(both["A"][0], both["B"][0], scale, both["A"][1]) for name, both in halves.items()}


def llama_cpp(folder):
  """convert_lora_to_gguf.py (its keys, its one alpha) and get_scale of llama-adapter.h (the rank of each tensor)."""
  config, tensors = opened(folder)
  if config.get("ensure_weight_tying") and any("lm_head" in key for key in tensors):
    raise Refused("lm_head is present in the adapter, and no tensor of the base")
  alpha, halves = float(config["lora_alpha"]), {}
  for key, tensor in tensors.items():
    name = key.replace("base_model.model.", "")
    found = re.fullmatch(r"(.+)\.(?:lora_([AB])\.weight|lora_embedding_([AB]))", name)
    if found is None:
      if ".base_layer.weight" in name or "_layernorm" in name or ".norm" in name:
        continue  # norms are converted, and not looked at when the model runs
      raise Refused(key)
    if tensor.ndim != 2:
      raise Refused(f"{key}: {tensor.ndim} axes")
    halves.setdefault(found[1], {})[found[2] or found[3]] = tensor, found[3] is not None
  return {
    name: product(both["A"][0], both["B"][0], alpha / len(both["A"][0]) if alpha else 1.0, both["A"][1])
    for name, both in halves.items()
  }


READERS = {"vllm": vllm, "sglang": sglang, "llama.cpp": llama_cpp}
