"""Miniatures of transformers' models on torch, their files in transformers' Flax models: the same outputs.

Needs torch and transformers, in a run of its own: `USE_TORCH=1 python -m pytest -n 0 tests/hub/test_transformers.py`.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if os.environ.get("USE_TORCH") != "1":
  pytest.skip("needs torch, in a run of its own: USE_TORCH=1", allow_module_level=True)
torch = pytest.importorskip("torch", reason="the models are torch's")

import transformers  # noqa: E402

from jaxlora import hub  # noqa: E402
from tests.hub.decoder import logits  # noqa: E402
from tests.hub.families import FAMILIES, layers_of, like_of  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]
BODY = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = BODY | {"vocab_size": 40, "max_position_embeddings": 32}
MODELS = {
  "Llama": ("ForCausalLM", SMALL | {"num_key_value_heads": 2}),
  "Mistral": ("ForCausalLM", SMALL | {"num_key_value_heads": 2}),
  "Gemma": ("ForCausalLM", SMALL | {"num_key_value_heads": 2, "head_dim": 8}),
  "GPT2": ("LMHeadModel", {"vocab_size": 40, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}),
  "Bert": ("ForMaskedLM", SMALL),
  "Roberta": ("ForMaskedLM", SMALL | {"pad_token_id": 1}),
  "ViT": ("ForImageClassification", BODY | {"image_size": 8, "patch_size": 4}),
}


@pytest.fixture(autouse=True)
def as_transformers_adds():
  with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.parametrize("family", MODELS)
def test_the_same_outputs_both_ways(family, tmp_path):
  head, sizes = MODELS[family]
  config = getattr(transformers, f"{family}Config")(**sizes)
  kind = getattr(transformers, f"{family}{head}")
  torch.manual_seed(0)
  theirs = kind(config).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))  # norms and biases, too
  theirs.save_pretrained(tmp_path / "torch")
  generator = np.random.default_rng(0)
  x = generator.normal(size=(2, 3, 8, 8)).astype("float32") if family == "ViT" else generator.integers(3, 40, (2, 7))
  expected = theirs(torch.tensor(x)).logits.detach().numpy()

  flax = getattr(transformers, f"Flax{family}{head}")(config)
  like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), flax.params)
  params = hub.load(tmp_path / "torch", like)
  np.testing.assert_allclose(flax(jnp.asarray(x), params=params).logits, expected, rtol=1e-5, atol=1e-5)

  hub.save(tmp_path / "again", params, beside=tmp_path / "torch")
  again, about = kind.from_pretrained(tmp_path / "again", output_loading_info=True)
  assert (about["missing_keys"], about["unexpected_keys"]) == ([], [])
  np.testing.assert_array_equal(again.eval()(torch.tensor(x)).logits.detach().numpy(), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_families_without_a_flax_model(family, tmp_path):
  """In the trees that Tunix, the Gemma package and MaxText have, through a decoder of a few lines."""
  about = FAMILIES[family]
  name, fields = about.config
  config = getattr(transformers, name)(
    **fields, attn_implementation="eager", tie_word_embeddings=about.library == "gemma"
  )
  kind = getattr(transformers, f"{family}ForCausalLM")
  torch.manual_seed(0)
  theirs = kind(config).eval()
  with torch.no_grad():
    for parameter in theirs.parameters():
      parameter.add_(0.05 * torch.randn_like(parameter))
  theirs.save_pretrained(tmp_path / "torch")
  ids = np.random.default_rng(0).integers(3, 40, (2, 9))
  expected = theirs(torch.tensor(ids)).logits.detach().numpy()

  like = like_of(family)
  preset = hub.preset(about.library, like)
  params = hub.load(tmp_path / "torch", like, **preset)
  embedding, layers, final, head = layers_of(family, params)
  found = jax.jit(lambda *args: logits(*args[:3], jnp.asarray(ids), about.kind, args[3]))(
    embedding, layers, final, head
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)

  hub.save(tmp_path / "again", params, beside=tmp_path / "torch", **preset)
  again, said = kind.from_pretrained(tmp_path / "again", output_loading_info=True)
  assert (said["missing_keys"], said["unexpected_keys"]) == ([], [])
  for (name, one), (_, other) in zip(theirs.named_parameters(), again.named_parameters(), strict=True):
    rounded = about.library == "maxtext" and "q_proj" in name  # divided and multiplied
    np.testing.assert_allclose(
      one.detach().numpy(), other.detach().numpy(), rtol=1e-6 if rounded else 0, atol=0, err_msg=name
    )
