"""jaxlora: LoRA as a functional transform of pytrees, for JAX and Flax.

A tree of parameters becomes a tree with frozen bases and trainable low-rank factors; `wrap` makes any function take it,
without touching the function; gradients, optimizer state and checkpoints hold only the factors.
"""

from jaxlora._adapt import adapt, join, merge, split, strip
from jaxlora._adaptive import prune, sensitivity
from jaxlora._arithmetic import combine, cosine, interpolate, norms, scale, subtract
from jaxlora._bank import Bank, pad, route, stack
from jaxlora._config import LoraConfig
from jaxlora._decompose import Truncation, allocate, compress, low_rank, spectrum
from jaxlora._extract import extract
from jaxlora._from_data import init_from_data
from jaxlora._matrix import LowRank
from jaxlora._optim import grad, labels, lora_plus, mask, optimizer, value_and_grad
from jaxlora._report import explain, summary
from jaxlora._transform import MaterializeError, MaterializeWarning, wrap
from jaxlora._weight import FullWeight, LoraWeight

__version__ = "0.1.0"

__all__ = [
  "Bank",
  "FullWeight",
  "LoraConfig",
  "LoraWeight",
  "LowRank",
  "MaterializeError",
  "MaterializeWarning",
  "Truncation",
  "adapt",
  "allocate",
  "combine",
  "compress",
  "cosine",
  "explain",
  "extract",
  "grad",
  "init_from_data",
  "interpolate",
  "join",
  "labels",
  "lora_plus",
  "low_rank",
  "mask",
  "merge",
  "norms",
  "optimizer",
  "pad",
  "prune",
  "route",
  "scale",
  "sensitivity",
  "spectrum",
  "split",
  "stack",
  "strip",
  "subtract",
  "summary",
  "value_and_grad",
  "wrap",
]
