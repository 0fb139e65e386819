"""Bases that are not floats: trees whose weights are codes and scales."""

from jaxlora._quant.array import QuantizedArray
from jaxlora._quant.reordered import ReorderedArray
from jaxlora.quant._gguf import from_gguf
from jaxlora.quant._host import rest_on_host
from jaxlora.quant._merge import merge_and_requantize
from jaxlora.quant._quantize import dequantize, quantize, quantize_with_report
from jaxlora.quant._qwix import from_qwix
from jaxlora.quant._report import LeafQuantization, Quantization
from jaxlora.quant._tensors import from_tensors

__all__ = [
  "LeafQuantization",
  "Quantization",
  "QuantizedArray",
  "ReorderedArray",
  "dequantize",
  "from_gguf",
  "from_qwix",
  "from_tensors",
  "merge_and_requantize",
  "quantize",
  "quantize_with_report",
  "rest_on_host",
]
