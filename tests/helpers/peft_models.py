"""Linen twins of torch models, and their weights: the same function twice, for the tests of the interchange."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

HEADS, KV_HEADS, WIDTH, VOCABULARY, LAYERS = 4, 2, 16, 29, 2


def attend(query, key, value, mask=None):
  """(batch, time, heads, width of a head) each."""
  scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) / jnp.sqrt(query.shape[-1])
  if mask is not None:
    scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
  return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), value)


def causal(x):
  return jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))[None, None]


# ----------------------------------------------------------------------------------------------------------------------
# Llama: heads in the kernels, (in, heads, width) and (heads, width, out).


class RMSNorm(nn.Module):
  @nn.compact
  def __call__(self, x):
    scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def rotary(x):
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] / 10000.0 ** (jnp.arange(half) / half)
  cos, sin = (f(angles)[None, :, None] for f in (jnp.cos, jnp.sin))
  a, b = x[..., :half], x[..., half:]
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


class LlamaAttention(nn.Module):
  bias: bool = False

  @nn.compact
  def __call__(self, x):
    def heads(count, name):
      return nn.DenseGeneral((count, WIDTH // HEADS), use_bias=self.bias, name=name)(x)

    query, key, value = heads(HEADS, "q_proj"), heads(KV_HEADS, "k_proj"), heads(KV_HEADS, "v_proj")
    key, value = (jnp.repeat(y, HEADS // KV_HEADS, axis=2) for y in (rotary(key), value))
    y = attend(rotary(query), key, value, causal(x))
    return nn.DenseGeneral(WIDTH, axis=(-2, -1), use_bias=self.bias, name="o_proj")(y)


class LlamaMLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    gate, up = (nn.Dense(24, use_bias=False, name=name)(x) for name in ("gate_proj", "up_proj"))
    return nn.Dense(WIDTH, use_bias=False, name="down_proj")(nn.silu(gate) * up)


class LlamaLayer(nn.Module):
  bias: bool = False

  @nn.compact
  def __call__(self, x, _=None):
    x = x + LlamaAttention(self.bias, name="self_attn")(RMSNorm(name="input_layernorm")(x))
    return x + LlamaMLP(name="mlp")(RMSNorm(name="post_attention_layernorm")(x)), None


class Llama(nn.Module):
  bias: bool = False
  scanned: bool = False

  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(VOCABULARY, WIDTH, name="embed_tokens")(ids)
    if self.scanned:
      stack = nn.scan(LlamaLayer, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
      x, _ = stack(self.bias, name="layers")(x, None)
    else:
      for k in range(LAYERS):
        x, _ = LlamaLayer(self.bias, name=f"layers_{k}")(x)
    return nn.Dense(VOCABULARY, use_bias=False, name="lm_head")(RMSNorm(name="norm")(x))


# ----------------------------------------------------------------------------------------------------------------------
# GPT-2: one kernel for query, key and value; the head is the embedding.


class GPT2Attention(nn.Module):
  @nn.compact
  def __call__(self, x):
    y = nn.Dense(3 * WIDTH, name="c_attn")(x)
    query, key, value = (z.reshape(*x.shape[:2], HEADS, -1) for z in jnp.split(y, 3, -1))
    return nn.Dense(WIDTH, name="c_proj")(attend(query, key, value, causal(x)).reshape(x.shape))


class GPT2MLP(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(WIDTH, name="c_proj")(nn.gelu(nn.Dense(4 * WIDTH, name="c_fc")(x)))


class GPT2Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = x + GPT2Attention(name="attn")(nn.LayerNorm(epsilon=1e-5, name="ln_1")(x))
    return x + GPT2MLP(name="mlp")(nn.LayerNorm(epsilon=1e-5, name="ln_2")(x))


class GPT2(nn.Module):
  @nn.compact
  def __call__(self, ids):
    embed = nn.Embed(VOCABULARY, WIDTH, name="wte")
    x = embed(ids) + nn.Embed(32, WIDTH, name="wpe")(jnp.arange(ids.shape[1])[None])
    for k in range(LAYERS):
      x = GPT2Layer(name=f"h_{k}")(x)
    return embed.attend(nn.LayerNorm(epsilon=1e-5, name="ln_f")(x))


# ----------------------------------------------------------------------------------------------------------------------
# BERT with a classifier, and a small net of convolutions.


class BertLayer(nn.Module):
  @nn.compact
  def __call__(self, x):
    def heads(name):
      return nn.Dense(WIDTH, name=f"attention.self.{name}")(x).reshape(*x.shape[:2], HEADS, -1)

    y = attend(heads("query"), heads("key"), heads("value")).reshape(x.shape)
    y = nn.Dense(WIDTH, name="attention.output.dense")(y)
    x = nn.LayerNorm(epsilon=1e-12, name="attention.output.LayerNorm")(x + y)
    y = nn.gelu(nn.Dense(24, name="intermediate.dense")(x), approximate=False)
    return nn.LayerNorm(epsilon=1e-12, name="output.LayerNorm")(x + nn.Dense(WIDTH, name="output.dense")(y))


class Bert(nn.Module):
  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(VOCABULARY, WIDTH, name="bert.embeddings.word_embeddings")(ids)
    x = x + nn.Embed(32, WIDTH, name="bert.embeddings.position_embeddings")(jnp.arange(ids.shape[1])[None])
    x = x + nn.Embed(2, WIDTH, name="bert.embeddings.token_type_embeddings")(jnp.zeros_like(ids))
    x = nn.LayerNorm(epsilon=1e-12, name="bert.embeddings.LayerNorm")(x)
    for k in range(LAYERS):
      x = BertLayer(name=f"bert.encoder.layer.{k}")(x)
    pooled = jnp.tanh(nn.Dense(WIDTH, name="bert.pooler.dense")(x[:, 0]))
    return nn.Dense(3, name="classifier")(pooled)


class ConvNet(nn.Module):
  """Convolutions over one, two and three axes, and dense layers."""

  @nn.compact
  def __call__(self, x):  # (batch, 4, 4, 4, channels)
    x = nn.relu(nn.Conv(6, (3, 3, 3), padding=1, name="cube")(x))
    x = nn.relu(nn.Conv(8, (3, 2), strides=(1, 2), padding=0, name="plane")(x.reshape(*x.shape[:2], 16, 6)))
    x = nn.relu(nn.Conv(5, (3,), padding=1, name="conv_line")(x.reshape(x.shape[0], -1, 8)))
    return nn.Dense(7, name="head")(nn.relu(nn.Dense(9, name="pre_head")(x.mean(1))))


def from_torch(shapes, state, module_of):
  """The weights of a torch model in the tree of its twin: written for these models, with nothing of jaxlora.

  `module_of` turns a path, such as `layers_0/self_attn/q_proj`, into the name of torch's module, with `{}` for the
  index of a scanned layer.
  """

  def leaf(path, shape):
    *modules, kind = (str(key.key) for key in path)
    name = f"{module_of('/'.join(modules))}.{'bias' if kind == 'bias' else 'weight'}"
    layers = [one(state[name.format(k)], kind, shape[1:]) for k in range(shape[0])] if "{}" in name else None
    return jnp.asarray(np.stack(layers) if layers else one(state[name], kind, shape))

  def one(tensor, kind, shape):
    array = tensor.detach().numpy()
    if kind == "kernel" and array.ndim > 2:  # (out, in, *kernel)
      array = np.moveaxis(array, (0, 1), (-1, -2))
    elif kind == "kernel" and tensor.linear:  # (out, in)
      array = array.T
    return array.reshape(shape)

  return jax.tree_util.tree_map_with_path(lambda path, x: leaf(path, x.shape), shapes)
