"""Keys that others than `save_pretrained` write, and several adapters in one folder (llama.cpp#3640, peft#1579)."""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlora
from jaxlora import peft
from jaxlora.peft._read import read
from tests.peft.folders import PREFIX, adapted, assert_equal, edit, normal, params, tensors_of, write

KEYS = {
  "adapter's name": lambda key: re.sub(r"(lora_[AB])\.weight", r"\1.default.weight", key),
  "compiled": lambda key: f"_orig_mod.{key}",
  "compiled inside": lambda key: key.replace(PREFIX, f"{PREFIX}_orig_mod."),
  "compiled layers": lambda key: re.sub(r"(layers\.\d+)", r"\1._orig_mod", key),
  "FSDP": lambda key: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", f"_fsdp_wrapped_module.{key}"),
  "checkpointed": lambda key: re.sub(r"(layers\.\d+)", r"\1._checkpoint_wrapped_module", key),
  "FSDP, checkpointed, compiled": lambda key: re.sub(
    r"(layers\.\d+)", r"\1._fsdp_wrapped_module._checkpoint_wrapped_module._orig_mod", f"_orig_mod.module.{key}"
  ),
  "parallel": lambda key: f"module.{key}",
  "parallel twice": lambda key: f"module.module.{key}",
  "Lightning": lambda key: f"_forward_module.{key}",
  "no beginning": lambda key: key.removeprefix(PREFIX),
  "nested": lambda key: PREFIX + key,
  "nested twice": lambda key: PREFIX + PREFIX + key,
  "model's own state": lambda key: re.sub(
    r"(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(\.weight)?$", r"\1.some_name\2", key
  ),
}


def rewrite(folder, change):
  tensors = tensors_of(folder)
  save_file({change(key): tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("change", KEYS.values(), ids=KEYS)
@pytest.mark.parametrize("fields", [{}, {"targets": ".*out/kernel", "variant": "dora"}], ids=["plain", "dora"])
def test_keys_that_name_the_same_tensors(change, fields, tmp_path):
  base = params()
  tree = adapted(base, **{"targets": ".*(out/kernel|embedding)", "train": "head/.*", **fields})
  peft.save(tmp_path, tree)
  before = set(tensors_of(tmp_path))
  rewrite(tmp_path, change)
  assert set(tensors_of(tmp_path)) != before
  assert_equal(peft.load(tmp_path, base, axes={".*out/kernel": "iio"}), tree)


def test_a_models_own_state(tmp_path):
  """Everything that `model.state_dict()` has: names of adapters, the bases of all modules, what was trained whole."""
  base = params()
  tree = adapted(base, targets="conv/kernel|embed/embedding", train="head/.*")
  peft.save(tmp_path, tree)
  head = {name: np.asarray(value).T for name, value in base["head"].items()}
  kept = {key: tensor for key, tensor in tensors_of(tmp_path).items() if "head" not in key}
  own = {re.sub(r"(lora_\w+)(\.weight)?$", r"\1.default\2", key): tensor for key, tensor in kept.items()}
  own |= {
    f"{PREFIX}head.{place}.{parameter}": np.ascontiguousarray(tensor)
    for place, values in (
      ("original_module", {"weight": head["kernel"], "bias": head["bias"]}),
      (
        "modules_to_save.default",
        {
          "weight": np.asarray(tree["head"]["kernel"].value).T,
          "bias": np.asarray(tree["head"]["bias"].value),
        },
      ),
    )
    for parameter, tensor in values.items()
  }
  own[f"{PREFIX}embed.base_layer.weight"] = np.asarray(base["embed"]["embedding"])
  own[f"{PREFIX}layers.0.norm.weight"] = np.asarray(base["layers_0"]["norm"]["scale"])
  save_file(own, tmp_path / "adapter_model.safetensors")
  assert_equal(peft.load(tmp_path, base), tree)
  edit(tmp_path, {f"{PREFIX}head.original_module.bias": head["bias"] + 1})
  with pytest.raises(
    peft.PeftError, match=r"head/bias \(head\.bias\): the file holds the base weight, and it is not this"
  ):
    peft.load(tmp_path, base)


def test_two_names_of_one_tensor(tmp_path):
  write(tmp_path, {"head": (2, 8, 7)})
  key = f"{PREFIX}head.lora_A.weight"
  edit(tmp_path, {f"_orig_mod.{key}": tensors_of(tmp_path)[key]})
  with pytest.raises(
    peft.PeftError, match=re.escape("head.lora_A.weight is the same tensor's name, without its wrappers. Keep one")
  ):
    peft.load(tmp_path, params())
  edit(tmp_path, {f"_orig_mod.{key}": None})
  assert peft.load(tmp_path, params())


def test_a_beginning_that_only_some_have(tmp_path):
  write(tmp_path, {"head": (2, 8, 7), "pre": (2, 8, 8)})
  tensors = tensors_of(tmp_path)
  for change in (lambda key: key.removeprefix(PREFIX), lambda key: PREFIX + key):
    save_file(
      {change(key) if "pre" in key else key: tensor for key, tensor in tensors.items()},
      tmp_path / "adapter_model.safetensors",
    )
    if change("") == "":
      with pytest.raises(
        peft.PeftError, match=re.escape("pre.lora_A.weight: expected a name that starts with 'base_model.model.'")
      ):
        read(tmp_path)
    else:
      assert set(read(tmp_path).modules) == {"head", f"{PREFIX}pre"}


def test_several_adapters_by_the_names_in_their_keys(tmp_path):
  """PEFT wrote them where one adapter's name is part of another's: `lora_A.ref.weight` beside `lora_A.weight`."""
  base, tensors = params(), {}
  trees = {name: adapted(base, targets="head/kernel", alpha=k) for k, name in enumerate(("default", "ref", "other"), 2)}
  for name, tree in trees.items():
    peft.save(tmp_path, tree)
    tensors |= {key.replace(".weight", f".{name}.weight"): value for key, value in tensors_of(tmp_path).items()}
  edit(tmp_path, lora_alpha=2)
  save_file(tensors, tmp_path / "adapter_model.safetensors")
  for some in (tensors, {key.replace(".default", ""): value for key, value in tensors.items()}):
    save_file(some, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
      peft.PeftError,
      match=re.escape("the keys name several adapters: default, other, ref. Say which: adapter_name='default'"),
    ):
      peft.load(tmp_path, base)
    for name, tree in trees.items():
      found = peft.load(tmp_path, base, adapter_name=name)["head"]["kernel"]
      np.testing.assert_array_equal(found.a, tree["head"]["kernel"].a)
      np.testing.assert_array_equal(found.b, tree["head"]["kernel"].b)
    with pytest.raises(
      peft.PeftError, match=re.escape("adapter_name: found 'nobody', the keys name default, other, ref")
    ):
      peft.load(tmp_path, base, adapter_name="nobody")


def test_several_adapters_in_the_folders_of_one(tmp_path):
  """PEFT writes each adapter that is not called `default` into a folder of its name."""
  base = params()
  trees = {name: adapted(base, targets="head/kernel", alpha=k) for k, name in enumerate(("first", "second"), 2)}
  for name, tree in trees.items():
    peft.save(tmp_path / name, tree)
  with pytest.raises(
    peft.PeftError, match=re.escape("folders of 2 adapter(s): first, second. Say which one: adapter_name='first'")
  ):
    peft.load(tmp_path, base)
  for name, tree in trees.items():
    assert_equal(peft.load(tmp_path, base, adapter_name=name), tree)
    assert_equal(peft.load(tmp_path / name, base), tree)
  default = adapted(base, targets="head/kernel", alpha=9)
  peft.save(tmp_path, default)
  assert_equal(peft.load(tmp_path, base), default)
  assert_equal(peft.load(tmp_path, base, adapter_name="default"), default)
  assert_equal(peft.load(tmp_path, base, adapter_name="first"), trees["first"])
  with pytest.raises(peft.PeftError, match=re.escape("adapter_name: found 'third', the keys name default")):
    peft.load(tmp_path, base, adapter_name="third")
  with pytest.raises(peft.PeftError, match=re.escape("adapter_name: found '../x', expected the name of a folder")):
    peft.load(tmp_path, base, adapter_name="../x")


@pytest.mark.parametrize("alpha", [-4.0, 0, -0.5])
@pytest.mark.parametrize("scaling", ["standard", "rslora"])
def test_alphas_that_are_not_positive(alpha, scaling, tmp_path):
  """A negated adapter, and one that is off."""
  base = params()
  write(tmp_path, {"head": (2, 8, 7)}, lora_alpha=alpha, use_rslora=scaling == "rslora")
  adapter = read(tmp_path)
  tree = peft.load(tmp_path, base)
  scale = alpha / (2**0.5 if scaling == "rslora" else 2)
  module = adapter.modules["head"]
  expected = np.asarray(base["head"]["kernel"]) + scale * (module.b @ module.a).T
  np.testing.assert_allclose(jaxlora.merge(tree)["head"]["kernel"], expected, rtol=1e-5, atol=1e-6)
  peft.save(tmp_path / "again", tree)
  assert_equal(peft.load(tmp_path / "again", base), tree)


def test_layers_of_a_stack_some_of_which_are_off(tmp_path):
  base = {"layers": {"up": {"kernel": normal(3, 8, 6)}}}
  write(tmp_path, {f"layers.{k}.up": (2, 8, 6) for k in range(3)}, lora_alpha=0)
  for pattern in ({}, {r"layers\.1\.up": -3}, {r"layers\.[01]\.up": 5}):
    edit(tmp_path, alpha_pattern=pattern)
    merged = jaxlora.merge(peft.load(tmp_path, base))["layers"]["up"]["kernel"]
    for name, module in read(tmp_path).modules.items():
      k = int(name.split(".")[1])
      expected = np.asarray(base["layers"]["up"]["kernel"][k]) + module.alpha / 2 * (module.b @ module.a).T
      np.testing.assert_allclose(merged[k], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "config",
  [
    {"use_rslora": None}, {"init_lora_weights": None}, {"rank_pattern": None, "alpha_pattern": None},
    {"modules_to_save": None}, {"use_dora": None}, {"lora_bias": None}, {"layer_replication": []},
    {"trainable_token_indices": None},
  ],
  ids=str,
)  # fmt: skip
def test_fields_that_are_null(config, tmp_path):
  base = params()
  tree = adapted(base, targets="head/kernel", alpha=3)
  peft.save(tmp_path, tree)
  edit(tmp_path, **config)
  loaded = peft.load(tmp_path, base)
  assert_equal(loaded, tree)
  assert isinstance(loaded["head"]["kernel"].a, jax.Array)


def test_a_file_cut_into_several(tmp_path):
  peft.save(tmp_path / "whole", adapted(params(), targets=".*embedding", train="head/.*"))
  tensors = tensors_of(tmp_path / "whole")
  names, config = sorted(tensors), (tmp_path / "whole" / "adapter_config.json").read_bytes()
  folder = tmp_path / "cut"
  folder.mkdir()
  (folder / "adapter_config.json").write_bytes(config)
  for k in range(3):
    part = {name: tensors[name] for name in names[k::3]}
    save_file(part, folder / f"adapter_model-0000{k + 1}-of-00003.safetensors")
  assert read(folder).modules.keys() == read(tmp_path / "whole").modules.keys()
  (finding,) = peft.check(folder, "peft")  # which does not read it
  assert finding.rule.name == "file"
  (folder / "adapter_model-00002-of-00003.safetensors").unlink()
  with pytest.raises(
    peft.PeftError, match=r"found adapter_model-00001-of-00003.safetensors, .* expected all of 3 files"
  ):
    read(folder)
  (folder / "adapter_model-00001-of-00003.safetensors").rename(folder / "model.safetensors")
  (folder / "adapter_model-00003-of-00003.safetensors").unlink()
  with pytest.raises(peft.PeftError, match=r"found model.safetensors, expected adapter_model.safetensors"):
    read(folder)


def test_parameters_of_other_names_are_leaves_of_their_own(tmp_path):
  """Mamba's `A_log`, and a batch norm's statistics, of modules that PEFT saves whole."""
  values = {"mixer.A_log": normal(6, 4), "mixer.D": normal(6), "bn.running_mean": normal(5), "bn.weight": normal(5)}
  tensors = {f"{PREFIX}{name}": np.asarray(value) for name, value in values.items()}
  save_file(
    tensors | {f"{PREFIX}bn.num_batches_tracked": np.ones((), np.int64)}, tmp_path / "adapter_model.safetensors"
  )
  config = {"peft_type": "LORA", "modules_to_save": ["mixer", "bn"]}
  (tmp_path / "adapter_config.json").write_text(json.dumps(config))
  zeros = jax.tree.map(jnp.zeros_like, values)
  params = {
    "params": {"mixer": {"A_log": zeros["mixer.A_log"], "D": zeros["mixer.D"]}, "bn": {"scale": zeros["bn.weight"]}},
    "batch_stats": {"bn": {"mean": zeros["bn.running_mean"]}},
  }
  with pytest.raises(peft.PeftError, match=r"bn.running_mean: no leaf of the tree is called so.*names="):
    peft.load(tmp_path, params)
  tree = peft.load(tmp_path, params, names={"batch_stats/(.*)/mean": r"\1.running_mean"})  # the remedy
  merged = jaxlora.merge(tree)
  for leaf, name in (
    (merged["params"]["mixer"]["A_log"], "mixer.A_log"),
    (merged["params"]["mixer"]["D"], "mixer.D"),
    (merged["params"]["bn"]["scale"], "bn.weight"),
    (merged["batch_stats"]["bn"]["mean"], "bn.running_mean"),
  ):
    np.testing.assert_array_equal(leaf, values[name])
  adapter = peft.Adapter({}, {"mixer.A_log": np.ones((4, 4), np.float32)}, {}, {"modules_to_save": ["mixer"]})
  with pytest.raises(peft.PeftError, match="does not tell in which order its axes are"):
    peft.from_modules(adapter, {"mixer": {"A_log": jnp.zeros((4, 4))}})
