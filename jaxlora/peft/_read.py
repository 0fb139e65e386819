"""Reads a PEFT folder, and checks what it says before it is used."""

from collections.abc import Iterator, Mapping
import json
from pathlib import Path
import re
from typing import Any

import numpy as np

from jaxlora._base.text import short
from jaxlora.peft._patterns import LONGEST_NAME, by_pattern, is_number
from jaxlora.peft._records import CONFIG, PICKLE, PREFIX, WEIGHTS, Adapter, Module, PeftError, fail

_LARGEST_CONFIG = 1 << 24  # bytes; PEFT's own are kilobytes

_DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}


def read(folder: Any) -> Adapter:
  """Reads and checks a PEFT LoRA folder. What it asks for beyond LoRA is in the result's `unsupported`.

  Raises:
    PeftError: listing everything that is wrong with it. No other error comes from what the files hold.
  """
  folder = Path(folder)
  config = _read_config(folder)
  tensors = _read_tensors(folder)
  problems = list(_malformed(config))
  adapter = Adapter({}, {}, {}, config, tuple(_unsupported(config)))
  pieces: dict[str, dict[str, np.ndarray]] = {}
  for key, tensor in tensors.items():
    if problem := _file_tensor(key, tensor, pieces, adapter):
      problems.append(problem)
  ranks, alphas = (by_pattern(config, field, pieces, problems) for field in ("rank_pattern", "alpha_pattern"))
  for name, held in pieces.items():
    module = _module(name, held, ranks[name], alphas[name], config, problems)
    if module is not None:
      adapter.modules[name] = module
  if not pieces and not adapter.whole:
    problems.append(f"{WEIGHTS} holds no adapter")
  if problems:
    raise fail(f"{folder}", [*adapter.unsupported, *problems])
  return adapter


def _read_config(folder: Path) -> dict[str, Any]:
  path = folder / CONFIG
  try:
    if not folder.is_dir():
      raise PeftError(
        f"{folder}: not a folder; expected one with {CONFIG} and {WEIGHTS}, as save_pretrained writes it."
      )
    if not path.is_file():
      raise PeftError(f"{folder}: no {CONFIG}; expected the folder that PEFT's save_pretrained writes.")
    if path.stat().st_size > _LARGEST_CONFIG:
      raise PeftError(
        f"{path}: {path.stat().st_size:,} bytes; expected a configuration of at most {_LARGEST_CONFIG:,}."
      )
    config = json.loads(path.read_bytes())
  except (OSError, ValueError, RecursionError) as error:
    if isinstance(error, PeftError):
      raise
    raise PeftError(f"{path}: not readable as JSON ({type(error).__name__}: {str(error)[:200]}).") from error
  if not isinstance(config, dict):
    raise PeftError(f"{path}: found a {type(config).__name__}, expected a JSON object.")
  return config


def _read_tensors(folder: Path) -> dict[str, np.ndarray]:
  import safetensors  # an extra: jaxlora[peft]

  path = folder / WEIGHTS
  try:
    if not path.is_file():
      if (folder / PICKLE).exists():
        raise PeftError(
          f"{folder}: the weights are in {PICKLE}, a pickle, which can run any code when read; jaxlora reads none."
          " Save it again with PEFT's save_pretrained(folder), which writes safetensors."
        )
      raise PeftError(f"{folder}: no {WEIGHTS}; expected the folder that PEFT's save_pretrained writes.")
    tensors, problems = {}, []
    # safetensors checks every shape against the bytes that are there before anything is made of it.
    with safetensors.safe_open(str(path), framework="np") as file:
      for key in file.keys():  # noqa: SIM118  (not a mapping)
        about = file.get_slice(key)
        if about.get_dtype() not in _DTYPES:
          problems.append(f"{key}: dtype {about.get_dtype()}, expected one of {', '.join(_DTYPES)}")
        elif 0 in about.get_shape():
          problems.append(f"{key}: shape {tuple(about.get_shape())} holds nothing")
        elif len(key) > LONGEST_NAME:
          problems.append(f"{key[:60]}...: a name of {len(key)} characters, expected at most {LONGEST_NAME}")
        else:
          tensors[key] = file.get_tensor(key)
  except (OSError, ValueError, TypeError, KeyError, OverflowError, safetensors.SafetensorError) as error:
    if isinstance(error, PeftError):
      raise
    raise PeftError(f"{path}: not readable as safetensors ({str(error)[:200]}).") from error
  if problems:
    raise fail(str(path), problems)
  return tensors


# What the file's keys say of one tensor, after the prefix.
_KEY = re.compile(
  r"(?P<module>.+)\.(?P<part>lora_A\.weight|lora_B\.weight|lora_embedding_A|lora_embedding_B"
  r"|lora_magnitude_vector(?:\.weight)?|lora_B\.bias|base_layer\.weight|base_layer\.bias)"
)


_PARTS = {
  "lora_A.weight": "a",
  "lora_B.weight": "b",
  "lora_embedding_A": "embedding a",
  "lora_embedding_B": "embedding b",
  "lora_B.bias": "bias",
}


# What comes beside the factors, and the option that says that it does.
_EXTRAS = {"magnitude": ("lora_magnitude_vector", "use_dora"), "bias": ("lora_B.bias", "lora_bias")}


def _file_tensor(
  key: str, tensor: np.ndarray, pieces: dict[str, dict[str, np.ndarray]], adapter: Adapter
) -> str | None:
  """Puts a tensor where it belongs; returns what is wrong with it, if anything is."""
  if not np.isfinite(tensor).all():
    return f"{key}: holds NaN or infinite values"
  if not key.startswith(PREFIX):
    return f"{key}: expected a name that starts with {PREFIX!r}"
  name = key.removeprefix(PREFIX)
  found = _KEY.fullmatch(name)
  if found is None:
    if "lora_" in name or "." not in name:
      return f"{key}: unknown; expected lora_A.weight, lora_B.weight, lora_embedding_A or lora_embedding_B of a module"
    adapter.whole[name] = tensor
    return None
  module, part = found["module"], found["part"]
  if part == "base_layer.bias":
    adapter.whole[f"{module}.bias"] = tensor
  elif part == "base_layer.weight":
    adapter.bases[f"{module}.weight"] = tensor
  else:
    pieces.setdefault(module, {})[_PARTS.get(part, "magnitude")] = tensor
  return None


def _module(
  name: str, held: Mapping[str, np.ndarray], rank: Any, alpha: Any, config: Mapping[str, Any], problems: list[str]
) -> Module | None:
  """One adapted module of its tensors, or what is wrong with them."""
  embedding = "embedding a" in held or "embedding b" in held
  half = "embedding " if embedding else ""
  a, b = held.get(f"{half}a"), held.get(f"{half}b")
  if a is None or b is None or (embedding and ("a" in held or "b" in held)):
    found = ", ".join(sorted(held))
    problems.append(f"{name}: found {found} alone; expected both lora_A and lora_B (lora_embedding_A and _B)")
    return None
  if a.ndim != b.ndim or not (a.ndim == 2 or (not embedding and 3 <= a.ndim <= 5)):
    problems.append(
      f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; expected both 2-D, or both of one convolution"
    )
    return None
  if a.shape[0] != b.shape[1] or any(size != 1 for size in b.shape[2:]):
    problems.append(
      f"{name}: lora_A has shape {a.shape}, lora_B {b.shape}; expected (rank, in, ...) and (out, rank, 1, ...)."
      " (The lora_B of a grouped convolution has fewer: PEFT's update of those lies across the groups, which no"
      " kernel of the base's shape can hold.)"
    )
    return None
  if isinstance(rank, int) and rank != a.shape[0]:
    problems.append(f"{name}: rank {a.shape[0]} in {WEIGHTS}, {rank} by {CONFIG}")
  problems += [
    f"{name}: has a {extra} beside its factors, but {CONFIG} does not say {option}"
    for part, (extra, option) in _EXTRAS.items()
    if part in held and not config.get(option)
  ]
  magnitude = held.get("magnitude")
  if config.get("use_dora") and (magnitude is None or magnitude.size != b.shape[0]):
    found = "none" if magnitude is None else f"shape {magnitude.shape}"
    problems.append(
      f"{name}: lora_magnitude_vector: found {found}, expected one number for each of {b.shape[0]} outputs"
    )
    return None
  return Module(
    name=name,
    kind="embedding" if embedding else "linear" if a.ndim == 2 else "conv",
    a=a,
    b=b,
    alpha=float(alpha) if isinstance(alpha, (int, float)) else 1.0,
    scaling="rslora" if config.get("use_rslora") else "standard",
    magnitude=magnitude,
  )


# Options that make another function of the factors, or that begin from another base. Each: the values that do not.
_UNSUPPORTED = {
  "lora_bias": "a bias in lora_B",
  "target_parameters": "LoRA on bare parameters",
  "layer_replication": "layers that share their base",
  "alora_invocation_tokens": "activated LoRA",
  "use_qalora": "QALoRA",
  "use_bdlora": "block-diagonal LoRA",
  "arrow_config": "Arrow",
  "kasa_config": "KaSA",
  "monteclora_config": "MonteCLoRA",
  "trainable_token_indices": "trainable tokens",
}


_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")  # the others change the base when they start


def _unsupported(config: Mapping[str, Any]) -> Iterator[str]:
  """What the configuration asks for that this library does not do."""
  for field, what in _UNSUPPORTED.items():
    if config.get(field):
      yield f"{field}: {what}: not supported; merge it in PEFT (merge_and_unload), or train it as plain LoRA"
  init = config.get("init_lora_weights", True)
  if not isinstance(init, bool) and init not in _PLAIN_INITS:
    yield (
      f"init_lora_weights: {short(init)} changes the base weights when it starts, and the file holds the factors of"
      " that other base. Save it as plain LoRA: PEFT's save_pretrained(folder,"
      " path_initial_model_for_weight_conversion=...)"
    )


def _malformed(config: Mapping[str, Any]) -> Iterator[str]:
  """What in the configuration makes no sense."""
  if config.get("peft_type") != "LORA":
    yield f"peft_type: found {short(config.get('peft_type'))}, expected 'LORA'"
  for field, choices in (("use_rslora", (True, False)), ("bias", ("none", "all", "lora_only"))):
    if field in config and not (isinstance(config[field], type(choices[0])) and config[field] in choices):
      yield f"{field}: found {short(config[field])}, expected one of {', '.join(map(repr, choices))}"
  saved = config.get("modules_to_save")
  if saved is not None and not (isinstance(saved, list) and all(isinstance(name, str) for name in saved)):
    yield f"modules_to_save: found {short(saved)}, expected a list of names"
  dropout = config.get("lora_dropout", 0.0)
  if not (is_number(dropout) and 0 <= dropout < 1):
    yield f"lora_dropout: found {short(dropout)}, expected a probability in [0, 1)"
