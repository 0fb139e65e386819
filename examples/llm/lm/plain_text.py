"""What a model forgets: its loss on plain text that no run trains on, the prose of Python's own reference.

`pydoc_data.topics` is in the standard library. Its text differs between versions of Python: its digest is kept beside
every loss, and losses of different texts are not compared.
"""

from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np

from . import packing
from .model import Llama
from .tokens import Chat

WINDOWS, LENGTH = 16, 256  # pieces of the text, evenly spread, and tokens of each
TOGETHER = 4


def pieces(chat: Chat) -> np.ndarray:
  """The text's tokens: (WINDOWS, LENGTH)."""
  from pydoc_data import topics

  text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
  starts = np.linspace(0, len(text), WINDOWS, endpoint=False).astype(int)
  ends = [*starts[1:], len(text)]
  found = [chat.encode(text[begin:end])[:LENGTH] for begin, end in zip(starts, ends, strict=True)]
  return np.array(found, np.int32)


@jax.jit
def _total(model: Llama, tokens: jax.Array) -> jax.Array:
  hidden = model.packed(tokens[:, :-1], jnp.ones(tokens[:, 1:].shape, jnp.int32))
  return packing.head_losses(model, hidden, tokens[:, 1:], jnp.ones(tokens[:, 1:].shape, bool)).total


def losses(model: Llama, chat: Chat) -> dict[str, Any]:
  """The mean of -log p over the text's tokens, in nats, of plain weights."""
  tokens = pieces(chat)
  total = sum(float(_total(model, tokens[k : k + TOGETHER])) for k in range(0, WINDOWS, TOGETHER))
  return {"loss": total / tokens[:, 1:].size, "tokens": tokens[:, 1:].size, "digest": harness.digest([], [tokens])}
