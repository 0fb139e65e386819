"""GGUF's blocks: 32 or 256 elements of a row, their codes and scales beside each other.

    W = d * q + m,                Q4_0, Q4_1, Q8_0: half-precision d and m for 32 elements
    W = (d * s) * q - (e * t),    Q4_K: s and t of 6 bits for 32 elements, half-precision d and e for 256
    W = (d * s) * q,              Q6_K: s of 8 bits for 16 elements

The tables are those of ggml (`ggml-common.h`, `ggml-quants.c`), as its Python package `gguf` decodes them: the same
float32, to the bit.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import NamedTuple

import numpy as np

from jaxlora._files.codes import Codes, in_4_bits
from jaxlora._files.format import FormatError

Fields = dict[str, np.ndarray]  # the bytes of each field of a block, (rows, blocks, bytes)


class Kind(NamedTuple):
  """A type of GGUF's tensors.

  Attributes:
    elements: of a block.
    fields: the bytes of each field of a block, in order.
    decode: the fields of all blocks of some rows as codes.
  """

  elements: int
  fields: dict[str, int]
  decode: Callable[[Fields], Codes]


def blocks_as_codes(kind: str, data: np.ndarray, shape: Sequence[int]) -> Codes:
  """The blocks of a tensor as codes and scales; no array of its size in floats is made.

  Args:
    kind: a key of `KINDS`.
    data: bytes, a row of blocks for each row of the weight.
    shape: of the weight, rows last but one.

  Raises:
    FormatError: where blocks do not fill rows, or bytes are missing.
  """
  elements, fields, decode = KINDS[kind]
  size = sum(fields.values())
  if not shape or shape[-1] % elements:
    raise FormatError(f"shape {tuple(shape)} has rows of no whole blocks of {elements}, which {kind} has.")
  expected = (*shape[:-1], shape[-1] // elements * size)
  if data.dtype != np.uint8 or data.shape != expected:
    raise FormatError(
      f"found {data.dtype}{data.shape}, expected bytes of shape {expected} for {tuple(shape)} in {kind}."
    )
  blocks = data.reshape(-1, shape[-1] // elements, size)
  parts, first = {}, 0
  for name, count in fields.items():
    parts[name] = np.ascontiguousarray(blocks[..., first : first + count])
    first += count
  return _in_shape(decode(parts), shape[:-1])


def _in_shape(found: Codes, before: Sequence[int]) -> Codes:
  """Codes of rows as those of a weight: with the axes before its last."""
  shaped = lambda part: _in_shape(part, before) if isinstance(part, Codes) else part.reshape(*before, -1)
  offset = None if found.offset is None else shaped(found.offset)
  return dataclasses.replace(found, codes=found.codes.reshape(*before, -1), scales=shaped(found.scales), offset=offset)


def _halves(fields: Fields, name: str) -> np.ndarray:
  """A half-precision number for each block: (rows, blocks)."""
  return fields[name].view("<f2")[..., 0]


def _nibbles(packed: np.ndarray, run: int) -> np.ndarray:
  """The low halves of a run of bytes, and then the high ones: (rows, elements)."""
  runs = packed.reshape(len(packed), -1, 1, run)
  return np.concatenate([runs & 15, runs >> 4], axis=2).reshape(len(packed), -1)


def _q4_0(fields: Fields) -> Codes:
  codes = _nibbles(fields["q"], 16).view(np.int8) - np.int8(8)
  return Codes(in_4_bits(codes, signed=True), _halves(fields, "d"), format="q4_0")


def _q4_1(fields: Fields) -> Codes:
  return Codes(in_4_bits(_nibbles(fields["q"], 16)), _halves(fields, "d"), _halves(fields, "m"))


def _q8_0(fields: Fields) -> Codes:
  return Codes(fields["q"].view(np.int8).reshape(len(fields["q"]), -1), _halves(fields, "d"))


def _q4_k(fields: Fields) -> Codes:
  """Of 12 bytes the low 6 bits of 4 are scales, those of 4 minima; what is left holds the four others of each."""
  low, least, both = np.split(fields["s"], 3, axis=-1)
  scales = np.concatenate([low & 63, (both & 15) | ((low >> 2) & 48)], axis=-1)
  minima = np.concatenate([least & 63, (both >> 4) | ((least >> 2) & 48)], axis=-1)
  nested = lambda codes, of: Codes(codes.reshape(len(codes), -1), of)
  codes = in_4_bits(_nibbles(fields["q"], 32))
  return Codes(codes, nested(scales, _halves(fields, "d")), nested(minima, -_halves(fields, "e")))


def _q6_k(fields: Fields) -> Codes:
  """The low 4 bits of 128 elements are in the halves of 64 bytes, their high 2 bits in the quarters of 32."""
  rows = len(fields["low"])
  low = _nibbles(fields["low"], 64)
  high = fields["high"].reshape(rows, -1, 1, 32) >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
  codes = (low | ((high & 3) << 4).reshape(rows, -1)).view(np.int8) - np.int8(32)
  return Codes(codes, Codes(fields["s"].view(np.int8).reshape(rows, -1), _halves(fields, "d")))


KINDS = {
  "Q4_0": Kind(32, {"d": 2, "q": 16}, _q4_0),
  "Q4_1": Kind(32, {"d": 2, "m": 2, "q": 16}, _q4_1),
  "Q8_0": Kind(32, {"d": 2, "q": 32}, _q8_0),
  "Q4_K": Kind(256, {"d": 2, "e": 2, "s": 12, "q": 128}, _q4_k),
  "Q6_K": Kind(256, {"low": 128, "high": 64, "s": 16, "d": 2}, _q6_k),
}
