"""Flax NNX: modules with factors beside their weights, in NNX's own loop.

The loop:

    model = jaxlora.nnx.adapt(model, jaxlora.LoraConfig(rank=8), key)
    optimizer = nnx.Optimizer(model, tx, wrt=jaxlora.nnx.Trainable)
    loss, grads = nnx.value_and_grad(loss_fn, argnums=nnx.DiffState(0, jaxlora.nnx.Trainable))(model)
    optimizer.update(model, grads)
"""

from jaxlora.nnx._adapt import adapt, from_tree
from jaxlora.nnx._nnx_lora import from_nnx_lora, to_nnx_lora
from jaxlora.nnx._opened import opened as opened
from jaxlora.nnx._opened import to_tree
from jaxlora.nnx._qwix import from_qwix, to_qwix
from jaxlora.nnx._variables import Frozen, Trainable

__all__ = [
  "Frozen",
  "Trainable",
  "adapt",
  "from_nnx_lora",
  "from_qwix",
  "from_tree",
  "to_nnx_lora",
  "to_qwix",
  "to_tree",
]
