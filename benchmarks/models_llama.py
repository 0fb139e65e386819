"""A decoder of Llama's shape in plain Linen: rotary positions, root mean squares as norms, a gated MLP."""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp


def rotated(x: jax.Array, base: float = 10000.0) -> jax.Array:
  """`x` (batch, time, heads, width) with its halves rotated by the position."""
  half = x.shape[-1] // 2
  angles = jnp.arange(x.shape[1])[:, None] * base ** (-jnp.arange(half) / half)
  sine, cosine = (fn(angles)[:, None].astype(x.dtype) for fn in (jnp.sin, jnp.cos))
  first, second = jnp.split(x, 2, -1)
  return jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], -1)


class Attention(nn.Module):
  """Causal attention of all heads; its kernels are matrices, or have an axis of heads as flax's own do."""

  heads: int
  matrices: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    own = {"use_bias": False, "dtype": self.dtype, "param_dtype": self.dtype}
    split = (self.heads, x.shape[-1] // self.heads)
    size = x.shape[-1] if self.matrices else split
    query, key, value = (
      nn.DenseGeneral(size, name=name, **own)(x).reshape(*x.shape[:-1], *split) for name in ("query", "key", "value")
    )
    mask = nn.make_causal_mask(jnp.ones((1, x.shape[1])))
    y = nn.dot_product_attention(rotated(query), rotated(key), value, mask=mask, dtype=self.dtype)
    if self.matrices:
      return nn.Dense(x.shape[-1], name="out", **own)(y.reshape(x.shape))
    return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out", **own)(y)


class Block(nn.Module):
  """One block."""

  heads: int
  hidden: int
  matrices: bool
  dtype: Any

  @nn.compact
  def __call__(self, x: jax.Array, _: None = None) -> tuple[jax.Array, None]:
    types = {"dtype": self.dtype, "param_dtype": self.dtype}
    attention = Attention(self.heads, self.matrices, self.dtype, name="attention")
    x = x + attention(nn.RMSNorm(name="norm_attention", **types)(x))
    y = nn.RMSNorm(name="norm_mlp", **types)(x)
    dense = lambda size, name: nn.Dense(size, use_bias=False, name=name, **types)
    y = nn.silu(dense(self.hidden, "mlp_gate")(y)) * dense(self.hidden, "mlp_in")(y)
    return x + dense(x.shape[-1], "mlp_out")(y), None


class Llama(nn.Module):
  """A causal decoder with a head of its own.

  Attributes:
    width, heads, hidden: of the blocks; the MLP's two products of the input are `hidden` wide.
    matrices: whether attention's kernels are matrices, and have no axis of heads.
    scan: whether one block is scanned over stacked parameters.
    remat: whether each block is recomputed in the backward pass.
  """

  vocabulary: int = 32000
  width: int = 4096
  layers: int = 32
  heads: int = 32
  hidden: int = 11008
  matrices: bool = True
  dtype: Any = jnp.bfloat16
  scan: bool = True
  remat: bool = True

  @nn.compact
  def __call__(self, tokens: jax.Array, eps: jax.Array | None = None) -> jax.Array:
    """Logits (batch, time, vocabulary) of tokens (batch, time); `eps` is added to the embedded tokens."""
    types = {"dtype": self.dtype, "param_dtype": self.dtype}
    x = nn.Embed(self.vocabulary, self.width, name="embed", **types)(tokens)
    if eps is not None:
      x = x + eps
    x = self._blocks(x)
    return nn.Dense(self.vocabulary, use_bias=False, name="head", **types)(nn.RMSNorm(name="norm", **types)(x))

  def _blocks(self, x: jax.Array) -> jax.Array:
    sizes = (self.heads, self.hidden, self.matrices, self.dtype)
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    if not self.scan:
      for k in range(self.layers):
        x, _ = block(*sizes, name=f"block_{k}")(x)
      return x
    stacked = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=self.layers)
    return stacked(*sizes, name="blocks")(x, None)[0]
