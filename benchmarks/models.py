"""The language model of the benchmarks: a causal decoder in plain Linen, which knows nothing of LoRA."""

import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

Params = dict[str, Any]

HEAD_WIDTH = 64
# The kernels that every contestant adapts, and how many of their axes (after a scanned one) are input axes. Embeddings
# and the head are not adapted.
INPUT_AXES = {"query": 1, "key": 1, "value": 1, "out": 2, "mlp_in": 1, "mlp_gate": 1, "mlp_out": 1}
TARGETS = rf"(.*/)?({'|'.join(INPUT_AXES)})/kernel"


def dtypes(model: Any) -> dict[str, Any]:
  """The dtypes of a layer: that of the computation, and that of its parameters."""
  return {"dtype": model.dtype, "param_dtype": model.param_dtype or model.dtype}


class Block(nn.Module):
  """One pre-norm transformer block."""

  dtype: Any = jnp.float32
  decode: bool = False
  param_dtype: Any = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    width, types = x.shape[-1], dtypes(self)
    attention = nn.MultiHeadDotProductAttention(
      max(1, width // HEAD_WIDTH), decode=self.decode, name="attention", **types
    )
    # with a cache, flax masks later positions itself
    mask = None if self.decode else nn.make_causal_mask(jnp.ones((1, x.shape[1])))
    x = x + attention(nn.LayerNorm(name="norm_attention", **types)(x), mask=mask)
    hidden = nn.Dense(4 * width, name="mlp_in", **types)(nn.LayerNorm(name="norm_mlp", **types)(x))
    return x + nn.Dense(width, name="mlp_out", **types)(nn.gelu(hidden))


class LanguageModel(nn.Module):
  """A causal decoder with learned positions and a head of its own.

  Attributes:
    width: d; heads are 64 wide, the MLP is 4 d wide.
    positions: the longest sequence, and the length of the cache.
    dtype: of the computation.
    scan: whether one block is scanned over stacked parameters.
    remat: whether each block is recomputed in the backward pass.
    decode: whether attention keeps a cache of keys and values, in the collection "cache".
    param_dtype: of the parameters; None takes `dtype`.
  """

  vocabulary: int = 4096
  width: int = 512
  layers: int = 6
  positions: int = 128
  dtype: Any = jnp.float32
  scan: bool = False
  remat: bool = False
  decode: bool = False
  param_dtype: Any = None

  @nn.compact
  def __call__(self, tokens: jax.Array, eps: jax.Array | None = None, start: jax.Array | int = 0) -> jax.Array:
    """Logits (batch, time, vocabulary).

    Args:
      tokens: (batch, time).
      eps: (batch, time, width), added to the embedded tokens; the gradient with respect to it is the input gradient.
      start: the position of the first token.
    """
    types = dtypes(self)
    shape = (self.positions, self.width)
    position = self.param("position", nn.initializers.normal(0.02), shape, types["param_dtype"]).astype(self.dtype)
    x = nn.Embed(self.vocabulary, self.width, name="embed", **types)(tokens)
    x = x + jax.lax.dynamic_slice_in_dim(position, start, tokens.shape[1])[None]
    if eps is not None:
      x = x + eps
    x = self._blocks(x)
    return nn.Dense(self.vocabulary, use_bias=False, name="head", **types)(nn.LayerNorm(name="norm", **types)(x))

  def _blocks(self, x: jax.Array) -> jax.Array:
    # the body of a scan is compiled separately, and needs no barrier against common subexpressions
    block = nn.remat(Block, prevent_cse=not self.scan) if self.remat else Block
    if not self.scan:
      for k in range(self.layers):
        x = block(self.dtype, self.decode, self.param_dtype, name=f"block_{k}")(x)
      return x
    scanned = nn.scan(
      lambda block, x, _: (block(x), None),
      variable_axes={"params": 0, "cache": 0},
      split_rngs={"params": True},
      length=self.layers,
    )
    return scanned(block(self.dtype, self.decode, self.param_dtype, name="blocks"), x, None)[0]


@functools.partial(jax.jit, static_argnums=0)
def init(model: nn.Module, seed: int = 0) -> Params:
  """Fresh parameters, in place of pretrained ones: no cost here depends on their values."""
  model = model.clone(decode=False) if getattr(model, "decode", False) else model
  return model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"]


def empty_cache(model: LanguageModel, batch: int) -> Any:
  """The cache of a decoding model ahead of the first token."""
  tokens = jnp.zeros((batch, model.positions), jnp.int32)
  shapes = jax.eval_shape(model.init, jax.random.key(0), tokens)["cache"]
  return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def adapted_kernels(params: Params) -> dict[tuple[str, ...], jax.Array]:
  """The adapted kernels, by path."""
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  named = {tuple(key.key for key in path): leaf for path, leaf in leaves}
  return {path: leaf for path, leaf in named.items() if path[-1] == "kernel" and path[-2] in INPUT_AXES}


def matrix_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[tuple[int, ...], int, int]:
  """A kernel as a matrix: its stacked axes, its input size and its output size."""
  stack = 1 if path[0] == "blocks" else 0
  split = stack + INPUT_AXES[path[-2]]
  sizes = [1, 1]
  for axis, size in enumerate(shape):
    if axis >= stack:
      sizes[axis >= split] *= size
  return shape[:stack], sizes[0], sizes[1]
