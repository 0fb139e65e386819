"""Decoders of published large sizes as shapes: grouped queries, a gated MLP, or experts in every second block."""

from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from models_llama import rotated

CAPACITY = 1.25  # places at all experts together, over tokens


class Shape(NamedTuple):
  """What a decoder is made of.

  Attributes:
    layers: blocks; with experts, every second one has them.
    keys: heads of keys and values, each shared by `heads / keys` of the queries.
    hidden: width of the MLP.
    experts, expert_hidden: of a sparse block, beside one MLP of `expert_hidden` for all tokens; 0 for none.
  """

  layers: int
  width: int
  heads: int
  keys: int
  hidden: int
  vocabulary: int
  experts: int = 0
  expert_hidden: int = 0

  @property
  def steps(self) -> int:
    """How often the scanned body runs."""
    return self.layers // 2 if self.experts else self.layers


class Lies(NamedTuple):
  """How activations lie, and how weights do where they are multiplied.

  Of a weight that is to be whole there its codes are gathered, where the compiler by itself would gather its floats.

  Attributes:
    tokens: (batch, time, width).
    weights: of the blocks' kernels (in, out).
    experts: (experts, batch, places, width).
    expert_weights: (experts, in, out).
  """

  tokens: NamedSharding
  weights: NamedSharding
  experts: NamedSharding | None = None
  expert_weights: NamedSharding | None = None


def _constrained(x: jax.Array, sharding: NamedSharding | None) -> jax.Array:
  return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)


def _dense(size: int, name: str, lies: Lies | None = None) -> nn.Dense:
  met = lambda x, kernel, *args, **options: jax.lax.dot_general(
    x, _constrained(kernel, lies and lies.weights), *args, **options
  )
  return nn.Dense(size, use_bias=False, name=name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, dot_general=met)


def _norm(name: str) -> nn.RMSNorm:
  return nn.RMSNorm(name=name, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)


class Attention(nn.Module):
  """Causal attention whose queries share keys and values in groups."""

  shape: Shape
  lies: Lies | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    shape, head = self.shape, self.shape.width // self.shape.heads
    query, key, value = (
      _dense(count * head, name, self.lies)(x).reshape(*x.shape[:-1], count, head)
      for name, count in (("query", shape.heads), ("key", shape.keys), ("value", shape.keys))
    )
    y = jax.nn.dot_product_attention(rotated(query), rotated(key), value, is_causal=True)
    return _dense(shape.width, "out", self.lies)(y.reshape(x.shape))


class Mlp(nn.Module):
  """A gated MLP."""

  hidden: int
  lies: Lies | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    y = nn.silu(_dense(self.hidden, "gate", self.lies)(x)) * _dense(self.hidden, "up", self.lies)(x)
    return _dense(x.shape[-1], "down", self.lies)(y)


class Experts(nn.Module):
  """Each token at one expert, as far as there are places: dispatched and collected by products with one-hot masks."""

  shape: Shape
  lies: Lies | None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    count, hidden, width = self.shape.experts, self.shape.expert_hidden, x.shape[-1]
    places = max(1, int(CAPACITY * x.shape[1] / count))
    scores = jax.nn.sigmoid(_dense(count, "router")(x).astype(jnp.float32))
    chosen = jax.nn.one_hot(jnp.argmax(scores, -1), count)
    place = (jnp.cumsum(chosen, 1) - 1) * chosen
    mask = chosen[..., None] * jax.nn.one_hot(jnp.sum(place, -1).astype(jnp.int32), places)[..., None, :]
    mask = mask.astype(x.dtype)  # (batch, time, experts, places)
    kernel = lambda name, *size: _constrained(
      self.param(name, nn.initializers.lecun_normal(), (count, *size), jnp.bfloat16),
      self.lies and self.lies.expert_weights,
    )
    sent = _constrained(jnp.einsum("btec,btd->ebcd", mask, x), self.lies and self.lies.experts)
    gate, up = (jnp.einsum("ebcd,edf->ebcf", sent, kernel(name, width, hidden)) for name in ("gate", "up"))
    back = jnp.einsum("ebcf,efd->ebcd", nn.silu(gate) * up, kernel("down", hidden, width))
    back = _constrained(back, self.lies and self.lies.experts)
    weighted = mask * jnp.max(scores, -1)[..., None, None].astype(x.dtype)
    return jnp.einsum("btec,ebcd->btd", weighted, back)


class Block(nn.Module):
  """One block."""

  shape: Shape
  lies: Lies | None
  sparse: bool = False

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    x = x + Attention(self.shape, self.lies, name="attention")(_norm("norm_attention")(x))
    y = _norm("norm_mlp")(x)
    if not self.sparse:
      return _constrained(x + Mlp(self.shape.hidden, self.lies, name="mlp")(y), self.lies and self.lies.tokens)
    shared = Mlp(self.shape.expert_hidden, self.lies, name="shared")(y)
    return _constrained(x + shared + Experts(self.shape, self.lies, name="experts")(y), self.lies and self.lies.tokens)


class Body(nn.Module):
  """What is scanned: a block, or a dense and a sparse one."""

  shape: Shape
  lies: Lies | None

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    x = Block(self.shape, self.lies, name="dense")(x)
    if self.shape.experts:
      x = Block(self.shape, self.lies, sparse=True, name="sparse")(x)
    return x, None


class Decoder(nn.Module):
  """The decoder: bfloat16, its body scanned over stacked parameters and recomputed in the backward pass."""

  shape: Shape
  lies: Lies | None = None

  @nn.compact
  def __call__(self, tokens: jax.Array) -> jax.Array:
    """Logits (batch, time, vocabulary) of tokens (batch, time)."""
    shape, own = self.shape, {"dtype": jnp.bfloat16, "param_dtype": jnp.bfloat16}
    x = nn.Embed(shape.vocabulary, shape.width, name="embed", **own)(tokens)
    scanned: Any = nn.scan(
      nn.remat(Body, prevent_cse=False), variable_axes={"params": 0}, split_rngs={"params": True}, length=shape.steps
    )
    x, _ = scanned(shape, self.lies, name="blocks")(_constrained(x, self.lies and self.lies.tokens), None)
    return _dense(shape.vocabulary, "head")(_norm("norm")(x))
