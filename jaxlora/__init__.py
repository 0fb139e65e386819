"""jaxlora: LoRA as a functional transform of pytrees, for JAX and Flax.

A tree of parameters becomes a tree with frozen bases and trainable low-rank factors; `wrap` makes any function take it,
without touching the function; gradients, optimizer state and checkpoints hold only the factors.
"""

from jaxlora import arithmetic, init, serving, svd
from jaxlora._adapt.adapt import adapt
from jaxlora._adapt.config import LoraConfig
from jaxlora._adapt.halves import join, split
from jaxlora._adapt.merge import merge, strip
from jaxlora._adapt.summary import summary
from jaxlora._base.matrix import LowRank
from jaxlora._train.adalora import prune, sensitivity
from jaxlora._train.gradients import grad, value_and_grad
from jaxlora._train.optimizer import labels, lora_plus, mask, optimizer
from jaxlora._transform.explain import explain
from jaxlora._transform.record import MaterializeError, MaterializeWarning
from jaxlora._transform.wrap import wrap
from jaxlora._version import __version__
from jaxlora._weight.weight import FullWeight, LoraWeight
from jaxlora.arithmetic._combine import combine
from jaxlora.arithmetic._measures import cosine, norms
from jaxlora.arithmetic._scale import interpolate, scale, subtract
from jaxlora.init._from_data import init_from_data
from jaxlora.serving._adapters import pad
from jaxlora.serving._bank import Bank
from jaxlora.serving._route import route
from jaxlora.serving._stack import stack
from jaxlora.svd._compress import compress
from jaxlora.svd._extract import extract
from jaxlora.svd._low_rank import low_rank
from jaxlora.svd._ranks import allocate
from jaxlora.svd._truncation import Truncation
from jaxlora.svd._update import spectrum

__all__ = [
  "Bank",
  "FullWeight",
  "LoraConfig",
  "LoraWeight",
  "LowRank",
  "MaterializeError",
  "MaterializeWarning",
  "Truncation",
  "__version__",
  "adapt",
  "allocate",
  "arithmetic",
  "combine",
  "compress",
  "cosine",
  "explain",
  "extract",
  "grad",
  "init",
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
  "serving",
  "spectrum",
  "split",
  "stack",
  "strip",
  "subtract",
  "summary",
  "svd",
  "value_and_grad",
  "wrap",
]
