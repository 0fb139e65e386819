"""Public model libraries, unmodified and with random weights: everything adapts, nothing is materialised.

Three libraries that know nothing of each other or of us: Hugging Face's Flax models (Linen; GPT-2's kernels are stored
(out, in) and its head is tied), jax-resnet (Linen; convolutions and batch statistics), ott-jax (NNX; a U-Net with
attention).
"""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

KEY = jax.random.key(0)
# Code that is not ours: JAX's default promotion, and its own deprecations are its own.
pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]


def check_model(fn, params, args, config, expected_leaves):
  """Adapts, and compares values and factor gradients with the merged model; returns the adapted paths."""
  tree = jaxlora.adapt(params, config, KEY, probe=lambda p: fn(p, *args))
  forward, plain = jax.jit(jaxlora.wrap(fn, on_materialize="error")), jax.jit(fn)
  base = plain(params, *args)
  assert not np.any(np.asarray(forward(tree, *args)) - np.asarray(base))
  tree = helpers.trained(tree, 0, width=0.02)
  merged = plain(jax.jit(jaxlora.merge)(tree), *args)
  assert float(np.abs(np.asarray(merged) - np.asarray(base)).max()) > 1e-3
  helpers.assert_close(forward(tree, *args), merged, 1e-4)
  report = jaxlora.explain(fn, tree, *args)
  assert not report.materialized
  assert not report.unused
  paths = {leaf.path for leaf in jaxlora.summary(tree).leaves}
  assert len(paths) == expected_leaves
  grads = jax.jit(jaxlora.grad(lambda t: (jaxlora.wrap(fn)(t, *args) ** 2).sum()))(tree)
  leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(grads)]
  assert all(np.isfinite(leaf).all() for leaf in leaves)
  assert all(leaf.any() for leaf in leaves)
  return paths


@pytest.fixture(scope="module")
def transformers():
  return pytest.importorskip("transformers", reason="the extra `test` installs transformers<5")


IDS = np.arange(8, dtype=np.int32)[None]


@pytest.mark.parametrize("attention", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_huggingface_bert(transformers, attention):
  """All layers; at night those of attention run by themselves, too: the default run asserts which they are."""
  config = transformers.BertConfig(
    vocab_size=64,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=32,
    max_position_embeddings=32,
  )
  model = transformers.FlaxBertModel(config, seed=0, _do_init=False)
  params = jax.jit(model.init_weights, static_argnums=1)(KEY, (1, 1))
  rest = (IDS, np.ones_like(IDS), np.zeros_like(IDS), IDS, None)
  fn = lambda p, *args: model.module.apply({"params": p}, *args)[0]
  of_attention = jaxlora.LoraConfig(rank=2, targets="attention")
  if attention:
    paths = check_model(fn, params, rest, of_attention, 8)
  else:
    paths = check_model(fn, params, rest, jaxlora.LoraConfig(rank=2, exclude=["pooler"]), 12)
    assert len(jaxlora.summary(jaxlora.adapt(params, of_attention, KEY)).leaves) == 8
  assert "encoder/layer/0/attention/self/query/kernel" in paths


@pytest.mark.nightly
def test_huggingface_gpt2(transformers):
  config = transformers.GPT2Config(
    vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
  )
  model = transformers.FlaxGPT2LMHeadModel(config, seed=0)
  fn = lambda p, ids, mask, places: model.module.apply({"params": p}, ids, mask, places)[0]
  args = (IDS, jnp.ones((1, 8), int), IDS)
  paths = check_model(fn, model.params, args, jaxlora.LoraConfig(rank=2), 8)
  assert "transformer/wte/embedding" not in paths
  tied = jaxlora.LoraConfig(rank=2, targets=["c_attn", "wte"])
  tree = jaxlora.adapt(model.params, tied, KEY, probe=lambda p: fn(p, *args))
  roles = {leaf.path: leaf.roles for leaf in jaxlora.summary(tree).leaves}
  assert roles["transformer/h/0/attn/c_attn/kernel"] == "oi"
  assert roles["transformer/wte/embedding"] == "io"
  check_model(fn, model.params, args, tied, 3)


def test_jax_resnet():
  resnet = pytest.importorskip("jax_resnet.resnet", reason="the extra `test` installs jax-resnet")
  model = resnet.ResNet(block_cls=resnet.ResNetBlock, stage_sizes=[1, 1], n_classes=3, hidden_sizes=(4, 8))
  x = helpers.array(2, (2, 32, 32, 3), jnp.float32)
  variables = jax.jit(model.init)(KEY, x)
  fn = lambda p, stats, x: model.apply({"params": p, "batch_stats": stats}, x, mutable=False)
  args = (variables["batch_stats"], x)
  # The last norm of each block starts at zero, which would hide the convolutions before it.
  moved = lambda leaf: np.asarray(leaf) + helpers.normal(leaf.size, leaf.shape, leaf.dtype, 0.1)
  params = jax.tree.map(moved, variables["params"])
  paths = check_model(fn, params, args, jaxlora.LoraConfig(rank=2), 7)
  assert all("Conv_0/kernel" in path for path in paths)


@pytest.mark.nightly
def test_ott_unet():
  unet = pytest.importorskip("ott.neural.networks.velocity_field.unet", reason="the extra `test` installs ott-jax")
  model = unet.UNet(
    shape=(8, 8, 1),
    model_channels=32,
    num_res_blocks=1,
    attention_resolutions=(8,),
    channel_mult=(1,),
    num_heads=2,
    rngs=nnx.Rngs(0),
  )
  graph, state, rest = nnx.split(model, nnx.Param, ...)
  # The last convolution of each block starts at zero, which would hide everything before it.
  state = jax.tree.map(lambda leaf: leaf + 0.02 * helpers.array(leaf.size, leaf.shape, leaf.dtype), state)
  fn = lambda s, t, x: nnx.merge(graph, s, rest, copy=True)(t, x)
  args = (jnp.linspace(0.1, 0.9, 2), helpers.array(2, (2, 8, 8, 1), jnp.float32))
  config = jaxlora.LoraConfig(rank=1, targets=lambda path, leaf: path.endswith("kernel") and min(leaf.shape[-2:]) > 1)
  leaves = jax.tree_util.tree_leaves_with_path(state)
  kernels = [leaf for path, leaf in leaves if "'kernel'" in jax.tree_util.keystr(path) and min(leaf.shape[-2:]) > 1]
  check_model(fn, state, args, config, len(kernels))
