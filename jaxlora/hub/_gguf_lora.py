"""LoRA in llama.cpp's files: `general.type` adapter, one alpha, `NAME.lora_a` and `NAME.lora_b`.

    lora_a = A (rank, in),    lora_b = B (out, rank), rows of queries and keys permuted,    W' = W + alpha / rank * B A

Source: llama.cpp's `convert_lora_to_gguf.py` and `src/llama-adapter.cpp`.
"""

from collections.abc import Mapping
import dataclasses
import os
from pathlib import Path
from typing import Any

import numpy as np

from jaxlora._base.files import replacing
from jaxlora.hub._gguf import gguf_name, gguf_package, halves_apart, heads_of, metadata_of, pairs_together, torch_name
from jaxlora.hub._records import HubError, failed
from jaxlora.peft._config import config_of
from jaxlora.peft._from_modules import from_modules
from jaxlora.peft._names import Names
from jaxlora.peft._records import Adapter, Module
from jaxlora.peft._roles import Axes
from jaxlora.peft._to_modules import to_modules

_A, _B = ".lora_a", ".lora_b"


def save_gguf_adapter(
  path: str | os.PathLike[str],
  tree: Any,
  *,
  base: str | os.PathLike[str],
  names: Names = None,
  axes: Axes = None,
  dtype: Any = np.float32,
) -> None:
  """Writes an adapter as llama.cpp reads them: `llama-cli --lora FILE`, `llama_cpp.Llama(lora_path=FILE)`.

  Ranks and alphas that differ between modules have one alpha for the file: what differs is folded into B.

  Args:
    path: the file, `.gguf`.
    tree: what `jaxlora.adapt` returned, in training or after it.
    base: the model's GGUF file: its architecture, and the heads within which llama.cpp permutes rows.
    names: as for `load`.
    axes: as for `load`.
    dtype: of the factors in the file: float32 or float16.

  Raises:
    HubError: listing what the format has no place for: DoRA, leaves trained whole, modules that llama.cpp does not name
      or that the base does not have.

  Example:
    >>> jaxlora.hub.save_gguf_adapter("adapter.gguf", tree, base="model.gguf")  # doctest: +SKIP
  """
  write_gguf_adapter(Path(path), to_modules(tree, names=names, axes=axes), Path(base), dtype)


def write_gguf_adapter(path: Path, adapter: Adapter, base: Path, dtype: Any = np.float32) -> None:
  """`save_gguf_adapter` of an adapter in torch's modules."""
  about = metadata_of(base)
  tensors, problems = {}, [f"{name}: trained whole, and the format has factors alone" for name in adapter.whole]
  alpha = max((module.alpha for module in adapter.modules.values()), default=1.0)
  for name, module in adapter.modules.items():
    own = gguf_name(f"{name}.weight")
    if own is None or own not in about.shapes:
      problems.append(f"{name}: no tensor of {base} is called so")
    elif module.kind != "linear" or module.magnitude is not None:
      problems.append(f"{name}: the format has plain factors of linear layers alone; merge it (jaxlora.merge)")
    elif about.shapes[own] != module.shape:
      problems.append(f"{name}: factors of a weight of shape {module.shape}, and {own} has {about.shapes[own]}")
    else:
      ratio = module.scale * module.rank / alpha  # llama.cpp divides alpha by the rank of each tensor
      heads = heads_of(own, about)
      b = module.b if ratio == 1 else module.b * module.b.dtype.type(ratio)
      tensors[own + _A] = module.a.astype(dtype)
      tensors[own + _B] = (b if heads is None else pairs_together(b, heads)).astype(dtype)
  if problems:
    raise failed(f"hub.save_gguf_adapter: {path}", problems)
  _write(path, tensors, about.architecture, float(alpha))


def _write(path: Path, tensors: Mapping[str, np.ndarray], architecture: str, alpha: float) -> None:
  gguf = gguf_package()
  try:
    with replacing(path) as new:
      writer = gguf.GGUFWriter(new, architecture)
      writer.add_type("adapter")
      writer.add_string("adapter.type", "lora")
      writer.add_float32("adapter.lora.alpha", alpha)
      for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
      writer.write_header_to_file()
      writer.write_kv_data_to_file()
      writer.write_tensors_to_file()
      writer.close()
  except OSError as error:
    raise HubError(f"hub.save_gguf_adapter: {path}: cannot be written: {error}") from error


def load_gguf_adapter(
  path: str | os.PathLike[str],
  params: Any,
  *,
  base: str | os.PathLike[str],
  names: Names = None,
  axes: Axes = None,
) -> Any:
  """Puts an adapter in llama.cpp's form on a tree of parameters.

  Args:
    path: the file.
    params: the base, as for `jaxlora.peft.load`.
    base: the model's GGUF file, as for `save_gguf_adapter`.
    names: as for `load`.
    axes: as for `load`.

  Returns:
    The adapted tree.

  Raises:
    HubError: if the file is no adapter, of another architecture, or holds what is not known.
    jaxlora.peft.PeftError: listing what does not fit the tree.

  Example:
    >>> tree = jaxlora.hub.load_gguf_adapter("adapter.gguf", params, base="model.gguf")  # doctest: +SKIP
  """
  return from_modules(read_gguf_adapter(Path(path), Path(base)), params, names=names, axes=axes)


def read_gguf_adapter(path: Path, base: Path) -> Adapter:
  """The modules of an adapter's file."""
  found, about = metadata_of(path), metadata_of(base)
  kind = found.fields.get("general.type"), found.fields.get("adapter.type")
  if kind != ("adapter", "lora"):
    raise HubError(
      f"{path}: found general.type and adapter.type {kind}, expected ('adapter', 'lora'): no LoRA is in it."
    )
  if found.architecture != about.architecture:
    raise HubError(f"{path}: of the architecture {found.architecture!r}, and {base} is {about.architecture!r}.")
  alpha, gguf = float(found.fields["adapter.lora.alpha"]), gguf_package()
  arrays = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
  modules, problems, paired = {}, [], set()
  for name in [name.removesuffix(_A) for name in arrays if name.endswith(_A)]:
    own = torch_name(name)
    if own is None or name + _B not in arrays:
      problems.append(f"{name}: " + ("is no known name" if own is None else f"has a {_A[1:]} and no {_B[1:]}"))
      paired.add(name + _A)  # it is said
      continue
    paired |= {name + _A, name + _B}
    a, b, heads = arrays[name + _A], arrays[name + _B], heads_of(name, about)
    module = own.removesuffix(".weight")
    modules[module] = Module(
      module, "linear", a, b if heads is None else halves_apart(b, heads), alpha or float(len(a))
    )
  problems += [f"{name}: expected {_A[1:]} and {_B[1:]} of a module" for name in arrays if name not in paired]
  if problems:
    raise failed(str(path), problems)
  return dataclasses.replace(Adapter(modules, {}, {}, {}), config=config_of(modules, {}))
