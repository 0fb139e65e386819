"""Integers of a few bits in 32-bit words, with scales by groups of inputs: GPTQ, AWQ, compressed-tensors.

W[out, in] = (code[out, in] - zero[out, group]) * scale[out, group]
"""

from collections.abc import Mapping
import math
from typing import Any

import numpy as np

from jaxlora._files.codes import Codes, in_4_bits
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
    zeros = tensors[parts["qzeros"]].shape
    if columns * 8 == outs and "g_idx" not in parts:
      if config.get("version", "gemm").lower() != "gemm":
        raise FormatError(f"{qweight}: AWQ's version {config['version']!r}; expected gemm.")
      if rows % groups or zeros != (groups, columns):
        raise FormatError(f"{qweight}: {(rows, columns)} fits no scales of {(groups, outs)} and zeros of {zeros}.")
      found.append(Quantised(f"{module}.weight", AWQ, (outs, rows), parts, {"bits": 4, "size": rows // groups}))
      continue
    bits = config.get("bits") or (rows * 32 // tensors[parts["g_idx"]].shape[0] if "g_idx" in parts else 4)
    ins = rows * 32 // bits
    if columns != outs or (ins % groups and "g_idx" not in parts):
      raise FormatError(f"{qweight}: shape {(rows, columns)} fits no weight with scales of {(groups, outs)}.")
    if bits not in (2, 3, 4, 8) or zeros != (groups, -(-outs * bits // 32)):
      raise FormatError(f"{qweight}: {bits} bits, scales of {(groups, outs)}; zeros of {zeros} do not fit.")
    if "g_idx" in parts and tensors[parts["g_idx"]].shape != (ins,):
      raise FormatError(f"{parts['g_idx']}: shape {tensors[parts['g_idx']].shape}, expected {(ins,)}.")
    about = {"bits": bits, "size": ins // groups, "one": config.get("checkpoint_format") != "gptq_v2"}
    found.append(Quantised(f"{module}.weight", GPTQ, (outs, ins), parts, about))
  return found


def _codes_gptq(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  """The first version stores zero points less one."""
  outs, bits = parts["scales"].shape[1], about["bits"]
  ins = parts["qweight"].shape[0] * 32 // bits
  codes = unpack(parts["qweight"].T, bits, ins)
  zeros = unpack(parts["qzeros"], bits, outs).astype(np.int16) + about["one"]
  return _grouped(codes, zeros.T, parts["scales"].T, bits, parts.get("g_idx"))


def _codes_awq(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  outs = parts["scales"].shape[1]
  codes, zeros = (_awq_columns(unpack(parts[name], 4, outs)) for name in ("qweight", "qzeros"))
  return _grouped(codes.T, zeros.T, parts["scales"].T, about["bits"], None)


def _awq_columns(packed: np.ndarray) -> np.ndarray:
  """Columns in their order."""
  eights = packed.reshape(*packed.shape[:-1], -1, 8)
  columns = np.empty_like(eights)
  columns[..., _AWQ_ORDER] = eights
  return columns.reshape(packed.shape)


def _grouped(
  codes: np.ndarray, zeros: np.ndarray | None, scales: np.ndarray, bits: int, groups: np.ndarray | None
) -> Codes:
  """`(code - zero) * scale` as codes.

  Where every zero point is the middle, as in symmetric quantisation, codes are signed and there is no offset.

  Args:
    codes: (out, in), a byte for each.
    zeros, scales: (out, groups); `None` for the middle of all codes.
    bits: of a code.
    groups: that each input belongs to; `None` where they are runs of equal length.
  """
  order = None
  if groups is not None:
    groups = groups.astype(np.int64)
    if groups.min() < 0 or groups.max() >= scales.shape[1]:
      raise FormatError(f"g_idx: groups {groups.min()} to {groups.max()}, expected 0 to {scales.shape[1] - 1}.")
    sorted_by = np.argsort(groups, kind="stable")
    if (groups[1:] < groups[:-1]).any():
      codes, order = codes[:, sorted_by], np.argsort(sorted_by)
    scales, zeros = _by_runs(groups[sorted_by], scales), None if zeros is None else _by_runs(groups[sorted_by], zeros)
  middle = 1 << (bits - 1)
  if zeros is None or (zeros == middle).all():
    signed = (codes.astype(np.int16) - middle).astype(np.int8)
    return Codes(in_4_bits(signed, signed=True) if bits <= 4 else signed, scales, order=order)
  fit = zeros.min() >= 0 and zeros.max() <= 255
  offset = Codes(zeros.astype(np.uint8), -scales) if fit else -(zeros.astype(np.float32) * scales.astype(np.float32))
  return Codes(in_4_bits(codes) if bits <= 4 else codes, scales, offset, order=order)


def _by_runs(groups: np.ndarray, part: np.ndarray) -> np.ndarray:
  """A number for each group as one for each run of inputs, all of one length.

  Args:
    groups: that each input belongs to, in order.
    part: (out, groups).
  """
  edges = np.flatnonzero(np.diff(groups)) + 1
  run = int(np.gcd.reduce([len(groups), *edges]))
  return part[:, groups[::run]]


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
    scales = tensors[names["scale"]].shape
    if len(scales) > 2 or (math.prod(scales) != 1 and scales[0] != outs) or math.prod(scales) > outs * ins:
      raise FormatError(f"{names['scale']}: shape {scales} fits no weight of {(outs, ins)}.")
    parts = names | {part: name for part, name in more.items() if name in tensors}
    found.append(Quantised(f"{module}.weight", COMPRESSED, (outs, ins), parts, {"bits": bits}))
  return found


def _bits_of(config: Config) -> int | None:
  """The bits of a weight, where all groups of a configuration have the same."""
  groups = config.get("config_groups")
  schemes = [group.get("weights") or {} for group in groups.values()] if isinstance(groups, Mapping) else []
  bits = {scheme.get("num_bits") for scheme in schemes}
  return bits.pop() if len(bits) == 1 else None


def _codes_compressed(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  (outs, ins), bits = (int(size) for size in parts["shape"]), about["bits"]
  codes, scale = unpack(parts["packed"], bits, ins), parts["scale"]
  scale = np.broadcast_to(
    scale.reshape(-1, 1) if scale.ndim < 2 else scale, (outs, max(1, scale.size // max(len(scale), 1)))
  )
  zeros = None
  if "zeros" in parts:
    zeros = parts["zeros"]
    packed = zeros.dtype == np.int32
    zeros = (
      unpack(zeros.T, bits, outs).T if packed else zeros.reshape(len(zeros), -1).astype(np.int16) + (1 << bits - 1)
    )
    zeros = np.broadcast_to(zeros, scale.shape)
  by_index = "g_idx" in parts and (parts["g_idx"] >= 0).all()
  groups = parts["g_idx"] if by_index else np.arange(ins) // -(-ins // scale.shape[1])
  return _grouped(codes, zeros, scale, bits, groups)


GPTQ = Format("GPTQ", _find_gptq_or_awq, _codes_gptq)
AWQ = Format("AWQ", lambda *_: [], _codes_awq)  # found with GPTQ, whose names it shares
COMPRESSED = Format("compressed-tensors (packed)", _find_compressed, _codes_compressed)
