"""Trees of Tunix, the Gemma package and MaxText, rebuilt in miniature: every leaf from torch's names, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import hub, peft
from tests.hub.families import FAMILIES, like_of, tensors_of

pytest.importorskip("safetensors", reason="models' files need jaxlora[peft]")
from safetensors.numpy import load_file, save_file


@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_has_its_leaf_both_ways(family, tmp_path):
  like, tensors = like_of(family), tensors_of(family)
  save_file(tensors, tmp_path / "model.safetensors")
  preset = hub.preset(FAMILIES[family].library, like)
  params = hub.load(tmp_path, like, **preset)
  hub.save(tmp_path / "out", params, **preset)
  again = load_file(tmp_path / "out" / "model.safetensors")
  assert again.keys() == tensors.keys()
  for name, tensor in tensors.items():
    rounded = FAMILIES[family].library == "maxtext" and "q_proj" in name  # divided and multiplied
    np.testing.assert_allclose(again[name], tensor, rtol=1e-6 if rounded else 0, err_msg=name)


@pytest.mark.parametrize("family", ["Llama", "Mistral"])
def test_an_adapter_of_scaled_and_turned_queries(family, tmp_path):
  """What an adapter of a MaxText tree adds to its files' tensors is what PEFT's folder says, and back to the tree."""
  like, tensors = like_of(family), tensors_of(family)
  save_file(tensors, tmp_path / "model.safetensors")
  preset = hub.preset("maxtext", like)
  params = hub.load(tmp_path, like, **preset)
  axes = {".*(query|key)/kernel": "isoo" if FAMILIES[family].scanned else "ioo"}
  config = jaxlora.LoraConfig(rank=2, alpha=6, targets=".*(query|key)/kernel", axes=axes)
  fresh = jaxlora.adapt(params, config, jax.random.key(0))
  tree = jax.tree.map(lambda leaf: leaf + 0.1, fresh)
  tree = jaxlora.join(jaxlora.split(fresh)[0], jaxlora.split(tree)[1])
  hub.save(tmp_path / "merged", jaxlora.merge(tree), **preset)
  merged = load_file(tmp_path / "merged" / "model.safetensors")
  adapter = peft.to_modules(tree, names=preset["names"])
  assert len(adapter.modules) == 4
  for name, module in adapter.modules.items():
    update = module.scale * module.b @ module.a
    np.testing.assert_allclose(merged[f"{name}.weight"] - tensors[f"{name}.weight"], update, atol=1e-5, err_msg=name)
  peft.save(tmp_path / "adapter", tree, names=preset["names"])
  again = peft.load(tmp_path / "adapter", params, names=preset["names"], axes=axes)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), jaxlora.merge(again), jaxlora.merge(tree))


def test_other_trees_and_libraries_are_errors():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  for library, like, message in (
    ("keras", {}, r"'keras': expected one of 'tunix', 'gemma', 'maxtext'\. Say names= and axes="),
    ("tunix", {"layers": {"0": {"moe": {"w": shape(3, 4)}}}}, r"its trees have no leaf layers/0/moe/w\. Say names="),
    (
      "maxtext",
      {"decoder": {f"layers_{k}": {"self_attention": {"query": {"kernel": shape(4, 2, k)}}} for k in (2, 4)}},
      r"heads of several sizes, \[2, 4\]\. Say names= and axes=",
    ),
    ("gemma", {"layer_0": {"mlp": {"gating_einsum": shape(2, 4, 4), "linear": shape(4, 4)}}}, r"does not tell its lay"),
  ):
    with pytest.raises(hub.HubError, match=message):
      hub.preset(library, like)
