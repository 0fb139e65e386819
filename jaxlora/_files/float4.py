"""Floats of 4 bits with a scale for each block: MXFP4 as gpt-oss stores its experts, NVFP4 as compressed-tensors does.

    W = value[code] * 2^(scale - 127),    W = value[code] * scale / global_scale

The even element of a pair is in the low half of a byte.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlora._files.codes import Codes, halves, in_4_bits
from jaxlora._files.format import Arrays, Config, Format, Headers, Quantised, Read

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)  # E2M1


def _find_mxfp4(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del config, read
  found = []
  for blocks, name in ((n, n.removesuffix("_blocks")) for n in tensors if n.endswith("_blocks")):
    scales = f"{name}_scales"
    if scales in tensors and tensors[blocks].code == "U8" and tensors[scales].shape == tensors[blocks].shape[:-1]:
      *stack, outs, groups, half = tensors[blocks].shape
      shape = (*stack, groups * half * 2, outs)
      found.append(Quantised(name, MXFP4, shape, {"blocks": blocks, "scales": scales}))
  return found


def _codes_mxfp4(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  """Stored as (..., out, groups, bytes); transformers' parameter is (..., in, out)."""
  del about
  blocks = parts["blocks"]
  codes = halves(blocks.reshape(*blocks.shape[:-2], -1))
  scales = np.ldexp(np.float32(1), parts["scales"].astype(np.int32) - 127)
  return Codes(in_4_bits(codes.swapaxes(-1, -2)), scales.swapaxes(-1, -2), book=_VALUES)


def _find_nvfp4(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del config, read
  found = []
  for packed, module in ((n, n.removesuffix(".weight_packed")) for n in tensors if n.endswith(".weight_packed")):
    parts = {"packed": packed, "scale": f"{module}.weight_scale", "global_scale": f"{module}.weight_global_scale"}
    if all(name in tensors for name in parts.values()) and tensors[packed].code == "U8":
      outs, half = tensors[packed].shape
      found.append(Quantised(f"{module}.weight", NVFP4, (outs, half * 2), parts))
  return found


def _codes_nvfp4(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  del about
  scale, over = parts["scale"], np.float32(1) / parts["global_scale"].astype(np.float32)
  scales = Codes(scale, over.reshape(1, 1)) if scale.dtype.itemsize == 1 else scale.astype(np.float32) * over
  return Codes(in_4_bits(halves(parts["packed"])), scales, book=_VALUES)


MXFP4 = Format("MXFP4", _find_mxfp4, _codes_mxfp4)
NVFP4 = Format("NVFP4", _find_nvfp4, _codes_nvfp4)
