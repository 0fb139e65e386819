"""Reads a PEFT folder: the files, as far as anybody's may be trusted."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora._base.files import stored_tensors
from jaxlora.peft._patterns import LONGEST_NAME
from jaxlora.peft._records import CONFIG, PICKLE, WEIGHTS, Adapter, PeftError, fail, raise_problems
from jaxlora.peft._state import adapter_of, not_finite

_LARGEST_CONFIG = 1 << 24  # bytes; PEFT's own are kilobytes

_CODES = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that factors may have


def read(folder: Any, *, mapped: bool = False) -> Adapter:
  """Reads and checks a PEFT LoRA folder. Options that ask for more than LoRA are in the result's `unsupported`.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`.
    mapped: whether the tensors are views of the file, which take no memory until they are used. Their values are not
      checked then; otherwise they are finite.

  Raises:
    PeftError: listing everything that is wrong with it. The content of the files raises no other error.
  """
  folder = Path(folder)
  config = _read_config(folder)
  tensors = _read_tensors(folder, mapped)
  problems = [] if mapped else not_finite(tensors)
  adapter = adapter_of(tensors, config, problems)
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


def _read_tensors(folder: Path, mapped: bool) -> dict[str, np.ndarray]:
  import safetensors  # an extra: jaxlora[peft]

  path = folder / WEIGHTS
  if not path.is_file():
    if (folder / PICKLE).exists():
      raise PeftError(
        f"{folder}: the weights are in {PICKLE}, a pickle, which can run any code when read; jaxlora reads none."
        " Save it again with PEFT's save_pretrained(folder), which writes safetensors."
      )
    raise PeftError(f"{folder}: no {WEIGHTS}; expected the folder that PEFT's save_pretrained writes.")
  tensors, problems = {}, []
  try:
    for key, stored in stored_tensors(path).items():
      if stored.code not in _CODES:
        problems.append(f"{key}: dtype {stored.code}, expected one of {', '.join(_CODES)}")
      elif 0 in stored.shape:
        problems.append(f"{key}: shape {stored.shape} holds nothing")
      elif len(key) > LONGEST_NAME:
        problems.append(f"{key[:60]}...: a name of {len(key)} characters, expected at most {LONGEST_NAME}")
      else:
        tensors[key] = stored.mapped() if mapped else stored.read()
  except (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    OverflowError,
    RecursionError,
    safetensors.SafetensorError,
  ) as error:
    raise PeftError(f"{path}: not readable as safetensors ({str(error)[:200]}).") from error
  raise_problems(str(path), problems)
  return tensors
