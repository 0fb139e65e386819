"""A Llama-family decoder: RMSNorm, grouped queries, rotary positions, SwiGLU, and a head tied to the embedding.

The layers are one `Block` whose parameters are stacked, and `jax.lax.scan` runs over them: 30 layers are traced and
compiled as one. Modules are named as in the original's checkpoints, so that adapters interchange by name.
"""

import dataclasses
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Config:
  """Sizes of a model.

  Attributes:
    vocabulary: tokens.
    width: of the hidden states.
    layers: blocks.
    heads, kv_heads: of queries, and of the keys and values that they share in groups.
    head_width: of one head.
    mlp: width of the feed-forward layer.
    rope_base: of the rotary positions' wavelengths.
    epsilon: of the norms.
    context: the most tokens that the model was trained on at once.
    dtype: of the computation; parameters keep their own.
  """

  vocabulary: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_width: int
  mlp: int
  rope_base: float = 10_000.0
  epsilon: float = 1e-5
  context: int = 8192
  dtype: Any = jnp.float32


class Cache(NamedTuple):
  """Keys and values of every layer so far: (layers, batch, kv_heads, tokens, head_width)."""

  keys: jax.Array
  values: jax.Array


def empty_cache(config: Config, batch: int, tokens: int) -> Cache:
  """A cache with room for so many tokens."""
  zeros = jnp.zeros((config.layers, batch, config.kv_heads, tokens, config.head_width), config.dtype)
  return Cache(zeros, zeros)


def rotate(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
  """Rotary positions of x (batch, tokens, heads, width): pairs are a half apart, as in the original's checkpoints."""
  half = x.shape[-1] // 2
  angles = positions[..., None].astype(jnp.float32) / base ** (jnp.arange(half, dtype=jnp.float32) / half)
  cos, sin = jnp.cos(angles)[:, :, None].astype(x.dtype), jnp.sin(angles)[:, :, None].astype(x.dtype)
  first, second = x[..., :half], x[..., half:]
  return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def linear(size_in: int, size_out: int, config: Config, rngs: nnx.Rngs) -> nnx.Linear:
  """A layer without a bias: no layer of this family has one."""
  return nnx.Linear(size_in, size_out, use_bias=False, dtype=config.dtype, rngs=rngs)


class Attention(nnx.Module):
  """Causal attention in which groups of query heads share one head of keys and values."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    width = config.head_width
    self.config = config
    self.q_proj = linear(config.width, config.heads * width, config, rngs)
    self.k_proj = linear(config.width, config.kv_heads * width, config, rngs)
    self.v_proj = linear(config.width, config.kv_heads * width, config, rngs)
    self.o_proj = linear(config.heads * width, config.width, config, rngs)

  def __call__(
    self, x: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None, layer: jax.Array, at: jax.Array
  ) -> tuple[jax.Array, Cache | None]:
    """From x (batch, tokens, width) to the same; mask (batch, tokens, keys); `cache` is written from `at` on."""
    batch, tokens, _ = x.shape
    heads = lambda y: y.reshape(batch, tokens, -1, self.config.head_width)
    queries = rotate(heads(self.q_proj(x)), positions, self.config.rope_base)
    keys = rotate(heads(self.k_proj(x)), positions, self.config.rope_base).swapaxes(1, 2)
    values = heads(self.v_proj(x)).swapaxes(1, 2)
    if cache is not None:
      put = lambda whole, new: jax.lax.dynamic_update_slice(whole, new[None], (layer, 0, 0, at, 0))
      cache = Cache(put(cache.keys, keys), put(cache.values, values))
      keys, values = cache.keys[layer], cache.values[layer]
    grouped = queries.reshape(batch, tokens, self.config.kv_heads, -1, self.config.head_width)
    scores = jnp.einsum("btkgd,bksd->bkgts", grouped, keys) / self.config.head_width**0.5
    scores = jnp.where(mask[:, None, None], scores.astype(jnp.float32), -1e30)
    weights = jax.nn.softmax(scores).astype(x.dtype)
    return self.o_proj(jnp.einsum("bkgts,bksd->btkgd", weights, values).reshape(batch, tokens, -1)), cache


class FeedForward(nnx.Module):
  """SwiGLU: down(silu(gate(x)) * up(x))."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    self.gate_proj = linear(config.width, config.mlp, config, rngs)
    self.up_proj = linear(config.width, config.mlp, config, rngs)
    self.down_proj = linear(config.mlp, config.width, config, rngs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """From x (batch, tokens, width) to the same."""
    return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


def norm(config: Config, rngs: nnx.Rngs) -> nnx.RMSNorm:
  """A norm: x / rms(x) * scale."""
  return nnx.RMSNorm(config.width, epsilon=config.epsilon, dtype=config.dtype, rngs=rngs)


class Block(nnx.Module):
  """One layer: attention, then feed-forward, each around a residual and behind a norm."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    self.input_layernorm = norm(config, rngs)
    self.self_attn = Attention(config, rngs)
    self.post_attention_layernorm = norm(config, rngs)
    self.mlp = FeedForward(config, rngs)

  def __call__(self, x: jax.Array, *where: Any) -> tuple[jax.Array, Cache | None]:
    """From x (batch, tokens, width) to the same, and the cache; `where` is as for `Attention`."""
    attended, cache = self.self_attn(self.input_layernorm(x), *where)
    x = x + attended
    return x + self.mlp(self.post_attention_layernorm(x)), cache


class Llama(nnx.Module):
  """The decoder."""

  def __init__(self, config: Config, rngs: nnx.Rngs):
    self.config = config
    self.embed_tokens = nnx.Embed(config.vocabulary, config.width, dtype=config.dtype, rngs=rngs)
    self.layers = nnx.vmap(lambda rngs: Block(config, rngs))(rngs.split(config.layers))
    self.norm = norm(config, rngs)

  def __call__(
    self,
    tokens: jax.Array,
    valid: jax.Array,
    last: int | None = None,
    cache: Cache | None = None,
    at: jax.Array | int = 0,
  ) -> tuple[jax.Array, Cache | None]:
    """Logits of the next token.

    Args:
      tokens: (batch, tokens); padding may be anywhere that `valid` says.
      valid: (batch, keys), bool: which positions are no padding. Without a cache, of `tokens` themselves; with one, of
        all the positions that it has room for.
      last: only this many last positions get logits; `None` for all.
      cache: keys and values of the positions ahead of `at`.
      at: the position of the first of `tokens` in the cache.

    Returns:
      (batch, last, vocabulary), and the cache with these tokens in it.
    """
    count = tokens.shape[1]
    of_keys = jnp.maximum(jnp.cumsum(valid, 1) - 1, 0)
    positions = jax.lax.dynamic_slice_in_dim(of_keys, at, count, 1)
    causal = jnp.arange(valid.shape[1])[None] <= at + jnp.arange(count)[:, None]
    x, cache = self._layers(tokens, positions, valid[:, None] & causal[None], cache, at)
    return self.embed_tokens.attend(self.norm(x[:, -last:] if last else x)).astype(jnp.float32), cache

  def packed(self, tokens: jax.Array, segments: jax.Array) -> jax.Array:
    """What the head reads, of rows that hold several documents.

    Args:
      tokens: (batch, tokens).
      segments: the same: the number of the document that a token is of, one after the other from 1 on; 0 is padding.
        Documents do not see each other, and positions begin anew with each.

    Returns:
      (batch, tokens, width).
    """
    place = jnp.arange(tokens.shape[1])[None]
    begins = jnp.pad(segments[:, 1:] != segments[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    positions = place - jax.lax.cummax(jnp.where(begins, place, 0), 1)
    same = segments[:, :, None] == segments[:, None]
    mask = same & (place[:, None] <= place[:, :, None])
    return self.norm(self._layers(tokens, positions, mask, None, 0)[0])

  def _layers(
    self, tokens: jax.Array, positions: jax.Array, mask: jax.Array, cache: Cache | None, at: jax.Array | int
  ) -> tuple[jax.Array, Cache | None]:
    def layer(carry: tuple[jax.Array, Cache | None], numbered: tuple[jax.Array, Block]) -> tuple[Any, None]:
      x, cache = carry
      number, block = numbered
      return block(x, positions, mask, cache, number, at), None

    carry = (self.embed_tokens(tokens), cache)
    return jax.lax.scan(layer, carry, (jnp.arange(self.config.layers), self.layers))[0]
