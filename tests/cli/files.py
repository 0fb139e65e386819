"""A small model and its adapter, as trees and as files of either format hold them."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from tests.helpers import adapted, array

PARAMS = {
  "layers_0": {"q_proj": {"kernel": array(1, (6, 4), jnp.float32), "bias": array(2, (4,), jnp.float32)}},
  "layers_1": {"q_proj": {"kernel": array(3, (6, 4), jnp.float32), "bias": array(4, (4,), jnp.float32)}},
  "embed_tokens": {"embedding": array(5, (11, 6), jnp.float32)},
}


def adapted_tree():
  overrides = {"layers_1/.*": {"rank": 1, "alpha": 0.5}}
  return adapted(PARAMS, alpha=6, targets=["q_proj", "embed_tokens"], overrides=overrides)


def flat(params, joint="/"):
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator=joint): np.asarray(leaf) for path, leaf in leaves}


def as_torch(params):
  names = {"layers_": "model.layers.", "embed_tokens": "model.embed_tokens", "/": ".", "kernel": "weight"}
  result = {}
  for path, leaf in flat(params).items():
    name = path.replace("embedding", "weight")
    for old, new in names.items():
      name = name.replace(old, new)
    result[name] = np.ascontiguousarray(leaf.T) if path.endswith("kernel") else leaf
  return result


def zeros_file(path, count, shape):
  """Zeros that take no room on disk."""
  size = 4 * shape[0] * shape[1]
  entry = lambda k: {"dtype": "F32", "shape": list(shape), "data_offsets": [k * size, (k + 1) * size]}
  text = json.dumps({f"w{k}": entry(k) for k in range(count)}).encode()
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + count * size)
  return 8 + len(text), size


# Of Llama 3 8B: the modules of a layer, with their inputs and outputs, and the head.
LAYER = {
  "self_attn.q_proj": (4096, 4096),
  "self_attn.k_proj": (4096, 1024),
  "self_attn.v_proj": (4096, 1024),
  "self_attn.o_proj": (4096, 4096),
  "mlp.gate_proj": (4096, 14336),
  "mlp.up_proj": (4096, 14336),
  "mlp.down_proj": (14336, 4096),
}
HEAD = {"output": (4096, 128256)}  # the last in the file, where all of it is in memory


def llama_adapter(folder, layers, rank=16):
  """Writes a PEFT folder for so many layers of Llama 3 8B and its head; returns the number of modules and of bytes."""
  modules = HEAD | {f"model.layers.{k}.{name}": sizes for k in range(layers) for name, sizes in LAYER.items()}
  numbers = array(1, (1 << 20,), jnp.bfloat16)
  tensors = {}
  for name, (inputs, outputs) in modules.items():
    tensors[f"base_model.model.{name}.lora_A.weight"] = np.resize(numbers, (rank, inputs))
    tensors[f"base_model.model.{name}.lora_B.weight"] = np.resize(numbers, (outputs, rank))
  folder.mkdir(parents=True)
  save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
  config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(LAYER) + list(HEAD)}
  (folder / "adapter_config.json").write_text(json.dumps(config))
  return len(modules), (folder / "adapter_model.safetensors").stat().st_size
