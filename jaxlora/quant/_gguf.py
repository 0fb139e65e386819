"""Tensors of GGUF files as bases."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxlora._files.format import FormatError
from jaxlora._files.gguf import KINDS, blocks_as_codes
from jaxlora._quant.array import QuantizedArray
from jaxlora.quant._stored import base_of, on_device


def from_gguf(tensor: Any, *, dtype: Any = jnp.float32) -> QuantizedArray:
  """Takes the blocks of a GGUF tensor for a base: codes and scales as the file has them, without a copy in floats.

      W = d * q + m,    W = (d * s) * q - (e * t)

  Args:
    tensor: one of `gguf.GGUFReader(path).tensors`, of the type Q4_0, Q4_1, Q8_0, Q4_K or Q6_K; or anything with its
      `name`, `tensor_type`, `shape` (the fastest axis first, as GGUF counts them) and `data` (bytes; may be mapped).
    dtype: of the array that the base stands for, which the model computes with.

  Returns:
    A `QuantizedArray` in the order of the file's rows, (out, in) for a linear layer: `.T` is Flax's kernel. In float32
    its values are those of `gguf.dequantize`, to the bit. Q6_K takes 8 bits a code, all others the bits that they have
    in the file; blocks run along the last axis, so that stacks and embeddings are looked up in codes.

  Raises:
    ValueError: naming the tensor: of another type (floats among them), rows of no whole blocks, bytes that are missing,
      scales that are NaN or infinite.

  Example:
    >>> import jaxlora
    >>> tensors = gguf.GGUFReader("model.gguf").tensors  # doctest: +SKIP
    >>> tensors[2].name, jaxlora.quant.from_gguf(tensors[2])  # doctest: +SKIP
    ('blk.0.ffn_down.weight', QuantizedArray(576x1536 float32 as uint4, blocks 1x32))
    >>> params = {"kernel": jaxlora.quant.from_gguf(tensors[2]).T}  # doctest: +SKIP

  Source: ggml's `ggml-quants.c`; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
  """
  return on_device(gguf_base(tensor, dtype, f"from_gguf: {tensor.name}"))


def gguf_base(tensor: Any, dtype: Any, said: str) -> QuantizedArray:
  """`from_gguf`, of NumPy arrays still; `said` begins its errors."""
  kind = getattr(tensor.tensor_type, "name", str(tensor.tensor_type))
  if kind in PLAIN:
    raise ValueError(f"{said}: found the type {kind}, expected codes. {PLAIN[kind]}")
  if kind not in KINDS:
    raise ValueError(
      f"{said}: found the type {kind}, expected one of {', '.join(KINDS)}. Decode it with gguf.dequantize(tensor.data,"
      " tensor.tensor_type), and quantise the floats here (jaxlora.quantize)."
    )
  shape = tuple(int(size) for size in reversed(tensor.shape))
  try:
    found = blocks_as_codes(kind, np.asarray(tensor.data), shape)
  except FormatError as error:
    raise ValueError(f"{said}: {error} Read the file again with gguf.GGUFReader, or download it anew.") from None
  return base_of(found, dtype, said)


_AS_THEY_ARE = "tensor.data is the array: no codes to take."
PLAIN = {
  **dict.fromkeys(("F16", "F32", "F64", "I8", "I16", "I32", "I64"), _AS_THEY_ARE),
  "BF16": "gguf.dequantize(tensor.data, tensor.tensor_type) is the array.",
}
