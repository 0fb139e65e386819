"""Floats of 4 bits with a scale for each block: MXFP4 as gpt-oss stores its experts, NVFP4 as compressed-tensors does.

    W = value[code] * 2^(scale - 127),    W = value[code] * scale / global_scale

The even element of a pair is in the low half of a byte.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxlora._files.format import Arrays, Config, Format, Headers, Quantised, Read

_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_VALUES = np.array([*_POSITIVE, *(-value for value in _POSITIVE)], np.float32)  # E2M1


def _values(packed: np.ndarray) -> np.ndarray:
  """The numbers of bytes, two for each along the last axis."""
  codes = np.stack([packed & 15, packed >> 4], axis=-1)
  return _VALUES[codes.reshape(*packed.shape[:-1], -1)]


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


def _dequantise_mxfp4(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  """Stored as (..., out, groups, bytes); transformers' parameter is (..., in, out)."""
  del about
  exponents = parts["scales"].astype(np.int32) - 127
  values = np.ldexp(_values(parts["blocks"]), exponents[..., None])
  return values.reshape(*values.shape[:-2], -1).swapaxes(-1, -2)


def _find_nvfp4(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del config, read
  found = []
  for packed, module in ((n, n.removesuffix(".weight_packed")) for n in tensors if n.endswith(".weight_packed")):
    parts = {"packed": packed, "scale": f"{module}.weight_scale", "global_scale": f"{module}.weight_global_scale"}
    if all(name in tensors for name in parts.values()) and tensors[packed].code == "U8":
      outs, half = tensors[packed].shape
      found.append(Quantised(f"{module}.weight", NVFP4, (outs, half * 2), parts))
  return found


def _dequantise_nvfp4(parts: Arrays, about: Mapping[str, Any]) -> np.ndarray:
  del about
  scale = parts["scale"].astype(np.float32) / parts["global_scale"].astype(np.float32)
  values = _values(parts["packed"])
  return values * np.repeat(scale, values.shape[1] // scale.shape[1], axis=1)


MXFP4 = Format("MXFP4", _find_mxfp4, _dequantise_mxfp4)
NVFP4 = Format("NVFP4", _find_nvfp4, _dequantise_nvfp4)
