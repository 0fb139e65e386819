"""The Gemma package in its own code: filled from transformers' files by the preset, and adapted as it is.

In CI's leg of interchange, of `pip install --no-deps gemma kauldron einops immutabledict sentencepiece`: Gemma takes
annotations and an identity layer from kauldron, which brings TensorFlow; jaxtyping and flax have what it needs of them.
"""

import importlib
import importlib.util
import sys
import types
import typing

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import hub
from tests import helpers
from tests.hub.families import FAMILIES, HEADS, INNER, KV_HEADS, LAYERS, SIZE, VOCABULARY, WIDTH, WINDOW

pytestmark = [pytest.mark.nightly, pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]
TOKENS = np.random.default_rng(0).integers(3, VOCABULARY, (2, 9))
LAYER = {
  "attn/q_einsum/w": "oio",
  "attn/kv_einsum/w": "ooio",
  "attn/attn_vec_einsum/w": "iio",
  "mlp/gating_einsum": "ooi",
  "mlp/linear": "io",
}


class Identity(nn.Module):
  @nn.compact
  def __call__(self, x):
    return x


class Annotations(types.ModuleType):
  """kauldron.typing, by jaxtyping: `Float["*B L"]`, of which Gemma asks how many axes are not the batch's."""

  def __getattr__(self, name):
    if name.startswith("__"):
      raise AttributeError(name)
    if name == "typechecked":
      return lambda fn: fn
    kind = getattr(sys.modules["jaxtyping"], "Shaped" if name == "Array" else name)
    is_array = name in ("Array", "Bool", "Float", "Int", "UInt8")
    of = lambda cls, item: kind[jax.Array, item] if is_array else typing.Any
    return type(name, (), {"__class_getitem__": classmethod(of)})


@pytest.fixture
def gemma(monkeypatch):
  """Gemma's decoder, of two layers."""
  for name in ("jaxtyping", "einops", "immutabledict", "sentencepiece"):
    pytest.importorskip(name, reason="Gemma's code needs it")
  if importlib.util.find_spec("gemma") is None or (found := importlib.util.find_spec("kauldron")) is None:
    pytest.skip("needs gemma and kauldron")
  outer, inner = types.ModuleType("kauldron"), types.ModuleType("kauldron.kd")
  outer.__path__, outer.typing, outer.kd = list(found.submodule_search_locations), Annotations("kauldron.typing"), inner
  outer.kontext = types.SimpleNamespace(Key=str, REQUIRED="")
  inner.typing, inner.nn = outer.typing, types.SimpleNamespace(Identity=Identity)
  inner.sharding = types.SimpleNamespace(ShardingTree=object)
  for module in (outer, inner, outer.typing):
    monkeypatch.setitem(sys.modules, module.__name__, module)
  code, config = (importlib.import_module(f"gemma.gm.nn._{name}") for name in ("transformer", "config"))
  kinds = importlib.import_module("gemma.gm.nn._modules").AttentionType
  fields = {
    "num_embed": VOCABULARY,
    "embed_dim": WIDTH,
    "hidden_dim": INNER,
    "num_heads": HEADS,
    "head_dim": SIZE,
    "num_kv_heads": KV_HEADS,
    "final_logit_softcap": None,
    "use_post_attn_norm": True,
    "use_post_ffw_norm": True,
    "attention_types": (kinds.LOCAL_SLIDING, kinds.GLOBAL),
    "sliding_window_size": WINDOW,
    "transpose_gating_einsum": True,
    "use_qk_norm": True,
    "local_base_frequency": 10_000,
    "global_base_frequency": 1_000_000,
  }
  return code.Transformer(config=config.TransformerConfig(**fields), dtype=jnp.float32)


def test_the_package_itself_is_adapted(gemma):
  params = gemma.init(jax.random.key(0), TOKENS)
  forward = lambda params, tokens: gemma.apply(params, tokens).logits
  config = jaxlora.LoraConfig(rank=2)
  tree = jaxlora.adapt(params, config, jax.random.key(1), probe=lambda params: forward(params, TOKENS))
  roles = {leaf.path: leaf.roles for leaf in jaxlora.summary(tree).leaves}
  assert roles == {f"params/layer_{k}/{path}": of for k in range(LAYERS) for path, of in LAYER.items()}
  tree = helpers.trained(tree, 0, width=0.05)
  wrapped = jaxlora.wrap(forward, on_materialize="error")
  helpers.assert_close(jax.jit(wrapped)(tree, TOKENS), jax.jit(forward)(jaxlora.merge(tree), TOKENS), 1e-5)
  loss = lambda logits: jnp.square(logits).mean()
  grads = jax.jit(jaxlora.grad(lambda tree: loss(wrapped(tree, TOKENS))))(tree)
  oracle = jax.jit(jaxlora.grad(lambda tree: loss(forward(jaxlora.merge(tree), TOKENS))))(tree)
  helpers.assert_close(grads, oracle, 1e-4)


def test_the_package_filled_from_a_hubs_files_says_what_transformers_does(gemma, tmp_path):
  torch = pytest.importorskip("torch", reason="transformers' Gemma runs on torch")
  transformers = pytest.importorskip("transformers")
  name, fields = FAMILIES["Gemma3"].config
  fields = fields | {"query_pre_attn_scalar": SIZE, "head_dim": SIZE}
  torch.manual_seed(0)
  config = getattr(transformers, name)(**fields, attn_implementation="eager", tie_word_embeddings=True)
  theirs = transformers.Gemma3ForCausalLM(config).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path)
  expected = theirs(torch.tensor(TOKENS)).logits.detach().numpy()
  like = jax.eval_shape(lambda: gemma.init(jax.random.key(0), TOKENS))["params"]
  params = hub.load(tmp_path, like, **hub.preset("gemma", like))
  np.testing.assert_allclose(gemma.apply({"params": params}, TOKENS).logits, expected, rtol=1e-5, atol=1e-5)
