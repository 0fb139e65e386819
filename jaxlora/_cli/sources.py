"""Adapters and bases in files of either format."""

from collections.abc import Iterable
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.fields import checked_letters, checked_mapping
from jaxlora._cli.result import BadFile
from jaxlora._files.tensors import TensorFiles
from jaxlora.peft._names import Names, check_types
from jaxlora.peft._parts import names_from_json
from jaxlora.peft._records import Adapter
from jaxlora.peft._roles import Axes


def is_peft(path: str) -> bool:
  """Whether a path holds adapters of PEFT's or of another library in files, and is no checkpoint of jaxlora's."""
  names = ("adapter_config.json", "adapter_model.safetensors")
  held = ("*/adapter_config.json", "*.safetensors")
  return (
    path.endswith(".safetensors")
    or any((Path(path) / name).exists() for name in names)
    or any(found for pattern in held for found in Path(path).glob(pattern))
  )


def is_checkpoint(path: str) -> bool:
  """Whether a path is a checkpoint of jaxlora's, or one of its steps."""
  return "://" in path or any((folder / "record").is_dir() for folder in (Path(path), *Path(path).glob("[0-9]*")))


def existing(path: str) -> str:
  """The path of a checkpoint, once it is known to be there; remote ones are taken as they are."""
  if not Path(path).exists() and "://" not in path:
    raise BadFile(f"{path}: there is no such folder.")
  return path


def names_of(options: Any) -> Names:
  """The regexes and torch names of `--names FILE`."""
  if options.names is None:
    return None
  found = _json_of(options.names)
  try:
    names = names_from_json(found)
    check_types(names)
    return names
  except (TypeError, ValueError) as error:
    raise BadFile(f"{options.names}: {error}") from error


def axes_of(options: Any) -> Axes:
  """The regexes and roles of `--axes FILE`."""
  if options.axes is None:
    return None
  try:
    return checked_mapping(_json_of(options.axes), "axes", checked_letters)
  except (TypeError, ValueError) as error:
    raise BadFile(f"{options.axes}: {error}") from error


def _json_of(file: str) -> Any:
  try:
    return json.loads(Path(file).read_text("utf-8"))
  except ValueError as error:
    raise BadFile(f"{file}: cannot be read as JSON: {error}") from error


def check_names(adapter: Adapter, source: str) -> None:
  """Raises where torch's names, which a file for torch needs, are not told."""
  if adapter.form == "kohya":
    raise BadFile(
      f"{source}: {next(iter(adapter.modules))} is kohya's name, which does not tell where torch's has its dots."
      " Convert it to a checkpoint with --base FILE first: jaxlora convert FROM TO --to jaxlora --base FILE."
    )


def shapes_of_base(contents: Any) -> dict[str, jax.ShapeDtypeStruct]:
  """The leaves of a checkpoint's base, by path, without their values."""
  return {path: _shape_of_print(text) for path, text in contents.base.items()}


def _shape_of_print(text: str) -> jax.ShapeDtypeStruct:
  """`"float32[2,3]:0f3c..."` -> its shape and dtype; random keys and the like, which are no parameters, are bytes."""
  dtype, shape = text.split(":")[0].rstrip("]").rsplit("[", 1)
  try:
    kind = jnp.dtype(dtype)
  except TypeError:
    kind = jnp.dtype(np.uint8)
  return jax.ShapeDtypeStruct(tuple(int(n) for n in shape.split(",") if n), kind)


def shapes_of_files(files: TensorFiles) -> dict[str, jax.ShapeDtypeStruct]:
  """The leaves of a Flax tree in safetensors files, by path, without their values."""
  return {
    path: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype or np.uint8)
    for path, tensor in zip(flax_paths(files.tensors).values(), files.tensors.values(), strict=True)
  }


def bare_path(path: str) -> str:
  """The path of a leaf without the collections that it may be in: `params`, or `params/params` in MaxText's files."""
  while path.startswith("params/"):
    path = path.removeprefix("params/")
  return path


def flax_paths(names: Iterable[str]) -> dict[str, str]:
  """Names of tensors -> paths of leaves, joined by "/" in the file, or by "." where none has a "/"."""
  names = list(names)
  joined = any("/" in name for name in names)
  return {name: name if joined else name.replace(".", "/") for name in names}
