"""bitsandbytes' weights: codes of 4 bits (NF4, FP4) with the largest value of each block, and signed bytes by rows.

    W = map[code] * absmax[block],    W = code * SCB[row] / 127

A weight of (out, in) is flattened, the even element of a pair in the high half of a byte. With double quantisation the
blocks' largest values are codes themselves: `nested_map[code] * nested_absmax[block] + offset`.
"""

from collections.abc import Mapping
import json
import math
from typing import Any

import numpy as np

from jaxlora._files.format import Arrays, Config, Format, FormatError, Headers, Quantised, Read

_STATES = ("quant_state.bitsandbytes__nf4", "quant_state.bitsandbytes__fp4")


def _find_4bit(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del config
  found = []
  for state_name, name in ((n, n.removesuffix(f".{s}")) for n in tensors for s in _STATES if n.endswith(f".{s}")):
    state = json.loads(read(state_name).astype(np.uint8).tobytes())
    parts = {"codes": name, "absmax": f"{name}.absmax", "map": f"{name}.quant_map"}
    if "nested_blocksize" in state:
      parts |= {"nested_absmax": f"{name}.nested_absmax", "nested_map": f"{name}.nested_quant_map"}
    missing = [part for part in parts.values() if part not in tensors]
    shape = tuple(state["shape"])
    if missing or math.prod(tensors[name].shape) != (math.prod(shape) + 1) // 2:
      raise FormatError(f"{name}: of shape {shape} by {state_name}; {', '.join(missing) or 'its bytes'} do not fit.")
    found.append(Quantised(name, BNB4, shape, parts | {"state": state_name}, {**state, "shape": shape}))
  return found


def _dequantise_4bit(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  shape = about["shape"]
  packed = parts["codes"].reshape(-1).view(np.uint8)
  codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: math.prod(shape)]
  absmax = parts["absmax"]
  if "nested_map" in parts:
    outer = np.repeat(parts["nested_absmax"].astype(np.float32), about["nested_blocksize"])[: absmax.size]
    absmax = parts["nested_map"].astype(np.float32)[absmax] * outer + np.float32(about.get("nested_offset", 0))
  scale = np.repeat(absmax.astype(np.float32), about["blocksize"])[: codes.size]
  return (parts["map"].astype(np.float32)[codes] * scale).reshape(shape)


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


def _dequantise_8bit(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  del about
  return parts["codes"].astype(np.float32) * (parts["scale"].astype(np.float32) / np.float32(127))[:, None]


BNB4 = Format("bitsandbytes (4 bits)", _find_4bit, _dequantise_4bit)
BNB8 = Format("bitsandbytes (8 bits)", _find_8bit, _dequantise_8bit)
