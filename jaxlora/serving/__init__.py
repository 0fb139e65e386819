"""Many adapters on one base: `stack` makes a bank of them, `route` runs a batch whose rows use different ones.

    bank = jaxlora.serving.stack({"translate": one, "summarise": two}, capacity=8)
    apply = jax.jit(jaxlora.serving.route(lambda params, x: model.apply({"params": params}, x)))
    logits = apply(params, bank, bank.ids(["translate", None, "summarise"]), x)

A new adapter goes into a free slot (`bank.put`), and nothing is compiled again.
"""

from jaxlora.serving._adapters import pad
from jaxlora.serving._bank import Bank
from jaxlora.serving._route import route
from jaxlora.serving._stack import stack

__all__ = ["Bank", "pad", "route", "stack"]
