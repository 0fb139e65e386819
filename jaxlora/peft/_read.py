"""Reads a PEFT folder: the files, as far as anybody's may be trusted."""

import dataclasses
import json
from pathlib import Path
import re
from typing import Any

import numpy as np

from jaxlora._base.files import stored_tensors
from jaxlora._base.text import listed, short
from jaxlora.peft._diffusers import DIFFUSERS_WEIGHTS, adapter_of_diffusers
from jaxlora.peft._mlx import MLX_WEIGHTS, adapter_of_mlx, is_mlx
from jaxlora.peft._patterns import LONGEST_NAME
from jaxlora.peft._records import CONFIG, PICKLE, SEVERAL, WEIGHTS, Adapter, PeftError, fail, raise_problems
from jaxlora.peft._state import adapter_of, not_finite

_LARGEST_CONFIG = 1 << 24  # bytes; PEFT's own are kilobytes

_CODES = ("F64", "F32", "F16", "BF16")  # safetensors' names of the dtypes that factors may have


def read(folder: Any, *, adapter_name: str | None = None, mapped: bool = False) -> Adapter:
  """Reads and checks a PEFT LoRA folder. Options that ask for more than LoRA are in the result's `unsupported`.

  Args:
    folder: with `adapter_config.json` and `adapter_model.safetensors`, or with folders that have those; with mlx-lm's
      `adapters.safetensors`; or a LoRA file of diffusers or of kohya's scripts, or a folder with one.
    adapter_name: of several adapters: the name of a folder in `folder`, or one in the keys of its tensors; of a
      pipeline the component, such as `unet`.
    mapped: whether the tensors are views of the file, which take no memory until they are used. Their values are not
      checked then; otherwise they are finite.

  Raises:
    PeftError: listing everything that is wrong with it. The content of the files raises no other error.
  """
  return read_with_keys(Path(folder), adapter_name=adapter_name, mapped=mapped)[0]


def read_with_keys(folder: Path, *, adapter_name: str | None = None, mapped: bool = False) -> tuple[Adapter, list[str]]:
  """`read`, and the keys of the file's tensors."""
  folder, adapter_name = _folder_of(folder, adapter_name)
  other = _file_of_diffusers(folder)
  config = {} if other is not None else _read_config(folder)
  mlx = is_mlx(config)
  file = other or folder / (MLX_WEIGHTS if mlx and (folder / MLX_WEIGHTS).is_file() else WEIGHTS)
  files = [file] if other is not None else _shards_of(file)
  tensors: dict[str, np.ndarray] = {}
  for shard in files:
    tensors |= _read_tensors(shard, mapped)
  problems = [] if mapped else not_finite(tensors)
  if mlx:
    adapter = adapter_of_mlx(tensors, config, problems)
  elif other is not None:
    adapter = adapter_of_diffusers(tensors, _metadata_of(file), adapter_name, problems)
  else:
    adapter = adapter_of(tensors, config, problems, adapter_name)
    adapter = adapter if len(files) == 1 else dataclasses.replace(adapter, form=SEVERAL)
  if problems:
    raise fail(f"{folder}", [*adapter.unsupported, *problems])
  return adapter, list(tensors)


def _file_of_diffusers(path: Path) -> Path | None:
  """The file of a diffusion model's LoRA: the path itself, or one in a folder that has no configuration."""
  if path.is_file() and path.suffix == ".safetensors":
    return path
  if not path.is_dir() or (path / CONFIG).is_file():
    return None
  files = sorted(path.glob("*.safetensors"))
  named = [file for file in files if file.name == DIFFUSERS_WEIGHTS]
  only = named or files
  return only[0] if len(only) == 1 and only[0].name not in (WEIGHTS, MLX_WEIGHTS) else None


def _metadata_of(file: Path) -> dict[str, str]:
  """The metadata in the header of a safetensors file that could be read."""
  import safetensors

  with safetensors.safe_open(file, framework="np") as opened:
    return opened.metadata() or {}


def _folder_of(folder: Path, adapter_name: str | None) -> tuple[Path, str | None]:
  """The folder of the adapter to read, and its name where its tensors' keys are to tell it.

  PEFT writes the adapter called `default` into the folder itself, and every other one into a folder of its name there.
  """
  if adapter_name is not None and (not isinstance(adapter_name, str) or Path(adapter_name).name != adapter_name):
    raise PeftError(f"adapter_name: found {short(adapter_name)}, expected the name of a folder in {folder}.")
  within = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
  if adapter_name in within:
    return folder / str(adapter_name), None
  if within and not (folder / CONFIG).is_file():
    raise PeftError(
      f"{folder}: no {CONFIG}, but folders of {len(within)} adapter(s): {listed(within)}. Say which one:"
      f" adapter_name={within[0]!r}, or the path {folder / within[0]}."
    )
  return folder, adapter_name


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


_SHARD = re.compile(r"adapter_model-(\d+)-of-(\d+)\.safetensors")


def _shards_of(file: Path) -> list[Path]:
  """The file itself, or where it is not there, the files into which other savers have cut PEFT's: all of them.

  Raises:
    PeftError: if some are missing.
  """
  cut = {found[0]: found for name in file.parent.glob("*.safetensors") if (found := _SHARD.fullmatch(name.name))}
  if file.is_file() or not cut:
    return [file]
  count = max(int(found[2]) for found in cut.values())
  numbers = sorted(int(found[1]) for found in cut.values())
  if numbers != list(range(1, count + 1)):
    raise PeftError(f"{file.parent}: found {listed(sorted(cut))}, expected all of {count} files, from 1 to {count}.")
  return [file.parent / name for name in sorted(cut)]


def _read_tensors(path: Path, mapped: bool) -> dict[str, np.ndarray]:
  import safetensors  # an extra: jaxlora[peft]

  folder = path.parent
  if not path.is_file():
    if (folder / PICKLE).exists():
      raise PeftError(
        f"{folder}: the weights are in {PICKLE}, a pickle, which can run any code when read; jaxlora reads none."
        " Save it again with PEFT's save_pretrained(folder), which writes safetensors."
      )
    others = listed(sorted(name.name for name in folder.glob("*.safetensors"))) or "no .safetensors file"
    raise PeftError(f"{folder}: found {others}, expected {WEIGHTS}, as PEFT's save_pretrained writes it.")
  tensors, problems = {}, []
  try:
    for key, stored in stored_tensors(path).items():
      if key.endswith(".num_batches_tracked"):  # a counter of batch norms, which no evaluation looks at
        continue
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
