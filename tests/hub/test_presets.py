"""Trees of Tunix and of the Gemma package, rebuilt in miniature: every leaf from torch's names, and back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxlora import hub
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
    np.testing.assert_array_equal(again[name], tensor, err_msg=name)


def test_other_trees_and_libraries_are_errors():
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  for library, like, message in (
    ("maxtext", {}, r"'maxtext': expected one of 'tunix', 'gemma'\. Say names= and axes="),
    ("tunix", {"layers": {"0": {"moe": {"w": shape(3, 4)}}}}, r"its trees have no leaf layers/0/moe/w\. Say names="),
    ("gemma", {"layer_0": {"mlp": {"gating_einsum": shape(2, 4, 4), "linear": shape(4, 4)}}}, r"does not tell its lay"),
  ):
    with pytest.raises(hub.HubError, match=message):
      hub.preset(library, like)
