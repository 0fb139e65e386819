"""llama.cpp's files as torch's tensors: the names, and the rows that its converter permutes.

Source: llama.cpp's `gguf-py/gguf/tensor_mapping.py` and `convert_hf_to_gguf.py`.
"""

from collections.abc import Mapping
from pathlib import Path
import re
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxlora._files.gguf import KINDS
from jaxlora.hub._records import HubError, Source, Stored
from jaxlora.quant._gguf import PLAIN, gguf_base

_LAYER = {
  "attn_norm": "input_layernorm",
  "attn_q": "self_attn.q_proj",
  "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj",
  "attn_output": "self_attn.o_proj",
  "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm",
  "ffn_norm": "post_attention_layernorm",
  "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj",
  "ffn_down": "mlp.down_proj",
}
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_PERMUTED = {"llama": {"attn_q": "head_count", "attn_k": "head_count_kv"}, "qwen2": {}, "qwen3": {}}
_BUFFERS = ("rope_freqs.weight",)  # of llama.cpp alone: the scaled wavelengths of the rotary positions

_OF_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_OF_NONE = re.compile(r"(\w+)\.(weight|bias)")


class Metadata(NamedTuple):
  """What a GGUF file says ahead of its values.

  Attributes:
    architecture: a key of those that are known.
    fields: single values by name.
    shapes: of the tensors, in torch's order of axes.
  """

  architecture: str
  fields: Mapping[str, Any]
  shapes: Mapping[str, tuple[int, ...]]


def gguf_package() -> Any:
  """The package that reads and writes the files."""
  try:
    import gguf
  except ImportError as error:
    raise ImportError("GGUF files need the package gguf: pip install 'jaxlora[gguf]'") from error
  return gguf


def _opened(file: Path) -> tuple[Metadata, list[Any]]:
  gguf = gguf_package()
  try:
    reader = gguf.GGUFReader(file)
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.data) == 1}
  except Exception as error:
    raise HubError(f"{file}: cannot be read as GGUF: {type(error).__name__}: {error}. Download it anew.") from error
  kind = fields.get("general.architecture")
  if kind not in _PERMUTED:
    raise HubError(
      f"{file}: found the architecture {kind!r}, expected one of {', '.join(map(repr, _PERMUTED))}. Load the model's"
      " safetensors instead."
    )
  shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
  return Metadata(str(kind), fields, shapes), list(reader.tensors)


def metadata_of(file: Path) -> Metadata:
  """What a file says of itself.

  Raises:
    HubError: if it cannot be read, or is of an architecture that is not known.
  """
  return _opened(file)[0]


def open_gguf(file: Path) -> Source:
  """A GGUF file, its tensors named as torch's; codes are read as the floats that they mean.

  Raises:
    HubError: if it cannot be read, or is of an architecture or holds tensors that are not known.
  """
  about, held = _opened(file)
  tensors: dict[str, Stored] = {}
  unknown = []
  for tensor in held:
    name = torch_name(tensor.name)
    if name is not None:
      tensors[name] = _stored(tensor, heads_of(tensor.name, about))
    elif tensor.name not in _BUFFERS:
      unknown.append(tensor.name)
  if unknown:
    raise HubError(f"{file}: tensors of unknown names: {', '.join(unknown)}. Load the model's safetensors instead.")
  return Source(str(file), tensors, tied="lm_head.weight" not in tensors)


def torch_name(name: str) -> str | None:
  """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; `None` for a name that is not known."""
  if found := _OF_LAYER.fullmatch(name):
    own = _LAYER.get(found[2])
    return own and f"model.layers.{found[1]}.{own}.{found[3]}"
  found = _OF_NONE.fullmatch(name)
  own = _OUTSIDE.get(found[1]) if found else None
  return own and f"{own}.{found[2]}" if found else None


def gguf_name(name: str) -> str | None:
  """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight`; `None` for a name that is not known."""
  module, _, parameter = name.rpartition(".")
  found = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", module)
  own = next(
    (theirs for theirs, ours in (_LAYER if found else _OUTSIDE).items() if ours == (found[2] if found else module)),
    None,
  )
  if own is None:
    return None
  return f"blk.{found[1]}.{own}.{parameter}" if found else f"{own}.{parameter}"


def heads_of(name: str, about: Metadata) -> int | None:
  """The heads within which the rows of a query's or key's projection are permuted; `None` for any other tensor."""
  found = _OF_LAYER.fullmatch(name)
  field = _PERMUTED[about.architecture].get(found[2]) if found else None
  if field is None:
    return None
  every = about.fields[f"{about.architecture}.attention.head_count"]  # where keys have no number of their own
  return int(about.fields.get(f"{about.architecture}.attention.{field}", every))


def _stored(tensor: Any, heads: int | None) -> Stored:
  gguf = gguf_package()
  ordered = lambda rows: rows if heads is None else halves_apart(rows, heads)
  kind = tensor.tensor_type.name
  shape = tuple(int(size) for size in reversed(tensor.shape))
  read = lambda: ordered(gguf.dequantize(tensor.data, tensor.tensor_type))
  if kind in PLAIN:
    return Stored(shape, read)
  codes = lambda dtype, said: jax.tree.map(ordered, gguf_base(tensor, dtype, said))  # scales have the rows, too
  return Stored(shape, read, kind, codes if kind in KINDS else None)


def halves_apart(rows: np.ndarray, heads: int) -> np.ndarray:
  """Rows (out, ...) whose rotary pairs are neighbours within each head -> a half apart, as torch's models have them."""
  pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
  return pairs.swapaxes(1, 2).reshape(rows.shape)


def pairs_together(rows: np.ndarray, heads: int) -> np.ndarray:
  """The way back: rows whose rotary pairs are a half apart -> neighbours, as llama.cpp has them."""
  halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
  return halves.swapaxes(1, 2).reshape(rows.shape)
