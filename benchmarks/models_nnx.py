"""The language model in flax's NNX, with an `nnx.LoRA` around every adapted linear layer.

`nnx.LoRA` takes layers with one input and one output axis, so queries, keys and values come from a plain `nnx.Linear`
and are reshaped into heads, which is the same product. It has no `alpha`: its scale is 1.
"""

from typing import Any

from flax import linen as nn
from flax import nnx
import jax
import jax.numpy as jnp
from models import HEAD_WIDTH, LanguageModel, Params, dtypes


def adapted(size_in: int, size_out: int, rank: int, rngs: nnx.Rngs, types: dict[str, Any]) -> nnx.LoRA:
  """A linear layer and its adapter."""
  linear = nnx.Linear(size_in, size_out, rngs=rngs, **types)
  return nnx.LoRA(size_in, rank, size_out, base_module=linear, rngs=rngs, **types)


class Attention(nnx.Module):
  """Causal self-attention, by the same attention function as in the Linen model."""

  def __init__(self, width: int, rank: int, rngs: nnx.Rngs, types: dict[str, Any]):
    self.heads = max(1, width // HEAD_WIDTH)
    self.query, self.key, self.value, self.out = (adapted(width, width, rank, rngs, types) for _ in range(4))

  def __call__(self, x: jax.Array) -> jax.Array:
    query, key, value = (
      jnp.reshape(layer(x), (*x.shape[:2], self.heads, -1)) for layer in (self.query, self.key, self.value)
    )
    mask = nn.make_causal_mask(jnp.ones((1, x.shape[1])))
    return self.out(jnp.reshape(nn.dot_product_attention(query, key, value, mask=mask), x.shape))


class Block(nnx.Module):
  """One pre-norm transformer block."""

  def __init__(self, width: int, rank: int, rngs: nnx.Rngs, types: dict[str, Any]):
    self.norm_attention = nnx.LayerNorm(width, rngs=rngs, **types)
    self.attention = Attention(width, rank, rngs, types)
    self.norm_mlp = nnx.LayerNorm(width, rngs=rngs, **types)
    self.mlp_in = adapted(width, 4 * width, rank, rngs, types)
    self.mlp_out = adapted(4 * width, width, rank, rngs, types)

  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + self.attention(self.norm_attention(x))
    return x + self.mlp_out(nn.gelu(self.mlp_in(self.norm_mlp(x))))


class Twin(nnx.Module):
  """The same layers as the Linen model's, with the same names."""

  def __init__(self, model: LanguageModel, rank: int, rngs: nnx.Rngs):
    types = dtypes(model)
    self.embed = nnx.Embed(model.vocabulary, model.width, rngs=rngs, **types)
    self.position = nnx.Param(jnp.zeros((model.positions, model.width), types["param_dtype"]))
    self.dtype, self.layers = model.dtype, model.layers
    for k in range(model.layers):
      setattr(self, f"block_{k}", Block(model.width, rank, rngs, types))
    self.norm = nnx.LayerNorm(model.width, rngs=rngs, **types)
    self.head = nnx.Linear(model.width, model.vocabulary, use_bias=False, rngs=rngs, **types)

  def __call__(self, tokens: jax.Array) -> jax.Array:
    x = self.embed(tokens) + self.position[...].astype(self.dtype)[None, : tokens.shape[1]]
    for k in range(self.layers):
      x = getattr(self, f"block_{k}")(x)
    return self.head(self.norm(x))


def split_twin(model: LanguageModel, params: Params, rank: int) -> tuple[Any, Any, Any]:
  """The twin with the Linen model's parameters, as its graph definition, its factors and all other variables."""
  definition, factors, rest = nnx.split(Twin(model, rank, nnx.Rngs(0)), nnx.LoRAParam, ...)

  def theirs(path: Any, leaf: jax.Array) -> jax.Array:
    value: Any = params
    for key in path:
      name = getattr(key, "key", None)  # the last key is of the variable's value, and has no name
      if name not in (None, "base_module"):
        value = value[name]
    return jnp.reshape(value, leaf.shape)

  return definition, factors, jax.tree_util.tree_map_with_path(theirs, rest)
