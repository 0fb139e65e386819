"""A small decoder-only language model in plain Linen, with a cache of keys and values. It knows nothing of LoRA."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]
Cache = list[tuple[jax.Array, jax.Array]]

END, PAD = 0, 1  # the token between and after texts; the token that fills rows up


class Attention(nn.Module):
  """Attention of these tokens to all keys so far; a cache holds the keys and values of earlier calls."""

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
  """A causal decoder with learned positions and a tied embedding.

  The MLP is three times as wide as the model: adapters of rank r then have as many parameters on the four attention
  kernels as on the MLP's two, and placements are compared at equal parameters.
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
    """Logits (batch, time, vocabulary), and the cache extended by these tokens.

    Args:
      tokens: (batch, time).
      valid: (batch, keys), False for padding, which comes first and takes no position.
      cache: for each block the keys and values so far, (batch, keys, heads, width / heads).
      start: how many keys the cache holds.
      last: return logits of this many tokens at the end; None: of all.
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
    """Its sizes, as part of a result and of the cache's key."""
    return {name: getattr(self, name) for name in ("vocabulary", "width", "depth", "heads", "positions")}


@functools.partial(jax.jit, static_argnums=0)
def init(model: Decoder, seed: int) -> Params:
  """Fresh parameters."""
  return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool))["params"]


def empty_cache(model: Decoder, batch: int, keys: int) -> Cache:
  """The cache ahead of the first token, for `keys` tokens."""
  zeros = jnp.zeros((batch, keys, model.heads, model.width // model.heads))
  return [(zeros, zeros)] * model.depth
