"""Decoding, greedy and by beam, beside a cache of keys and values.

`decode` takes any apply function of the model's signature, wrapped or not. Prefixes are padded on the left, so that all
rows of a batch write at the same position.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from .decoder import END, PAD, Cache, Decoder, empty_cache


class Search(NamedTuple):
  """The carry of the decoding loop. Its rows are batch x width sequences; the `width` beams of one input are adjacent.

  Attributes:
    k: how many tokens have been written.
    tokens: (rows, length), `PAD` where none is written yet.
    scores: (rows,), the sums of the tokens' log-probabilities.
    done: (rows,), whether `END` has been written.
    log_probs: (rows, vocabulary), of the next token.
    cache: the model's, with room for prefix + length keys.
  """

  k: jax.Array
  tokens: jax.Array
  scores: jax.Array
  done: jax.Array
  log_probs: jax.Array
  cache: Cache


@functools.partial(jax.jit, static_argnums=(0, 1, 5, 6))
def decode(
  model: Decoder,
  apply: Callable[..., Any],
  params: Any,
  prefix: jax.Array,
  valid: jax.Array,
  length: int,
  width: int = 1,
) -> jax.Array:
  """The most probable continuations: greedy for a width of 1, else by beam search.

  Finished beams are compared by their mean log-probability per token.

  Args:
    model: decides the shapes of the cache.
    apply: `model.apply`, or `jaxlora.wrap(model.apply)`.
    params: parameters, or an adapted tree.
    prefix: tokens (batch, time), padded on the left.
    valid: (batch, time), False for padding.
    length: how many tokens to write at most.
    width: how many beams each input has.

  Returns:
    Tokens (batch, length): up to `END`, then `PAD`.
  """
  batch, start = prefix.shape
  keys = jnp.concatenate([valid, jnp.ones((batch, length), bool)], axis=1)
  logits, cache = apply({"params": params}, prefix, keys, empty_cache(model, batch, start + length), 0, 1)
  rows = jnp.repeat(jnp.arange(batch), width)
  first = jnp.arange(batch * width) % width == 0
  search = Search(
    k=jnp.asarray(0),
    tokens=jnp.full((batch * width, length), PAD),
    scores=jnp.where(first, 0.0, -jnp.inf),  # an input's beams are equal at first: one survives
    done=jnp.zeros(batch * width, bool),
    log_probs=nn.log_softmax(logits[rows, -1]),
    cache=jax.tree.map(lambda kept: kept[rows], cache),
  )

  def step(search: Search) -> Search:
    search, token = grow(search, batch, width, start)
    logits, cache = apply({"params": params}, token[:, None], keys[rows], search.cache, start + search.k, 1)
    return search._replace(k=search.k + 1, log_probs=nn.log_softmax(logits[:, -1]), cache=cache)

  search = jax.lax.while_loop(lambda search: (search.k < length) & ~search.done.all(), step, search)
  written = (search.tokens != PAD).sum(axis=1)
  best = (search.scores / written).reshape(batch, width).argmax(axis=1)
  return search.tokens.reshape(batch, width, length)[jnp.arange(batch), best]


def grow(search: Search, batch: int, width: int, start: int) -> tuple[Search, jax.Array]:
  """Writes the next token of every row, and keeps the best `width` continuations of each input.

  The first `start` keys belong to the prefix and are equal in all beams of an input: only later ones are reordered.
  """
  vocabulary = search.log_probs.shape[-1]
  idle = jnp.where(jnp.arange(vocabulary) == PAD, 0.0, -jnp.inf)  # a finished sequence stays as it is
  busy = search.log_probs.at[:, PAD].set(-jnp.inf)
  totals = search.scores[:, None] + jnp.where(search.done[:, None], idle, busy)
  scores, picked = jax.lax.top_k(totals.reshape(batch, -1), width)
  row = (jnp.arange(batch)[:, None] * width + picked // vocabulary).reshape(-1)
  token = (picked % vocabulary).reshape(-1)
  cache = search.cache
  if width > 1:
    cache = jax.tree.map(lambda kept: kept.at[:, start:].set(kept[row, start:]), cache)
  tokens = search.tokens[row].at[:, search.k].set(token)
  done = search.done[row] | (token == END)
  return search._replace(tokens=tokens, scores=scores.reshape(-1), done=done, cache=cache), token
