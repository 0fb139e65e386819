"""A tiny model of the language model's example in a GGUF file, tiny data, and the example's modules."""

from collections.abc import Iterator, Mapping
import contextlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.helpers import bench_scripts
from tests.helpers.paths import EXAMPLES

PACKAGES = ("gguf", "jinja2", "rouge_score", "safetensors", "scipy", "tokenizers", "tqdm")
FOLDER = EXAMPLES / "llm"
PARTS = sorted(file.stem for file in (FOLDER / "lm").glob("[a-z]*.py"))
WIDTH, LAYERS, HEADS, KV_HEADS, MLP = 16, 2, 4, 2, 24
TEMPLATE = "{% for m in messages %}<|s|>{{ m['role'][0] + m['content'] }}<|e|>{% endfor %}<|s|>a"


def need_packages() -> None:
  """Skips a module of tests where the example's packages are not installed."""
  for package in PACKAGES:
    pytest.importorskip(package, reason="the language model's example needs jaxlora[llm]")


@contextlib.contextmanager
def modules(*scripts: str) -> Iterator[SimpleNamespace]:
  """The example's parts, and some of its scripts."""
  with bench_scripts.modules(*scripts, *(f"lm.{part}" for part in PARTS), folder=FOLDER) as found:
    yield found


def byte_tokens() -> list[str]:
  """Byte-level BPE's letters."""
  from tokenizers.pre_tokenizers import ByteLevel

  return sorted(ByteLevel.alphabet())


def write_gguf(
  path: Path, architecture: str = "llama", seed: int = 0, fields: Mapping[str, Any] | None = None, **changed: Any
) -> Path:
  """A tiny model as llama.cpp's converters write one.

  A tensor of `changed` replaces one, or leaves it out (`None`); a text of `fields` is added to the metadata, `None`
  leaves a field out.
  """
  import gguf

  writer = gguf.GGUFWriter(path, architecture)
  names = ["<|s|>", "<|e|>", *byte_tokens(), "it"]
  for field, value in (
    ("block_count", LAYERS), ("context_length", 1024), ("embedding_length", WIDTH), ("feed_forward_length", MLP),
    ("attention.head_count", HEADS), ("attention.head_count_kv", KV_HEADS),
  ):  # fmt: skip
    writer.add_uint32(f"{architecture}.{field}", value)
  writer.add_float32(f"{architecture}.rope.freq_base", 10_000.0)
  writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("smollm")
  writer.add_token_list(names)
  writer.add_token_types([3, 3, *[1] * (len(names) - 2)])
  writer.add_token_merges(["i t"])
  writer.add_eos_token_id(1)
  writer.add_pad_token_id(1)
  writer.add_chat_template(TEMPLATE)
  generator = np.random.default_rng(seed)
  kv = WIDTH // HEADS * KV_HEADS
  shapes = {"token_embd": (len(names), WIDTH), "output_norm": (WIDTH,)}
  for k in range(LAYERS):
    sizes = {"attn_q": (WIDTH, WIDTH), "attn_k": (kv, WIDTH), "attn_v": (kv, WIDTH), "attn_output": (WIDTH, WIDTH)}
    sizes |= {"ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH), "ffn_down": (WIDTH, MLP)}
    sizes |= {"attn_norm": (WIDTH,), "ffn_norm": (WIDTH,)}
    shapes |= {f"blk.{k}.{name}": size for name, size in sizes.items()}
  for name, shape in shapes.items():
    values = generator.normal(0, 0.4, shape).astype(np.float32)
    values = changed.get(name, values)
    if values is not None:
      writer.add_tensor(f"{name}.weight", values)
  for name, value in (fields or {}).items():
    if value is None:
      del writer.kv_data[0][name]
    elif isinstance(value, list):
      del writer.kv_data[0][name]
      writer.add_array(name, value)
    else:
      writer.kv_data[0].pop(name, None)
      (writer.add_uint32 if isinstance(value, int) else writer.add_string)(name, value)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


def write_data(folder: Path) -> Path:
  for split, count in (("train", 6), ("val", 2), ("test", 3)):
    papers = [
      {
        "id": f"{split}{k}",
        "sentences": {"abstract": [f"a paper of {k} .", "it ends ."]},
        "summary": {"challenge": f"{k} is hard", "approach": "it ends", "outcome": "they win"},
      }
      for k in range(count)
    ]
    (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, papers)))
  return folder
