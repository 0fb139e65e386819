"""jaxlora: LoRA as a functional transform of pytrees, for JAX and Flax.

A tree of parameters becomes a tree with frozen bases and trainable low-rank factors; `wrap` makes any function take it,
without touching the function; gradients, optimizer state and checkpoints hold only the factors.
"""

from jaxlora._adapt import adapt, join, merge, split, strip
from jaxlora._bank import Bank, pad, route, stack
from jaxlora._config import LoraConfig
from jaxlora._optim import grad, labels, mask, optimizer, value_and_grad
from jaxlora._report import explain, summary
from jaxlora._transform import MaterializeError, MaterializeWarning, wrap
from jaxlora._weight import FullWeight, LoraWeight

__version__ = "0.1.0"

__all__ = [
  "Bank",
  "FullWeight",
  "LoraConfig",
  "LoraWeight",
  "MaterializeError",
  "MaterializeWarning",
  "adapt",
  "explain",
  "grad",
  "join",
  "labels",
  "mask",
  "merge",
  "optimizer",
  "pad",
  "route",
  "split",
  "stack",
  "strip",
  "summary",
  "value_and_grad",
  "wrap",
]
