"""Weights of 8 bits with scales beside them: one for all, one for each output, or one for each block.

    W = codes * scale

DeepSeek-V3 and Qwen3-FP8 (`weight_scale_inv`, blocks of 128 x 128; the name says inverse, the product is meant), vLLM's
compressor, modelopt and FBGEMM (`weight_scale`), DeepSeek's own files (`scale`), Mistral's (`qscale_weight`) and
ComfyUI's (`scale_weight`) differ in names alone. Scales in bytes are powers of two, as MXFP8 has them. Signed bytes
with scales are compressed-tensors' `int-quantized` and `naive-quantized`; with zero points they are only decoded.
"""

from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._files.codes import Codes, numbers, spread
from jaxlora._files.format import Arrays, Config, Format, FormatError, Headers, Quantised, Read

CODES = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}

_SCALES = ("F32", "F16", "BF16", "F64", "F8_E8M0", "U8")  # dtypes that scales have; bytes are exponents

_USUAL = 128  # DeepSeek's blocks


def _find_float(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del read
  return _find(tensors, config, tuple(CODES), FLOAT8)


def _find_int(tensors: Headers, config: Config, read: Read) -> list[Quantised]:
  del read
  found = _find(tensors, config, ("I8",), INT8)
  zeros = [f"{weight.name}_zero_point" for weight in found]
  return [_with_zeros(weight, z, tensors) if z in tensors else weight for weight, z in zip(found, zeros, strict=True)]


def _with_zeros(weight: Quantised, zeros: str, tensors: Headers) -> Quantised:
  """A weight with zero points beside it, which lie as its scales do."""
  if tensors[zeros].code != "I8" or tensors[zeros].shape != tensors[weight.parts["scale"]].shape:
    raise FormatError(
      f"{zeros}: found {tensors[zeros].code}{tensors[zeros].shape}; expected bytes in the scales' shape."
    )
  return dataclasses.replace(weight, format=INT8_ZEROS, parts={**weight.parts, "zeros": zeros})


def _find(tensors: Headers, config: Config, codes: Sequence[str], form: Format) -> list[Quantised]:
  told = told_blocks(config)
  found = []
  for name, tensor in tensors.items():
    scale = _scale_of(name, tensors) if tensor.code in codes else None
    if scale is None:
      continue
    blocks = block_sizes(tensor.shape, tensors[scale].shape, told)
    if blocks is None or tensors[scale].code not in _SCALES:
      raise FormatError(
        f"{name}: found {scale} of shape {tensors[scale].shape} ({tensors[scale].code}) beside {tensor.shape};"
        f" expected one scale, one for each output, or one for each block of {' or '.join(map(str, told)) or _USUAL}."
        ' Other sizes are those that "weight_block_size" in the "quantization_config" of config.json says.'
      )
    parts = {"codes": name, "scale": scale}
    found.append(Quantised(name, form, tensor.shape, parts, {"blocks": blocks}))
  return found


def _scale_of(name: str, tensors: Headers) -> str | None:
  """The tensor that holds a weight's scales."""
  module, _, parameter = name.rpartition(".")
  names = [f"{name}_scale_inv", f"{name}_scale"]
  if parameter == "weight":
    names += [f"{module}.{own}" for own in ("scale_weight", "qscale_weight", "scale")]
  return next((scale for scale in names if scale in tensors), None)


def told_blocks(config: Config) -> list[tuple[int, ...]]:
  """The sizes of blocks, of the last axes of a weight, that a configuration tells of; `-1` is all of an axis.

  `weight_block_size` as in DeepSeek-V3; the groups of compressed-tensors, in rows or in blocks.
  """
  groups = config.get("config_groups")
  found = [group.get("weights") for group in groups.values()] if isinstance(groups, Mapping) else []
  weights = [own for own in found if isinstance(own, Mapping)]
  told = [config.get("weight_block_size"), *(own.get("block_structure") for own in weights)]
  told += [[1, own["group_size"]] for own in weights if own.get("group_size")]
  return [tuple(sizes) for sizes in told if isinstance(sizes, (list, tuple)) and all(type(n) is int for n in sizes)]


def block_sizes(shape: Sequence[int], scales: Sequence[int], told: Sequence[Sequence[int]]) -> tuple[int, ...] | None:
  """The sizes of the blocks that share a scale, by axis; `None` if scales of that shape fit no known blocks.

  Blocks may end with a smaller one, so that several sizes can fit. Where none are told, DeepSeek's are taken, and
  powers of two that leave no smaller one.

  Args:
    shape: of the weight.
    scales: the shape of its scales.
    told: the sizes by the model's configuration, of the last axes.
  """
  if math.prod(scales) == 1:
    return tuple(shape)
  if len(scales) == 1:
    scales = (*scales, *(1 for _ in shape[1:]))
  if len(scales) != len(shape):
    return None
  usual = [
    _USUAL if -(-size // _USUAL) == count else _power_of_two(size, count)
    for size, count in zip(shape, scales, strict=True)
  ]
  for sizes in told or [tuple(usual)]:
    found = tuple(map(_block_size, shape, scales, [1] * (len(shape) - len(sizes)) + list(sizes)))
    if len(sizes) <= len(shape) and 0 not in found:
      return found
  return None


def _power_of_two(size: int, count: int) -> int:
  """The size of `count` blocks that are all of a power of two; 0 if they are not."""
  block, rest = divmod(size, count) if count else (0, 1)
  return block if rest == 0 and block & (block - 1) == 0 else 0


def _block_size(size: int, count: int, wanted: int) -> int:
  """The size of each of `count` blocks along an axis; 0 if there is none."""
  if count in (1, size):
    return size // count
  return wanted if wanted > 0 and -(-size // wanted) == count else 0


def _of_blocks(scale: np.ndarray, shape: Sequence[int], blocks: Sequence[int]) -> np.ndarray:
  """Scales with as many axes as the weight, each a divisor of its own.

  Where the last block of an axis is a smaller one, a scale is repeated for pieces that fill the axis and the blocks.
  """
  scale = _numbers(scale).reshape([-(-size // block) for size, block in zip(shape, blocks, strict=True)])
  for axis, (size, block) in enumerate(zip(shape, blocks, strict=True)):
    if size % block:
      piece = math.gcd(size, block)
      scale = scale.take(np.arange(0, size, piece) // block, axis)
  return scale


def _spread(scale: np.ndarray, shape: Sequence[int], blocks: Sequence[int]) -> np.ndarray:
  """Scales as an array that broadcasts to the weight's shape, float32."""
  return spread(_of_blocks(scale, shape, blocks).astype(np.float32), shape)


def _numbers(scale: np.ndarray) -> np.ndarray:
  """Scales as floats: bytes are exponents of two."""
  return scale.view(jnp.float8_e8m0fnu) if scale.dtype == np.uint8 else scale


def _as_codes(parts: Arrays, about: Mapping[str, Any]) -> Codes:
  codes, blocks = parts["codes"], about["blocks"]
  scales = _of_blocks(parts["scale"], codes.shape, blocks)
  if "zeros" not in parts:
    return Codes(codes, scales)
  zeros = _of_blocks(parts["zeros"], codes.shape, blocks)
  return Codes(codes, scales, Codes(zeros, -scales))


def _requantise(value: np.ndarray, parts: Arrays, about: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Codes with the scales that suit the new values, or with the old ones where their error is no larger.

  With the old scale every weight that has not changed keeps its code; with a new one the largest is not cut off.
  """
  blocks, dtype = about["blocks"], parts["codes"].dtype
  old = _numbers(parts["scale"])
  new = _scales_for(value, old, blocks, _largest(dtype))
  trials = [(scale, _codes(value, scale, blocks, dtype)) for scale in (old, new)]
  errors = [_block_errors(value, codes, scale, blocks) for scale, codes in trials]
  keep = (errors[0] <= errors[1]).reshape(old.shape)
  scale = np.where(keep, old.astype(np.float32), new.astype(np.float32)).astype(old.dtype)
  kept = _spread(keep, value.shape, blocks) > 0
  with_old, with_new = (codes.view(np.uint8) for _, codes in trials)
  codes = np.where(kept, with_old, with_new).view(dtype)
  return {"codes": codes, "scale": scale.view(parts["scale"].dtype)}


def _largest(dtype: Any) -> float:
  return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def _codes(value: np.ndarray, scale: np.ndarray, blocks: Sequence[int], dtype: Any) -> np.ndarray:
  largest = _largest(dtype)
  divisor = np.where(_numbers(scale).astype(np.float32) == 0, 1, _numbers(scale).astype(np.float32))
  exact = value / _spread(divisor, value.shape, blocks)
  exact = np.rint(exact) if jnp.issubdtype(dtype, jnp.integer) else exact
  lowest = -largest - 1 if jnp.issubdtype(dtype, jnp.integer) else -largest
  return np.clip(exact, lowest, largest).astype(dtype)


def _block_errors(value: np.ndarray, codes: np.ndarray, scale: np.ndarray, blocks: Sequence[int]) -> np.ndarray:
  """The squared error of each block."""
  difference = numbers(codes) * _spread(scale, value.shape, blocks) - value
  return _by_block(np.add, difference * difference, blocks)


def _by_block(combine: np.ufunc, value: np.ndarray, blocks: Sequence[int]) -> np.ndarray:
  """One number for each block: its elements combined, by an operation that zeros do not change."""
  if any(size % block for size, block in zip(value.shape, blocks, strict=True)):
    value = np.pad(value, [(0, -size % block) for size, block in zip(value.shape, blocks, strict=True)])
  pairs = [(size // block, block) for size, block in zip(value.shape, blocks, strict=True)]
  return combine.reduce(value.reshape([n for pair in pairs for n in pair]), tuple(range(1, 2 * value.ndim, 2)))


def _scales_for(value: np.ndarray, old: np.ndarray, blocks: Sequence[int], largest: float) -> np.ndarray:
  """The scales that make the largest value of each block the largest code; powers of two where the old ones are."""
  scale = _by_block(np.maximum, np.abs(value), blocks).reshape(old.shape) / np.float32(largest)
  wide = old.astype(np.float32)
  if (np.frexp(wide)[0] == 0.5).all():
    scale = np.where(scale > 0, np.exp2(np.ceil(np.log2(np.where(scale > 0, scale, 1)))), 0)
  return np.where(scale > 0, scale, wide).astype(old.dtype)


FLOAT8 = Format("FP8", _find_float, _as_codes, _requantise)
INT8 = Format("INT8", _find_int, _as_codes, _requantise)
INT8_ZEROS = Format("INT8 with zero points", lambda *_: [], _as_codes)
