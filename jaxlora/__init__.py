"""jaxlora: LoRA as a functional transform of pytrees, for JAX and Flax.

A tree of parameters becomes a tree with frozen bases and trainable low-rank factors; `wrap` makes any function take it,
without touching the function; gradients, optimizer state and checkpoints hold only the factors.

    tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=8), key)
    apply = jaxlora.wrap(model.apply)
    logits = apply({"params": tree}, x)

What belongs together has a face of its own as well: `jaxlora.svd`, `jaxlora.arithmetic`, `jaxlora.init`,
`jaxlora.losses`, `jaxlora.quant`, `jaxlora.serving`, `jaxlora.sharding`, and, imported where they are used,
`jaxlora.checkpoint`, `jaxlora.hub`, `jaxlora.nnx` and `jaxlora.peft`.
"""

import importlib
from typing import Any

from jaxlora import arithmetic, init, losses, serving, sharding, svd
from jaxlora._adapt.adapt import adapt
from jaxlora._adapt.config import LoraConfig
from jaxlora._adapt.halves import join, split
from jaxlora._adapt.merge import merge, strip
from jaxlora._adapt.resize import resize
from jaxlora._adapt.summary import LeafSummary, Summary, summary
from jaxlora._base.matrix import LowRank
from jaxlora._base.rounding import RoundingWarning
from jaxlora._train.adalora import prune, sensitivity
from jaxlora._train.gradients import grad, value_and_grad
from jaxlora._train.muon import muon_dimensions
from jaxlora._train.optimizer import labels, lora_plus, mask, optimizer
from jaxlora._transform.explain import Explanation, explain
from jaxlora._transform.record import MaterializeError, MaterializeWarning, Use
from jaxlora._transform.register import register_product
from jaxlora._transform.wrap import wrap
from jaxlora._version import __version__ as __version__
from jaxlora._weight.register import register_variant, unregister_variant, variants
from jaxlora._weight.start import Start
from jaxlora._weight.variant import Variant
from jaxlora._weight.weight import FullWeight, LoraWeight
from jaxlora.arithmetic import combine, combine_with_report, cosine, interpolate, norms, scale, subtract
from jaxlora.init import init_from_data
from jaxlora.quant import QuantizedArray, dequantize, quantize, quantize_with_report
from jaxlora.serving import Bank, pad, route, stack
from jaxlora.svd import (
  LeafTruncation,
  Truncation,
  allocate,
  compress,
  compress_with_report,
  extract,
  extract_with_report,
  low_rank,
  spectrum,
)

__all__ = [
  "Bank",
  "Explanation",
  "FullWeight",
  "LeafSummary",
  "LeafTruncation",
  "LoraConfig",
  "LoraWeight",
  "LowRank",
  "MaterializeError",
  "MaterializeWarning",
  "QuantizedArray",
  "RoundingWarning",
  "Start",
  "Summary",
  "Truncation",
  "Use",
  "Variant",
  "adapt",
  "allocate",
  "arithmetic",
  "combine",
  "combine_with_report",
  "compress",
  "compress_with_report",
  "cosine",
  "dequantize",
  "explain",
  "extract",
  "extract_with_report",
  "grad",
  "init",
  "init_from_data",
  "interpolate",
  "join",
  "labels",
  "lora_plus",
  "losses",
  "low_rank",
  "mask",
  "merge",
  "muon_dimensions",
  "norms",
  "optimizer",
  "pad",
  "prune",
  "quant",
  "quantize",
  "quantize_with_report",
  "register_product",
  "register_variant",
  "resize",
  "route",
  "scale",
  "sensitivity",
  "serving",
  "sharding",
  "spectrum",
  "split",
  "stack",
  "strip",
  "subtract",
  "summary",
  "svd",
  "unregister_variant",
  "value_and_grad",
  "variants",
  "wrap",
]


def __getattr__(name: str) -> Any:
  """`jaxlora.nnx`, which imports flax, when it is first used."""
  if name == "nnx":
    return importlib.import_module("jaxlora.nnx")
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
