"""Weights that several tensors of a safetensors file make, as bases."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxlora._base.files import code_of
from jaxlora._files.format import FormatError, Quantised
from jaxlora._files.formats import FORMATS, quantised_weights
from jaxlora._files.named import Neighbours
from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.reordered import ReorderedArray
from jaxlora.quant._stored import IN_FLOATS, base_of, on_device

Base = QuantizedArray | ReorderedArray


class _Header(NamedTuple):
  code: str
  shape: tuple[int, ...]


def from_tensors(
  tensors: Mapping[str, Any], name: str, *, config: Mapping[str, Any] | None = None, dtype: Any = jnp.float32
) -> Base:
  """Takes the tensors that make one weight in a safetensors file for a base, without a copy in floats.

      W = value(codes) * scales + offset

  Read are bitsandbytes (NF4, FP4, also with double quantisation; LLM.int8), GPTQ, AWQ, compressed-tensors, FP8 and INT8
  with scales (`weight_scale_inv`, `weight_scale` and their like), MXFP4 and NVFP4.

  Args:
    tensors: arrays by the names that they have in the file. Only those of this weight are looked at, so that it may be
      all of the file's.
    name: of the weight, such as `model.layers.0.self_attn.q_proj.weight`.
    config: `quantization_config` of the model's config.json. GPTQ files of the second version, groups of several sizes
      and blocks that are not 128 wide need it.
    dtype: of the array that the base stands for, which the model computes with.

  Returns:
    A `QuantizedArray` in torch's layout, (out, in): `.T` is Flax's kernel; MXFP4's is that of transformers, (..., in,
    out). GPTQ's act-order makes a `ReorderedArray`. Codes have 4 or 8 bits. Where blocks do not divide an axis, their
    scales are repeated for pieces that do; second-level scales of blocks that begin within a row become floats.

  Raises:
    ValueError: naming the weight: no tensors that make it, tensors that do not fit together, another format, scales
      that are NaN or infinite.

  Example:
    >>> import numpy as np
    >>> tensors = {"up.weight": np.ones((64, 32), np.int8), "up.weight_scale": np.full((64, 1), 0.1, np.float32)}
    >>> from_tensors(tensors, "up.weight").T
    QuantizedArray(32x64 float32 as int8, blocks 32x1)
  """
  said = f"from_tensors: {name}"
  module = name.removesuffix(".weight")
  near = {own: array for own, array in tensors.items() if own.startswith((f"{module}.", f"{module}_"))}
  arrays = {own: np.asarray(array) for own, array in near.items()}
  headers = {own: _Header(_code(own, array), array.shape) for own, array in arrays.items()}
  try:
    found = quantised_weights(headers, config or {}, arrays.__getitem__)
  except FormatError as error:
    raise ValueError(f"{said}: {error}") from None
  if name not in found:
    known = Neighbours(headers).format_of(name)
    formats = ", ".join(form.name for form in FORMATS)
    if known is None:
      raise ValueError(
        f"{said}: found {', '.join(map(repr, sorted(headers))) or 'no tensor of that name'}, expected the tensors of a"
        f" weight in one of these formats: {formats}. Pass the name that the weight has in the file, and all of its"
        " tensors; a plain array is a base as it is."
      )
    raise ValueError(f"{said}: found {known}, with tensors that make no weight in one of {formats}. {IN_FLOATS}")
  return on_device(stored_base(found[name], arrays.__getitem__, dtype, said))


def _code(name: str, array: np.ndarray) -> str:
  try:
    return code_of(array.dtype)
  except KeyError:
    raise ValueError(f"from_tensors: {name}: dtype {array.dtype}, expected one that safetensors files have.") from None


def stored_base(weight: Quantised, read: Callable[[str], np.ndarray], dtype: Any, said: str) -> Base:
  """A weight of a file as a base, of NumPy arrays still.

  Args:
    weight: what `quantised_weights` found.
    read: the values of a tensor, by name.
    dtype: of the array that it stands for.
    said: the start of an error message.
  """
  try:
    found = weight.format.codes(weight.parts_by(read), weight.about)
  except FormatError as error:
    raise ValueError(f"{said}: {error}") from None
  node = base_of(found, dtype, said)
  return node if found.order is None else ReorderedArray(node, found.order.astype(np.int32))
