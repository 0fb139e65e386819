"""A decoder as MaxText builds them, in miniature and with its names: layers of NNX that Linen scans and rematerialises.

Each layer is a module of NNX, bridged to Linen; the stack is a `nn.scan` along axis 1 of every kernel, with logical
axis names on each leaf; the head is the embedding's transpose or a layer of its own.
"""

from flax import linen as nn
from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]
VOCABULARY, EMBED, MLP, HEADS, SIZE, LAYERS = 24, 16, 32, 2, 8, 3
TOKENS = np.arange(8, dtype=np.int32).reshape(2, 4)
STACKED = {
  "decoder/layers/self_attention/query/kernel": "isoo",
  "decoder/layers/self_attention/key/kernel": "isoo",
  "decoder/layers/self_attention/value/kernel": "isoo",
  "decoder/layers/self_attention/out/kernel": "isio",
  "decoder/layers/mlp/wi_0/kernel": "iso",
  "decoder/layers/mlp/wi_1/kernel": "iso",
  "decoder/layers/mlp/wo/kernel": "iso",
}


class DenseGeneral(nnx.Module):
  def __init__(self, inputs, outputs, names, rngs):
    self.axes = len(inputs)
    self.kernel = nnx.Param(0.2 * jax.random.normal(rngs.params(), (*inputs, *outputs)), names=names)

  def __call__(self, x):
    contracted = tuple(range(x.ndim - self.axes, x.ndim)), tuple(range(self.axes))
    return lax.dot_general(x, self.kernel[...], (contracted, ((), ())))


class Attention(nnx.Module):
  def __init__(self, rngs):
    into, out = ("embed", "heads", "kv"), ("heads", "kv", "embed")
    self.query, self.key, self.value = (DenseGeneral((EMBED,), (HEADS, SIZE), into, rngs) for _ in range(3))
    self.out = DenseGeneral((HEADS, SIZE), (EMBED,), out, rngs)

  def __call__(self, x):
    scores = jnp.einsum("btnh,bsnh->bnts", self.query(x), self.key(x))
    mask = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    return self.out(jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(mask, scores, -1e9)), self.value(x)))


class MlpBlock(nnx.Module):
  def __init__(self, rngs):
    self.wi_0, self.wi_1 = (DenseGeneral((EMBED,), (MLP,), ("embed", "mlp"), rngs) for _ in range(2))
    self.wo = DenseGeneral((MLP,), (EMBED,), ("mlp", "embed"), rngs)

  def __call__(self, x):
    return self.wo(jax.nn.silu(self.wi_0(x)) * self.wi_1(x))


class DecoderLayer(nnx.Module):
  def __init__(self, rngs):
    self.self_attention, self.mlp = Attention(rngs), MlpBlock(rngs)

  def __call__(self, x):
    x = x + self.self_attention(x)
    return x + self.mlp(x), None


def named(variable):
  """MaxText's boxes: a Variable's value with the logical names of its axes."""
  return nn.LogicallyPartitioned(variable.get_value(), variable.get_metadata()["names"])


class Decoder(nn.Module):
  scanned: bool

  @nn.compact
  def __call__(self, x):
    layer = nn.remat(nnx.bridge.ToLinen, prevent_cse=not self.scanned)
    if not self.scanned:
      for k in range(LAYERS):
        x, _ = layer(DecoderLayer, metadata_fn=named, name=f"layers_{k}")(x)
      return x
    stack = nn.scan(
      layer,
      variable_axes={"params": 1},
      split_rngs={"params": True},
      length=LAYERS,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return stack(DecoderLayer, metadata_fn=named, name="layers")(x)[0]


class Transformer(nn.Module):
  scanned: bool = True

  @nn.compact
  def __call__(self, tokens):
    init = nn.with_logical_partitioning(nn.initializers.normal(1.0), ("vocab", "embed"))
    table = self.param("embedding", init, (VOCABULARY, EMBED))
    return jnp.dot(Decoder(self.scanned, name="decoder")(jnp.take(table, tokens, axis=0)), table.T)


def adapted(scanned, config):
  model = Transformer(scanned)
  variables = model.init(jax.random.key(0), TOKENS)
  fn = lambda variables, tokens: model.apply(variables, tokens)
  tree = jaxlora.adapt(variables, config, jax.random.key(1), probe=lambda v: fn(v, TOKENS))
  return fn, helpers.trained(tree, 0, width=0.05)


def same_as_merged(fn, tree):
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  helpers.assert_close(jax.jit(wrapped)(tree, TOKENS), jax.jit(fn)(jaxlora.merge(tree), TOKENS), 1e-5)
  loss = lambda logits: jnp.square(logits).mean()
  grads = jax.jit(jaxlora.grad(lambda tree: loss(wrapped(tree, TOKENS))))(tree)
  helpers.assert_close(grads, jax.jit(jaxlora.grad(lambda tree: loss(fn(jaxlora.merge(tree), TOKENS))))(tree), 1e-4)


def test_a_scanned_stack_of_bridged_layers_is_adapted_layer_by_layer():
  fn, tree = adapted(True, jaxlora.LoraConfig(rank=2, targets=".*(kernel|embedding)"))
  roles = {leaf.path.removeprefix("params/"): leaf.roles for leaf in jaxlora.summary(tree).leaves}
  assert roles == STACKED | {"embedding": "io"}
  same_as_merged(fn, tree)
  query = tree["params"]["decoder"]["layers"]["self_attention"]["query"]["kernel"]
  assert isinstance(query, nn.LogicallyPartitioned)
  assert query.names == ("embed", "layers", "heads", "kv")


@pytest.mark.nightly  # seconds
def test_unrolled_layers_have_the_adapters_of_the_scanned_ones_each():
  fn, tree = adapted(False, jaxlora.LoraConfig(rank=2, targets=".*kernel"))
  roles = {leaf.path.removeprefix("params/"): leaf.roles for leaf in jaxlora.summary(tree).leaves}
  each = {path.removeprefix("decoder/layers/"): of.replace("s", "") for path, of in STACKED.items()}
  assert roles == {f"decoder/layers_{k}/{path}": of for k in range(LAYERS) for path, of in each.items()}
  same_as_merged(fn, tree)
