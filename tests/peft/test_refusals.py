"""Folders and trees that do not fit each other: everything that is wrong is said at once."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import peft
from jaxlora.peft._read import read
from tests.peft.folders import PREFIX, RANDOM, adapted, assert_equal, edit, normal, params, write


def test_everything_that_is_wrong_is_listed_at_once(tmp_path):
  write(
    tmp_path,
    {f"model.layers.{k}.attn.out": (2, 6, 8) for k in (0, 1)}
    | {"head": (2, 8, 7), "conv": (2, 9, 9), "stranger": (2, 3, 3)},
    {"head.bias": np.zeros(9, np.float32)},
  )
  edit(
    tmp_path,
    {
      f"{PREFIX}model.layers.0.attn.out.lora_A.weight": None,
      f"{PREFIX}model.layers.1.attn.out.lora_A.weight": np.full((2, 6), np.nan, np.float32),
      f"{PREFIX}head.lora_B.weight": np.ones((7, 3), np.float32),
      f"{PREFIX}conv.lora_C.weight": np.ones(3, np.float32),
      "head.lora_A.weight": np.ones(3, np.float32),
    },
    lora_alpha="16",
    lora_dropout=-1,
  )
  with pytest.raises(peft.PeftError) as caught:
    peft.load(tmp_path, params())
  for message in (
    "lora_alpha: found '16', expected a finite number",
    "lora_dropout: found -1, expected a probability",
    "model.layers.0.attn.out: found b alone; expected both lora_A and lora_B",
    "model.layers.1.attn.out.lora_A.weight: holds NaN or infinite values",
    "head: lora_A has shape (2, 8), lora_B (7, 3)",
    "conv.lora_C.weight: unknown",
    "head.lora_A.weight: expected a name that starts with 'base_model.model.'",
  ):
    assert message in str(caught.value)


def test_everything_that_does_not_fit_the_tree_is_listed_at_once(tmp_path):
  write(
    tmp_path,
    {"model.layers.0.attn.out": (2, 6, 8), "head": (2, 8, 9), "conv": (2, 9, 9), "layers.7.attn.out": (2, 6, 8)},
    {"embed.weight": np.zeros((11, 9), np.float32), "layers.1.norm.running_mean": np.zeros(8, np.float32)},
  )
  with pytest.raises(peft.PeftError) as caught:
    peft.load(tmp_path, params())
  for message in (
    "head/kernel (head): shape (8, 7), but the adapter has 8 inputs and 9 outputs",
    "conv/kernel (conv): shape (3, 2, 4, 5), but the adapter has 9 inputs",
    "layers.7.attn.out.weight: no leaf of the tree is called so. Nearest: layers_",
    "embed/embedding (embed.weight): embed.weight has shape (11, 9), which does not fit a leaf of shape (11, 8)",
    "layers.1.norm.running_mean: no leaf of the tree is called so",
  ):
    assert message in str(caught.value)
  assert "model.layers.0" not in str(caught.value)


def test_targets_without_factors(tmp_path):
  base = params() | {"layers": {"up": {"kernel": normal(3, 8, 6)}}}
  shapes = {f"model.layers.{k}.up": (2, 8, 6) for k in (0, 1, 2)}
  write(tmp_path, shapes | {"model.layers.1.attn.out": (2, 6, 8)}, target_modules=["out", "up"])
  with pytest.raises(peft.PeftError, match="layers_0/attn/out/kernel: target_modules names 'out', but the file"):
    peft.load(tmp_path, base)
  with pytest.warns(peft.PeftWarning, match="target_modules names layers_0/attn/out/kernel, and the file holds no"):
    tree = peft.load(tmp_path, base, strict=False)  # the remedy that the message names
  assert isinstance(tree["layers_1"]["attn"]["out"]["kernel"], jaxlora.LoraWeight)
  assert tree["layers_0"]["attn"]["out"]["kernel"] is base["layers_0"]["attn"]["out"]["kernel"]
  assert peft.load(tmp_path, base, names={"layers_0/attn/out": "elsewhere.out"})
  edit(tmp_path, layers_to_transform=[0, 1, 2])
  assert peft.load(tmp_path, base)
  write(tmp_path, {name: shapes[name] for name in list(shapes)[:2]}, target_modules=["up"])
  with pytest.raises(
    peft.PeftError, match="layers/up/kernel: target_modules names 'up', but the file holds 2 of 3 layers"
  ):
    peft.load(tmp_path, base)
  with pytest.warns(peft.PeftWarning, match="names layers/up/kernel"):
    assert not peft.load(tmp_path, base, strict=False)["layers"]["up"]["kernel"].b[2].any()


def test_targets_that_the_file_has_nowhere(tmp_path):
  """A model without a pooler, experts that are no modules: PEFT warns, too (unsloth#3405, vllm#47088)."""
  base = params() | {"pooler": {"out": {"kernel": normal(8, 8)}}}
  write(tmp_path, {f"layers.{k}.attn.out": (2, 6, 8) for k in (0, 1)}, target_modules=["out", "head"])
  with pytest.warns(
    peft.PeftWarning, match="target_modules names head/kernel, pooler/out/kernel, and the file"
  ) as said:
    tree = peft.load(tmp_path, base)
  assert said[0].filename == __file__
  assert tree["pooler"]["out"]["kernel"] is base["pooler"]["out"]["kernel"]
  with pytest.warns(peft.PeftWarning, match="pooler/out/kernel"):
    assert peft.from_modules(read(tmp_path), base)


def test_a_rank_that_the_configuration_does_not_say(tmp_path):
  write(tmp_path, {"head": (2, 8, 7)}, r=4)
  with pytest.raises(peft.PeftError, match=r"head: rank 2 in adapter_model.safetensors, 4 by adapter_config.json"):
    peft.load(tmp_path, params())


@pytest.mark.parametrize(
  ("config", "message"),
  [
    ({"use_dora": True}, "head: lora_magnitude_vector: found none, expected one number for each of 7 outputs"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base weights when it starts"),
    ({"init_lora_weights": {}}, "changes the base weights"),
    ({"lora_bias": True}, "lora_bias: a bias in lora_B"),
    ({"target_parameters": ["experts.w"]}, "target_parameters"),
    ({"layer_replication": [[0, 2]]}, "layer_replication"),
    ({"peft_type": "LOHA"}, "peft_type: found 'LOHA', expected 'LORA'"),
    ({"bias": ["all"]}, "bias: found"),
    ({"modules_to_save": 3}, "modules_to_save: found 3, expected a list of names"),
    ({"use_rslora": 1}, "use_rslora: found 1"),
    ({"rank_pattern": {"head": 2.5}}, r"rank_pattern\['head'\]: found 2.5, expected a whole number"),
    ({"alpha_pattern": ["head"]}, "alpha_pattern: found"),
    ({"r": 10**400}, "r: found 1000.*expected a whole number"),
    ({"lora_alpha": float("nan")}, "lora_alpha: found nan"),
  ],
  ids=str,
)
def test_options_that_are_another_method_or_nonsense(config, message, tmp_path):
  write(tmp_path, {"head": (2, 8, 7)}, **config)
  with pytest.raises(peft.PeftError, match=message):
    peft.load(tmp_path, params())


@pytest.mark.parametrize("ending", ["", ".weight"])
def test_doras_magnitude_is_read(ending, tmp_path):
  write(tmp_path, {"head": (2, 8, 7)}, use_dora=True)
  magnitude = RANDOM.normal(size=7).astype("float32")
  edit(tmp_path, {f"{PREFIX}head.lora_magnitude_vector{ending}": magnitude})
  adapter = read(tmp_path)
  np.testing.assert_array_equal(adapter.modules["head"].magnitude, magnitude)
  base = params()
  tree = peft.load(tmp_path, base)
  merged = adapter.merged("head.weight", np.asarray(base["head"]["kernel"]).T)
  np.testing.assert_allclose(np.asarray(jaxlora.merge(tree)["head"]["kernel"]).T, merged, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(np.linalg.norm(merged, axis=1), np.abs(magnitude), rtol=1e-5)
  edit(tmp_path, {f"{PREFIX}head.lora_magnitude_vector{ending}": magnitude[:3]})
  with pytest.raises(peft.PeftError, match=r"head: lora_magnitude_vector: found shape \(3,\)"):
    peft.load(tmp_path, params())
  edit(tmp_path, use_dora=False)
  with pytest.raises(peft.PeftError, match=r"head.*lora_magnitude_vector"):
    peft.load(tmp_path, params())


def test_a_base_in_the_file_must_be_the_base(tmp_path):
  base = params()
  embedding = np.asarray(base["embed"]["embedding"])
  peft.save(tmp_path, adapted(base, targets="embed/embedding"))
  edit(tmp_path, {f"{PREFIX}embed.base_layer.weight": embedding})
  assert isinstance(peft.load(tmp_path, base)["embed"]["embedding"], jaxlora.LoraWeight)
  edit(tmp_path, {f"{PREFIX}embed.base_layer.weight": embedding + 1})
  with pytest.raises(
    peft.PeftError, match=r"embed/embedding .*holds the base weight, and it is not this one: other values"
  ):
    peft.load(tmp_path, base)
  base["embed"]["embedding"] = base["embed"]["embedding"] + 1  # the remedy: the file's tensor in params
  assert isinstance(peft.load(tmp_path, base)["embed"]["embedding"], jaxlora.LoraWeight)


def test_embeddings_that_peft_saved_of_its_own_accord(tmp_path):
  base = params()
  peft.save(tmp_path, adapted(base, targets="head/kernel"))
  table = np.asarray(base["embed"]["embedding"])
  edit(tmp_path, {f"{PREFIX}embed.weight": table})
  assert isinstance(peft.load(tmp_path, base)["embed"]["embedding"], jax.Array)  # it is the base's own
  edit(tmp_path, {f"{PREFIX}embed.weight": table + 1, f"{PREFIX}lm_head.weight": table + 1})  # tied: saved twice
  np.testing.assert_array_equal(peft.load(tmp_path, base)["embed"]["embedding"].value, table + 1)


def test_matrices_that_are_stored_the_other_way_round(tmp_path):
  base = {
    "wide": {"kernel": normal(6, 8), "bias": normal(6)},
    "square": {"kernel": normal(8, 8), "bias": normal(8)},
  }
  axes = {".*/kernel": "oi"}
  tree = adapted(base, axes=axes)
  peft.save(tmp_path, tree)
  assert_equal(peft.load(tmp_path, base, axes=axes), tree)
  apply = lambda p: p["square"]["kernel"] @ jnp.ones(8) + (p["wide"]["kernel"] @ jnp.ones(8)).sum()
  assert_equal(peft.load(tmp_path, base, probe=apply), tree)
  with pytest.raises(
    peft.PeftError,
    match=r"1 problem.*\n.*square/kernel .*: the evidence is divided: wide/kernel as .*"
    r"and a square one does not tell; say axes= or probe=",
  ):
    peft.load(tmp_path, base)
  bare = {"wide": {"kernel": base["wide"]["kernel"]}, "square": base["square"]}
  with pytest.raises(peft.PeftError, match=r"stored as \(out, in\), say axes={pattern: 'oi'} or probe="):
    peft.load(tmp_path, bare)


def test_what_peft_has_no_place_for(tmp_path):
  base = params() | {"cls_token": normal(1, 8), "heads": {"kernel": normal(4, 4, 4)}}
  tree = adapted(base, targets="head/kernel", train=["cls_token", "heads"])
  with pytest.raises(peft.PeftError) as caught:
    peft.save(tmp_path, tree)
  assert "cls_token: PEFT saves modules, and a leaf of this name is none of Flax's" in str(caught.value)
  assert "heads/kernel: shape (4, 4, 4): nothing tells which axes are inputs; say axes=" in str(caught.value)
  assert not list(tmp_path.iterdir())
  peft.save(tmp_path, adapted(base, targets="head/kernel", train=["heads"]), axes={"heads/kernel": "iio"})


def test_modules_to_save_that_peft_would_mistake(tmp_path):
  base = {"head": {"kernel": normal(8, 7)}, "pre_head": {"kernel": normal(8, 8)}, "q": {"kernel": normal(8, 8)}}
  peft.save(tmp_path, adapted(base, targets="q/.*", train="head/.*"))
  assert sorted(read(tmp_path).whole) == ["head.weight", "pre_head.weight"]  # PEFT saves both by this name
  with pytest.raises(peft.PeftError, match="pre_head: PEFT would save it whole, too, as its name ends like head"):
    peft.save(tmp_path, adapted(base, targets="pre_head/.*", train="head/.*"))


def test_a_diverged_adapter_is_not_written(tmp_path):
  tree = jax.tree.map(lambda x: x * jnp.nan, adapted(targets="head/kernel"))
  with pytest.raises(peft.PeftError, match=r"head.lora_A.weight: holds NaN.*\n.*\nTraining has diverged"):
    peft.save(tmp_path, tree)
  assert not list(tmp_path.iterdir())


def test_trees_that_are_not_for_this(tmp_path):
  with pytest.raises(ValueError, match="save: the tree has no adapted leaf"):
    peft.save(tmp_path, params())
  with pytest.raises(ValueError, match=r"load: head/kernel is adapted already"):
    peft.load(tmp_path, adapted(targets="head/kernel"))
  with pytest.raises(ValueError, match="a, b missing: this is one half"):
    peft.save(tmp_path, jaxlora.split(adapted(targets="head/kernel"))[0])


def test_folders_that_are_none(tmp_path):
  for path, message in (
    (tmp_path / "nowhere", "not a folder"),
    (tmp_path, "no adapter_config.json"),
  ):
    with pytest.raises(peft.PeftError, match=message):
      peft.load(path, params())
  write(tmp_path, {"head": (2, 8, 7)})
  (tmp_path / "adapter_model.safetensors").rename(tmp_path / "adapter_model.bin")
  with pytest.raises(peft.PeftError, match=r"adapter_model.bin, a pickle, which can run any code when read"):
    peft.load(tmp_path, params())
