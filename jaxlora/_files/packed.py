"""Integers of a few bits in 32-bit words, with scales by groups of inputs: GPTQ, AWQ, compressed-tensors.

W[out, in] = (code[out, in] - zero[out, group]) * scale[out, group]
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlora._files.format import Arrays, Config, Format, FormatError, Headers, Quantised, Read

_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the column, of eight, that each half byte of a word holds


def unpack(words: np.ndarray, bits: int, count: int) -> np.ndarray:
  """The first `count` numbers of `bits` bits along the last axis of 32-bit words, the lowest bits first."""
  bytes_ = np.ascontiguousarray(words).view(np.uint8)
  each = np.unpackbits(bytes_, axis=-1, count=count * bits, bitorder="little")
  return np.packbits(each.reshape(*words.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]


def _find_gptq_or_awq(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del read
  found = []
  for qweight, module in ((name, name.removesuffix(".qweight")) for name in tensors if name.endswith(".qweight")):
    parts = {part: f"{module}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    parts = {part: name for part, name in parts.items() if name in tensors}
    if {"qzeros", "scales"} - parts.keys() or tensors[qweight].code != "I32":
      continue  # some other format, which is refused by its names
    (rows, columns), (groups, outs) = tensors[qweight].shape, tensors[parts["scales"]].shape
    if columns * 8 == outs and "g_idx" not in parts:
      if config.get("version", "gemm").lower() != "gemm":
        raise FormatError(f"{qweight}: AWQ's version {config['version']!r}; expected gemm.")
      found.append(Quantised(f"{module}.weight", AWQ, (outs, rows), parts, {"bits": 4, "size": rows // groups}))
      continue
    bits = config.get("bits") or (rows * 32 // tensors[parts["g_idx"]].shape[0] if "g_idx" in parts else 4)
    ins = rows * 32 // bits
    if columns != outs or (ins % groups and "g_idx" not in parts):
      raise FormatError(f"{qweight}: shape {(rows, columns)} fits no weight with scales of {(groups, outs)}.")
    about = {"bits": bits, "size": ins // groups, "one": config.get("checkpoint_format") != "gptq_v2"}
    found.append(Quantised(f"{module}.weight", GPTQ, (outs, ins), parts, about))
  return found


def _dequantise_gptq(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  """The first version stores zero points less one."""
  outs, bits = parts["scales"].shape[1], about["bits"]
  ins = parts["qweight"].shape[0] * 32 // bits
  codes = unpack(parts["qweight"].T, bits, ins).astype(np.float32)
  zeros = unpack(parts["qzeros"], bits, outs).astype(np.float32) + about["one"]
  group = parts["g_idx"].astype(np.int64) if "g_idx" in parts else np.arange(ins) // about["size"]
  return (codes - zeros.T[:, group]) * parts["scales"].astype(np.float32).T[:, group]


def _dequantise_awq(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  outs = parts["scales"].shape[1]
  codes, zeros = (_awq_columns(unpack(parts[name], 4, outs)) for name in ("qweight", "qzeros"))
  group = np.arange(len(codes)) // about["size"]
  return ((codes - zeros[group]) * parts["scales"].astype(np.float32)[group]).T


def _awq_columns(packed: np.ndarray) -> np.ndarray:
  """Columns in their order."""
  eights = packed.reshape(*packed.shape[:-1], -1, 8)
  columns = np.empty(eights.shape, np.float32)
  columns[..., _AWQ_ORDER] = eights
  return columns.reshape(packed.shape)


def _find_compressed(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  found = []
  for packed, module in ((n, n.removesuffix(".weight_packed")) for n in tensors if n.endswith(".weight_packed")):
    names = {"packed": packed, "scale": f"{module}.weight_scale", "shape": f"{module}.weight_shape"}
    more = {"zeros": f"{module}.weight_zero_point", "g_idx": f"{module}.weight_g_idx"}
    if any(name not in tensors for name in names.values()) or tensors[packed].code != "I32":
      continue
    outs, ins = (int(size) for size in read(names["shape"]))
    rows, words = tensors[packed].shape
    bits = _bits_of(config) or words * 32 // ins
    if rows != outs or not 1 <= bits <= 8 or words != -(-ins * bits // 32):
      raise FormatError(f"{packed}: shape {(rows, words)} fits no weight of {(outs, ins)} with {bits} bits.")
    parts = names | {part: name for part, name in more.items() if name in tensors}
    found.append(Quantised(f"{module}.weight", COMPRESSED, (outs, ins), parts, {"bits": bits}))
  return found


def _bits_of(config: Config) -> int | None:
  """The bits of a weight, where all groups of a configuration have the same."""
  groups = config.get("config_groups")
  schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
  bits = {scheme.get("num_bits") for scheme in schemes}
  return bits.pop() if len(bits) == 1 else None


def _dequantise_compressed(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  (outs, ins), bits = (int(size) for size in parts["shape"]), about["bits"]
  middle = np.float32(1 << (bits - 1))
  codes = unpack(parts["packed"], bits, ins).astype(np.float32) - middle
  scale = parts["scale"].astype(np.float32)
  scale = np.broadcast_to(
    scale.reshape(-1, 1) if scale.ndim < 2 else scale, (outs, max(1, scale.size // max(len(scale), 1)))
  )
  group = np.arange(ins) // -(-ins // scale.shape[1])
  if "g_idx" in parts and (parts["g_idx"] >= 0).all():
    group = parts["g_idx"].astype(np.int64)
  if "zeros" in parts:
    zeros = parts["zeros"]
    zeros = unpack(zeros.T, bits, outs).T - middle if zeros.dtype == np.int32 else zeros.reshape(len(zeros), -1)
    codes = codes - np.broadcast_to(zeros.astype(np.float32), scale.shape)[:, group]
  return codes * scale[:, group]


GPTQ = Format("GPTQ", _find_gptq_or_awq, _dequantise_gptq)
AWQ = Format("AWQ", lambda *_: [], _dequantise_awq)  # found with GPTQ, whose names it shares
COMPRESSED = Format("compressed-tensors (packed)", _find_compressed, _dequantise_compressed)
