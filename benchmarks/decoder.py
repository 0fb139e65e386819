"""A small decoder-only language model in plain Linen, and its decoding: greedy and by beam, beside a cache.

The model knows nothing of LoRA, and decoding takes any apply function of its signature: wrapped or not.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]
Cache = list[tuple[jax.Array, jax.Array]]

END, PAD = 0, 1  # what stands between and after texts; what fills up a batch


# ----------------------------------------------------------------------------------------------------------------------
# The model.


class Attention(nn.Module):
  """Attention of the tokens at hand to all keys so far; with a cache, those of earlier calls come first."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, cache: Any, start: Any) -> tuple[jax.Array, Any]:
    width = x.shape[-1]
    query, key, value = (
      nn.DenseGeneral((self.heads, width // self.heads), name=name)(x) for name in ("query", "key", "value")
    )
    if cache is not None:
      key, value = (
        jax.lax.dynamic_update_slice_in_dim(kept, new, start, axis=1)
        for kept, new in zip(cache, (key, value), strict=True)
      )
      cache = key, value
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
    weights = nn.softmax(jnp.where(mask[:, None], scores, -1e9), axis=-1)
    mixed = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
    return nn.DenseGeneral(width, axis=(-2, -1), name="out")(mixed), cache


class Block(nn.Module):
  """One pre-norm transformer block."""

  heads: int
  mlp: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array, cache: Any, start: Any) -> tuple[jax.Array, Any]:
    mixed, cache = Attention(self.heads, name="attention")(nn.LayerNorm(name="norm_attention")(x), mask, cache, start)
    x = x + mixed
    hidden = nn.gelu(nn.Dense(self.mlp, name="mlp_in")(nn.LayerNorm(name="norm_mlp")(x)))
    return x + nn.Dense(x.shape[-1], name="mlp_out")(hidden), cache


class Decoder(nn.Module):
  """A causal decoder with learned positions; the vocabulary's table is also the head.

  The MLP is three times as wide as the model: A and B of rank r are then as large on the four attention kernels as on
  the MLP's two, and placements compare at equal parameters.
  """

  vocabulary: int = 2048
  width: int = 128
  depth: int = 4
  heads: int = 4
  positions: int = 128

  @nn.compact
  def __call__(
    self, tokens: jax.Array, valid: jax.Array, cache: Cache | None = None, start: Any = 0, last: int | None = None
  ) -> tuple[jax.Array, Cache | None]:
    """Logits (batch, time, vocabulary), and the cache with these tokens in it.

    Args:
      tokens: (batch, time).
      valid: (batch, keys), which of all keys are text and not padding; padding comes first, and takes no position.
      cache: of each block the keys and values so far, (batch, keys, heads, width / heads).
      start: how many keys the cache holds.
      last: how many tokens at the end want logits; all without it.
    """
    table = nn.Embed(self.vocabulary, self.width, name="embed")
    places = start + jnp.arange(tokens.shape[1])
    position = jnp.take(jnp.cumsum(valid, axis=1) - 1, places, axis=1).clip(0)
    x = table(tokens) + nn.Embed(self.positions, self.width, name="position")(position)
    mask = valid[:, None] & (jnp.arange(valid.shape[1]) <= places[:, None])[None]
    kept = []
    for k in range(self.depth):
      block = Block(self.heads, 3 * self.width, name=f"block_{k}")
      x, layer = block(x, mask, None if cache is None else cache[k], start)
      kept.append(layer)
    x = x if last is None else x[:, -last:]
    return table.attend(nn.LayerNorm(name="norm")(x)), None if cache is None else kept

  def settings(self) -> dict[str, int]:
    """What tells one model from another."""
    return {name: getattr(self, name) for name in ("vocabulary", "width", "depth", "heads", "positions")}


@functools.partial(jax.jit, static_argnums=0)
def init(model: Decoder, seed: int) -> Params:
  """Fresh parameters."""
  return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]


def empty_cache(model: Decoder, batch: int, keys: int) -> Cache:
  """The cache before the first token."""
  zeros = jnp.zeros((batch, keys, model.heads, model.width // model.heads))
  return [(zeros, zeros)] * model.depth


# ----------------------------------------------------------------------------------------------------------------------
# Decoding. Prefixes are padded on the left, so that all rows of a batch grow at the same place.


class Search(NamedTuple):
  """What a decoding loop carries; rows are (batch x width) sequences, those of one input side by side.

  Attributes:
    k: how many tokens have been written.
    tokens: (rows, length), `PAD` where nothing has been written.
    scores: (rows,), the sum of the log-probabilities.
    done: (rows,), whether `END` has been written.
    log_probs: (rows, vocabulary), of the next token.
    cache: the model's, of prefix + length keys.
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
  """The most probable continuations: greedy for a width of 1, else the best of a beam.

  Beams are compared by their mean log-probability per token once all have ended.

  Args:
    model: for the shapes of its cache.
    apply: `model.apply`, or what `jaxlora.wrap` made of it.
    params: parameters, or an adapted tree.
    prefix: tokens (batch, time), padded on the left.
    valid: (batch, time), which of them are text.
    length: how many tokens to write at most.
    width: how many sequences of each input are kept.

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
    scores=jnp.where(first, 0.0, -jnp.inf),  # all beams of an input are equal yet: one goes on
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
  """Writes the next token of every row: the best `width` continuations of each input stay.

  The first `start` keys of an input's rows are those of its prefix, and equal: only what came later moves.
  """
  vocabulary = search.log_probs.shape[-1]
  idle = jnp.where(jnp.arange(vocabulary) == PAD, 0.0, -jnp.inf)  # a finished sequence goes on unchanged
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
