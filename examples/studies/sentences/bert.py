"""BERT as a sentence encoder in plain Linen.

The layout is that of the published parameters, apart from names and the transposition of torch's kernels:

    x_0     = LN(word[id] + position[k] + type[0])
    y_l     = LN(x_l + MHA(x_l)),     x_l+1 = LN(y_l + W_2 gelu(W_1 y_l))
    pooled  = sum_k mask_k x_L,k / sum_k mask_k,     embedding = pooled / |pooled|

Sources: Devlin et al., "BERT", arXiv:1810.04805; the pooling: Reimers and Gurevych, "Sentence-BERT", arXiv:1908.10084.
"""

from collections.abc import Callable
import functools
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_new": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "relu": nn.relu,
}


class Config(NamedTuple):
  """Sizes of a BERT, named as in its config.json."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  type_vocab_size: int
  layer_norm_eps: float
  hidden_act: str


class Attention(nn.Module):
  """Self-attention, with padding masked out."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    project = lambda name: nn.Dense(x.shape[-1], name=name)
    query, key, value = (project(name)(x).reshape(*x.shape[:-1], self.heads, -1) for name in ("query", "key", "value"))
    attended = nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    return project("out")(attended.reshape(x.shape))


class Layer(nn.Module):
  """One post-norm transformer layer."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    config = self.config
    norm = lambda name: nn.LayerNorm(config.layer_norm_eps, name=name)
    x = norm("norm_attention")(x + Attention(config.num_attention_heads, name="attention")(x, mask))
    hidden = ACTIVATIONS[config.hidden_act](nn.Dense(config.intermediate_size, name="mlp_in")(x))
    return norm("norm_mlp")(x + nn.Dense(x.shape[-1], name="mlp_out")(hidden))


class Bert(nn.Module):
  """BERT without its pooler: `ids` and `mask` of shape (batch, time) give states (batch, time, hidden_size)."""

  config: Config

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    config = self.config
    table = lambda name, size: nn.Embed(size, config.hidden_size, name=name)
    x = table("word_embed", config.vocab_size)(ids)
    x += table("position_embed", config.max_position_embeddings)(jnp.arange(ids.shape[1]))[None]
    x += table("type_embed", config.type_vocab_size)(jnp.zeros_like(ids))
    x = nn.LayerNorm(config.layer_norm_eps, name="norm_embed")(x)
    for k in range(config.num_hidden_layers):
      x = Layer(config, name=f"layer_{k}")(x, mask > 0)
    return x


def pool(states: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean over tokens other than padding: (batch, time, d) and (batch, time) give (batch, d)."""
  weights = mask.astype(states.dtype)[..., None]
  return (states * weights).sum(1) / weights.sum(1)


def normalize(x: jax.Array) -> jax.Array:
  """Scales vectors to length 1: their dot products are cosines."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)
