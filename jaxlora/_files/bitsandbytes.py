"""bitsandbytes' weights: codes of 4 bits (NF4, FP4) with the largest value of each block, and signed bytes by rows.

    W = map[code] * absmax[block],    W = code * SCB[row] / 127

A weight of (out, in) is flattened, the even element of a pair in the high half of a byte. With double quantisation the
blocks' largest values are codes themselves: `nested_map[code] * nested_absmax[block] + offset`.
"""

from collections.abc import Mapping, Sequence
import json
import math
from typing import Any

import numpy as np

from jaxlora._files.codes import Codes, Part, halves, in_4_bits, in_runs
from jaxlora._files.format import Arrays, Config, Format, FormatError, Headers, Quantised, Read

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


def _find_4bit(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del config
  found = []
  for state_name, name in ((n, n.removesuffix(f".{s}")) for n in tensors for s in _STATES if n.endswith(f".{s}")):
    state = _state(state_name, read(state_name))
    parts = {"codes": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map"}
    if "nested_blocksize" in state:
      parts |= {"nested_absmax": f"{name}.nested_absmax", "nested_map": f"{name}.nested_quant_map"}
    shape = tuple(state["shape"])
    sizes = _sizes(shape, state)
    wrong = [
      f"{own} of {math.prod(tensors[own].shape)} elements, {sizes[part]} expected" if own in tensors else f"no {own}"
      for part, own in parts.items()
      if own not in tensors or math.prod(tensors[own].shape) != sizes[part]
    ]
    if wrong:
      raise FormatError(f"{name}: shape {shape} by {state_name}; found {', '.join(wrong)}.")
    found.append(Quantised(name, BNB4, shape, parts | {"state": state_name}, {**state, "shape": shape}))
  return found


def _state(name: str, stored: np.ndarray) -> dict[str, Any]:
  """What a tensor of JSON says of a weight."""
  try:
    state = json.loads(stored.astype(np.uint8).tobytes())
    numbers = [*state["shape"], state["blocksize"], state.get("nested_blocksize", 1)]
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise FormatError(f"{name}: expected JSON with a shape and a blocksize; {type(error).__name__}: {error}") from None
  if len(numbers) < 3 or not all(type(n) is int and n > 0 for n in numbers):
    raise FormatError(f"{name}: shape {state['shape']} and blocks of {numbers[-2:]}, expected positive sizes.")
  return state


def _sizes(shape: Sequence[int], state: Config) -> dict[str, int]:
  """The elements of each part of a weight."""
  blocks = -(-math.prod(shape) // state["blocksize"])
  sizes = {"codes": (math.prod(shape) + 1) // 2, "absmax": blocks, "map": 16, "nested_map": 256}
  return sizes | {"nested_absmax": -(-blocks // state.get("nested_blocksize", 1))}


def _codes_4bit(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  shape = about["shape"]
  packed = parts["codes"].reshape(-1).view(np.uint8)
  codes = halves(packed, high_first=True)[: math.prod(shape)].reshape(shape)
  return Codes(in_4_bits(codes), _absmax(parts, about), book=parts["map"])


def _absmax(parts: Arrays, about: Mapping[str, Any]) -> Part:
  """The scales of all blocks. As codes where the blocks of those are blocks of the array that scales are."""
  shape, size, absmax = about["shape"], about["blocksize"], parts["absmax"].reshape(-1)
  if "nested_map" not in parts:
    return in_runs(absmax.astype(np.float32), size, shape)
  outer, offset = parts["nested_absmax"].reshape(-1).astype(np.float32), np.float32(about.get("nested_offset", 0))
  run = about["nested_blocksize"]
  grid = (*shape[:-1], shape[-1] // size)
  if shape[-1] % size == 0:
    nested = in_runs(outer, run, grid)
    if 4 * nested.size < absmax.size:
      return Codes(absmax.reshape(grid), nested, np.full((1,) * len(grid), offset), parts["nested_map"])
  scales = parts["nested_map"].astype(np.float32)[absmax] * np.repeat(outer, run)[: absmax.size] + offset
  return in_runs(scales, size, shape)


def _find_8bit(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del config
  found = []
  for scale, module in ((name, name.removesuffix(".SCB")) for name in tensors if name.endswith(".SCB")):
    parts = {"codes": f"{module}.weight", "scale": scale}
    order = f"{module}.weight_format"
    if order in tensors:
      parts["order"] = order
      if np.any(read(order)):
        raise FormatError(f"{order}: an order of elements for one kind of GPU; expected rows. Save it again on a CPU.")
    codes = tensors.get(parts["codes"])
    if codes is None or codes.code != "I8" or tensors[scale].shape != codes.shape[:1]:
      raise FormatError(f"{scale}: expected {parts['codes']} of signed bytes with as many rows.")
    found.append(Quantised(parts["codes"], BNB8, codes.shape, parts))
  return found


def _codes_8bit(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  del about
  return Codes(parts["codes"], (parts["scale"].astype(np.float32) / np.float32(127))[:, None])


BNB4 = Format("bitsandbytes (4 bits)", _find_4bit, _codes_4bit)
BNB8 = Format("bitsandbytes (8 bits)", _find_8bit, _codes_8bit)
