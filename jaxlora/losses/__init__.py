"""Losses for large heads: `chunked_cross_entropy` computes logits in parts and never holds all of them.

    loss, metrics = jaxlora.losses.chunked_cross_entropy(hidden, head, labels, weights=mask)

optax's losses (0.2.8) take logits. tokamax fuses the head with the loss for plain heads, with a derivative of its own:
the update of an adapted head would have to be formed as one array for it.
"""

from jaxlora.losses._chunked import Metrics, chunked_cross_entropy

__all__ = ["Metrics", "chunked_cross_entropy"]
