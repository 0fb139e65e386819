"""Models of Tunix, in its own code: adapted as they are, and with the factors that qwix puts into them.

In CI's leg of interchange, of `pip install --no-deps google-tunix`: loading the package itself would load its trainers,
and with them a dozen packages, of which the models need none.
"""

import importlib
import sys
import types

from flax import nnx
import jax
import jax.numpy as jnp
import pytest

import jaxlora
import jaxlora.nnx
from tests import helpers

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]
Trainable = jaxlora.nnx.Trainable
SIZES = {"num_layers": 2, "vocab_size": 32, "embed_dim": 16, "hidden_dim": 32, "num_heads": 2, "head_dim": 8}
SIZES |= {"num_kv_heads": 1, "rope_theta": 10000, "norm_eps": 1e-6}
ATTENTION = {"attn/q_proj/w": "ioo", "attn/k_proj/w": "ioo", "attn/v_proj/w": "ioo", "attn/o_proj/w": "iio"}
DENSE = {f"mlp/{name}_proj/kernel": "io" for name in ("gate", "up", "down")}
SPARSE = {f"mlp/{name}_proj": "sio" for name in ("gate", "up", "down")}
MODELS = {
  "llama3": ("llama3", "Llama3", {}, DENSE),
  "qwen3": ("qwen3", "Qwen3", {}, DENSE),
  "qwen3 of experts": ("qwen3", "Qwen3", {"num_experts": 4, "num_experts_per_tok": 2}, SPARSE),
}
TOKENS = 6


@pytest.fixture
def make(monkeypatch):
  """A function from a name in `MODELS` to the model."""
  pytest.importorskip("jaxtyping", reason="Tunix's models need jaxtyping")
  spec = importlib.util.find_spec("tunix")
  if spec is None:
    pytest.skip("needs google-tunix")
  package = types.ModuleType("tunix")
  package.__path__ = list(spec.submodule_search_locations)
  monkeypatch.setitem(sys.modules, "tunix", package)

  def model(name):
    module, kind, more, _ = MODELS[name]
    code = importlib.import_module(f"tunix.models.{module}.model")
    return getattr(code, kind)(code.ModelConfig(**SIZES, **more), rngs=nnx.Rngs(0))

  return model


def logits(model):
  tokens = jnp.arange(2 * TOKENS).reshape(2, TOKENS) % SIZES["vocab_size"]
  places = jnp.broadcast_to(jnp.arange(TOKENS), tokens.shape)
  return model(tokens, places, None, jnp.tril(jnp.ones((2, TOKENS, TOKENS), bool)))[0]


def loss(model):
  return jnp.square(logits(model)).mean()


def moved(model, kind):
  state = nnx.state(model, kind)
  nnx.update(model, jax.tree.map(lambda x: x + 0.1 * helpers.normal(x.size, x.shape, x.dtype), state))
  return model


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_adapted_as_it_is(make, name):
  config = jaxlora.LoraConfig(rank=2, exclude=".*router.*" if name == "qwen3 of experts" else None)
  model = moved(jaxlora.nnx.adapt(make(name), config, jax.random.key(0), probe=logits), Trainable)
  roles = {leaf.path: leaf.roles for leaf in jaxlora.summary(model).leaves}
  assert roles == {f"layers/{k}/{path}": of for k in range(2) for path, of in (ATTENTION | MODELS[name][-1]).items()}
  helpers.assert_close(nnx.jit(logits)(model), logits(jaxlora.merge(model)), 1e-5)
  grads = nnx.jit(nnx.grad(loss, argnums=nnx.DiffState(0, Trainable)))(model)
  oracle = jax.jit(jaxlora.grad(lambda tree: loss(jaxlora.merge(tree))))(jaxlora.nnx.to_tree(model))
  got, want = (sorted(jax.tree.leaves(jax.tree.map(jnp.sum, tree))) for tree in (nnx.to_pure_dict(grads), oracle))
  helpers.assert_close(jnp.stack(got), jnp.stack(want), 1e-4)


def test_what_qwix_put_into_a_model_comes_in_and_goes_out(make):
  qwix = pytest.importorskip("qwix", reason="the factors are qwix's")
  tokens = jnp.zeros((1, TOKENS), jnp.int32)
  args = tokens, tokens, None, jnp.ones((1, TOKENS, TOKENS), bool)
  provider = qwix.LoraProvider(module_path=".*(q_proj|down_proj)", rank=2, alpha=4.0)
  theirs = qwix.apply_lora_to_model(make("llama3"), provider, *args, rngs=nnx.Rngs(1))
  blank = nnx.clone(theirs)
  expected = logits(moved(theirs, nnx.LoRAParam))
  ours = jaxlora.nnx.from_qwix(theirs, alpha=4.0)
  assert len(jaxlora.summary(ours).leaves) == 4
  helpers.assert_close(logits(ours), expected, 1e-5)
  helpers.assert_close(logits(jaxlora.nnx.to_qwix(ours, blank, alpha=4.0)), expected, 1e-5)
