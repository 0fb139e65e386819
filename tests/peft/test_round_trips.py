"""What was saved in PEFT's form is loaded again."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import peft
from jaxlora.peft import Module
from jaxlora.peft._read import read
from tests.peft.folders import (
  AXES,
  FIELDS,
  PREFIX,
  RANDOM,
  adapted,
  assert_equal,
  normal,
  params,
  tensors_of,
  write_modules,
)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_what_was_saved_is_loaded_again(fields, tmp_path):
  base = params()
  tree = adapted(base, **fields)
  peft.save(tmp_path, tree, task_type="CAUSAL_LM", base_model_name_or_path="somebody/model")
  loaded = peft.load(tmp_path, base, axes=AXES)
  assert_equal(loaded, tree)
  assert_equal(jaxlora.strip(loaded), base)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", "somebody/model")
  assert config["init_lora_weights"] is True
  assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_scalings_that_differ_become_alphas(tmp_path):
  base = params()
  tree = adapted(base, alpha=3, overrides={".*_1/.*": {"scaling": "rslora", "rank": 3}})
  peft.save(tmp_path, tree)
  loaded = peft.load(tmp_path, base, axes=AXES)
  for one, other in zip(jaxlora.summary(tree).leaves, jaxlora.summary(loaded).leaves, strict=True):
    assert one.path == other.path
    assert one.rank == other.rank
    assert one.scale == pytest.approx(other.scale, rel=1e-15)


def test_the_trainable_half_and_abstract_bases_are_enough(tmp_path):
  base = params()
  tree = adapted(base, train=["head"])
  peft.save(tmp_path / "half", jaxlora.split(tree)[1])
  abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), base)
  peft.save(tmp_path / "abstract", jaxlora.join(*(jaxlora.split(tree))))
  assert_equal(peft.load(tmp_path / "half", base, axes=AXES), tree)
  loaded = peft.load(tmp_path / "abstract", abstract, axes=AXES)
  assert_equal(jaxlora.split(loaded)[1], jaxlora.split(tree)[1])


def test_layers_of_a_scan_are_written_one_by_one_whichever_axis_they_are_on(tmp_path):
  base = {"layers": {"q": {"kernel": normal(8, 3, 6)}, "out": {"kernel": normal(3, 2, 4, 8)}}, "head": normal(8, 4)}
  axes = {"layers/q.*": "iso", "layers/out.*": "siio"}
  tree = adapted(base, axes=axes, targets="layers/.*")
  peft.save(tmp_path, tree)
  tensors = tensors_of(tmp_path)
  assert len(tensors) == 12
  np.testing.assert_array_equal(
    tensors[f"{PREFIX}model.layers.2.q.lora_B.weight"], np.asarray(tree["layers"]["q"]["kernel"].b[2]).T
  )
  assert_equal(peft.load(tmp_path, base, axes=axes), tree)


def test_layers_with_ranks_and_scales_of_their_own_meet_in_one_stack(tmp_path):
  base = {"layers": {"q": {"kernel": normal(3, 8, 6)}}}
  modules = [
    Module(f"model.layers.{k}.q", "linear", RANDOM.normal(size=(rank, 8)), RANDOM.normal(size=(6, rank)), alpha)
    for k, rank, alpha in ((0, 2, 3.0), (2, 4, 5.0))
  ]
  write_modules(tmp_path, modules)
  loaded = peft.load(tmp_path, base)["layers"]["q"]["kernel"]
  assert loaded.a.shape == (3, 4, 8)
  for module, k in zip(modules, (0, 2), strict=True):
    np.testing.assert_allclose(loaded.delta()[k], module.delta().T, rtol=1e-5, atol=1e-6)
  assert not np.asarray(loaded.delta()[1]).any()


def test_a_folder_is_replaced_in_whole(tmp_path):
  base = params()
  peft.save(tmp_path, adapted(base))
  tree = adapted(base, targets="head/kernel")
  peft.save(tmp_path, tree)
  assert_equal(peft.load(tmp_path, base), tree)


def test_factors_keep_the_files_dtype_and_wider_ones_are_narrowed(tmp_path):
  module = Module("head", "linear", np.ones((2, 8)), np.ones((7, 2)), 2.0)
  write_modules(tmp_path, [module])
  assert peft.load(tmp_path, params())["head"]["kernel"].a.dtype == jnp.float32
  with jax.enable_x64(True):
    assert peft.load(tmp_path, params())["head"]["kernel"].a.dtype == jnp.float64


def test_a_base_on_disk_is_merged_tensor_by_tensor(tmp_path):
  """What a merge that streams needs: no tree, no JAX."""
  tree = adapted(targets="(head|conv)/kernel|embed/embedding", train="head/bias", axes=AXES)
  peft.save(tmp_path, tree)
  adapter = read(tmp_path)
  whole = jaxlora.merge(tree)
  head, conv = np.asarray(tree["head"]["kernel"].base).T, np.asarray(tree["conv"]["kernel"].base).transpose(3, 2, 0, 1)
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  close(adapter.merged("head.weight", head), whole["head"]["kernel"].T)
  close(adapter.merged("conv.weight", conv), whole["conv"]["kernel"].transpose(3, 2, 0, 1))
  close(adapter.merged("embed.weight", np.asarray(tree["embed"]["embedding"].base)), whole["embed"]["embedding"])
  close(adapter.merged("head.bias", np.zeros(7, np.float32)), whole["head"]["bias"])
  assert adapter.merged("other.weight", head) is head
  with pytest.raises(peft.PeftError, match=r"head.weight: shape \(7, 9\) in the base, \(7, 8\) by the adapter"):
    adapter.merged("head.weight", np.zeros((7, 9), np.float32))


def test_weights_of_conv1d_are_told_by_those_that_are_not_square(tmp_path):
  a, b = RANDOM.normal(size=(2, 8)).astype("float32"), RANDOM.normal(size=(8, 2)).astype("float32")
  write_modules(tmp_path, [Module("h.0.c_proj", "linear", a, b, 2.0)])
  adapter = read(tmp_path)
  gpt2 = {"h.0.c_attn.weight": (8, 24), "h.0.c_attn.bias": (24,), "h.0.c_proj.weight": (8, 8)}
  other = {"h.0.c_attn.weight": (24, 8), "h.0.c_attn.bias": (24,), "h.0.c_proj.weight": (8, 8)}
  base = np.zeros((8, 8), np.float32)
  for shapes, expected in ((gpt2, (b @ a).T), (other, b @ a)):
    first = adapter.stores_inputs_first(shapes)
    np.testing.assert_allclose(adapter.merged("h.0.c_proj.weight", base, inputs_first=first), expected, rtol=1e-5)


def test_an_adapter_of_whole_leaves_alone(tmp_path):
  """PEFT refuses an empty `target_modules` and takes its own word for none."""
  params = {"body": {"kernel": jnp.ones((3, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(targets=[], train="head/.*"), jax.random.key(0))
  jaxlora.peft.save(tmp_path / "adapter", tree)
  config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
  assert (config["target_modules"], config["modules_to_save"]) == ("dummy-target-modules", ["head"])
  again = jaxlora.peft.load(tmp_path / "adapter", params)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.split(again)[1], jaxlora.split(tree)[1])
