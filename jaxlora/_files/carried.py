"""What a folder holds beside a model's weights: copied to the merged model, its config.json brought up to date."""

from collections.abc import Iterator, Mapping
import json
from pathlib import Path
import shutil
from typing import Any

# Weights in whatever format: those of the merged model are written in their place.
_WEIGHTS = (
  ".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json", ".pt", ".pth", ".ckpt", ".msgpack",
  ".msgpack.index.json", ".h5", ".gguf", ".onnx", ".ot", ".pkl",
)  # fmt: skip

_QUANTISATION = ("hf_quant_config.json", "quantize_config.json", "quant_config.json", "quant_strategy.json")

_SECTIONS = ("quantization_config", "compression_config")  # of config.json


def carried_files(folder: Path, *, dequantised: bool) -> Iterator[Path]:
  """The files of a model's folder that go along: its configurations and tokenizer, no weights and no folders."""
  for file in sorted(folder.iterdir()):
    weights = file.name.endswith(_WEIGHTS) or "safetensors.index." in file.name or file.name.startswith("consolidated")
    stale = dequantised and file.name in _QUANTISATION
    if file.is_file() and not file.name.startswith((".", "adapter_")) and not weights and not stale:
      yield file


def quantisation_of(config: Mapping[str, Any]) -> Mapping[str, Any]:
  """The quantisation that a config.json tells of; empty for none."""
  for inner in (config, config.get("text_config")):
    for section in _SECTIONS:
      if isinstance(inner, Mapping) and isinstance(inner.get(section), Mapping):
        return inner[section]
  return {}


def changed_config(config: Mapping[str, Any], *, dequantised: bool, dtype: str | None, untied: bool) -> dict[str, Any]:
  """The config.json of the merged model.

  Args:
    config: of the base.
    dequantised: whether no weight is quantised any more.
    dtype: the dtype of the merged weights, where it is another than the base's.
    untied: whether the head has become a tensor of its own.
  """
  changed = {
    name: changed_config(value, dequantised=dequantised, dtype=dtype, untied=untied)
    if name == "text_config" and isinstance(value, Mapping)
    else value
    for name, value in config.items()
    if not (dequantised and name in _SECTIONS)
  }
  if dtype is not None:
    told = [name for name in ("dtype", "torch_dtype") if name in changed]
    changed |= dict.fromkeys(told, dtype)
  if untied:
    changed["tie_word_embeddings"] = False
  return changed


def carry(folder: Path, target: Path, config: Mapping[str, Any], *, dequantised: bool) -> list[str]:
  """Copies what goes along into the folder of a merged model; files that are there already stay.

  Args:
    folder: of the base.
    target: of the merged model.
    config: its config.json; written where the base has one that differs.
    dequantised: whether no weight is quantised any more.

  Returns:
    The names of the files.
  """
  names = []
  for file in carried_files(folder, dequantised=dequantised):
    copy = target / file.name
    if copy.exists():
      continue
    if file.name == "config.json" and json.loads(file.read_bytes()) != config:
      copy.write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    else:
      shutil.copyfile(file, copy)
    names.append(file.name)
  return names
