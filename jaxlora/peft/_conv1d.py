"""Whether torch's modules of GPT-2's names are its Conv1D, whose weights are (in, out), or linear layers: (out, in).

GPT-2 and ImageGPT have Conv1D; GPT-BigCode and Qwen have linear layers of the same names.
"""

from collections.abc import Mapping

from jaxlora.peft._records import CONV1D, Adapter


def is_named_conv1d(module: str) -> bool:
  return module.rpartition(".")[2] in CONV1D


def told_by_adapter(adapter: Adapter) -> bool | None:
  """What an adapter tells: by weights saved whole beside their bias, or by what PEFT has found in its model."""
  for name, tensor in adapter.whole.items():
    module, _, parameter = name.rpartition(".")
    bias = adapter.whole.get(f"{module}.bias")
    if parameter == "weight" and is_named_conv1d(module) and bias is not None and len(set(tensor.shape)) == 2:
      return bool(bias.size == tensor.shape[1])
  stored = adapter.config.get("fan_in_fan_out")
  if stored:
    return True
  # PEFT sets it for a Conv1D where nobody said it.
  return False if stored is False and adapter.modules and all(map(is_named_conv1d, adapter.modules)) else None


def told_by_model(sizes: Mapping[str, int]) -> bool:
  """What a model's modules tell: GPT-2 has three times its width in `c_attn`, and `c_fc` before each `mlp.c_proj`.

  Args:
    sizes: elements of each module's weight, by name.
  """
  children: dict[str, dict[str, int]] = {}
  for name, size in sizes.items():
    root, _, own = name.rpartition(".")
    children.setdefault(root, {})[own] = size
  for root, held in children.items():
    cross = "cross" in root.rpartition(".")[2]  # whose c_attn has keys and values alone
    if {"c_attn", "c_proj"} <= held.keys() and not cross and held["c_attn"] != 3 * held["c_proj"]:
      return False
    if "c_proj" in held and len(held) > 1 and not held.keys() & {"c_attn", "c_fc"}:
      return False
  return True
