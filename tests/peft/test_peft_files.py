"""PEFT folders without PEFT: round trips, names, errors that list everything, files that anybody may have written."""

import copy
import json
import re
import resource
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("safetensors", reason="PEFT folders are safetensors: jaxlora[peft]")
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import _peft_file, _peft_names, peft

KEY = jax.random.key(0)
PREFIX = "base_model.model."
RANDOM = np.random.default_rng(0)


def normal(*shape, dtype="float32"):
  return jnp.asarray(RANDOM.normal(size=shape).astype(dtype))


def layer():
  return {
    "attn": {
      "query": {"kernel": normal(8, 2, 3), "bias": normal(2, 3)},
      "out": {"kernel": normal(2, 3, 8), "bias": normal(8)},
    },
    "norm": {"scale": normal(8)},
  }


def params():
  return {
    "embed": {"embedding": normal(11, 8)},
    "layers_0": layer(),
    "layers_1": layer(),
    "conv": {"kernel": normal(3, 2, 4, 5)},
    "head": {"kernel": normal(8, 7), "bias": normal(7)},
  }


AXES = {".*query/kernel": "ioo", ".*out/kernel": "iio", "conv/kernel": "iiio"}


def adapted(tree=None, targets=r".*(kernel|embedding)", axes=AXES, **fields):
  """An adapted tree with random factors and trained leaves."""
  paths = [path for path, _ in jaxlora._paths.flatten(tree or params())[0] if re.fullmatch(targets, path)]
  axes = {pattern: roles for pattern, roles in axes.items() if any(re.fullmatch(pattern, path) for path in paths)}
  config = jaxlora.LoraConfig(**{"rank": 2, "targets": targets, "axes": axes, **fields})
  frozen, trainable = jaxlora.split(jaxlora.adapt(tree or params(), config, KEY))
  return jaxlora.join(frozen, jax.tree.map(lambda x: x + normal(*x.shape).astype(x.dtype), trainable))


def assert_equal(found, expected):
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)


# ----------------------------------------------------------------------------------------------------------------------
# Round trips.


@pytest.mark.parametrize(
  "fields",
  [
    {},
    {"alpha": 3.5, "dropout": 0.25},
    {"scaling": "rslora"},
    {"overrides": {".*query.*": {"rank": 4}, "embed.*": {"alpha": 9}, ".*_1/attn/out.*": {"alpha": 0.5, "rank": 1}}},
    {"targets": ".*query/kernel", "train": ["head", "norm"]},
    {"targets": ".*query/kernel", "train": ".*query/bias"},
    {"targets": ".*query/kernel", "train": ".*bias"},
    {"targets": ".*out/kernel", "train": "(conv|layers_1/attn/query)/.*"},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "targets": "head/kernel"},
  ],
  ids=str,
)
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
  tensors = load_file(tmp_path / "adapter_model.safetensors")
  assert len(tensors) == 12
  np.testing.assert_array_equal(
    tensors[f"{PREFIX}model.layers.2.q.lora_B.weight"], np.asarray(tree["layers"]["q"]["kernel"].b[2]).T
  )
  assert_equal(peft.load(tmp_path, base, axes=axes), tree)


def test_layers_with_ranks_and_scales_of_their_own_meet_in_one_stack(tmp_path):
  base = {"layers": {"q": {"kernel": normal(3, 8, 6)}}}
  modules = [
    _peft_file.Module(
      f"model.layers.{k}.q", "linear", RANDOM.normal(size=(rank, 8)), RANDOM.normal(size=(6, rank)), alpha
    )
    for k, rank, alpha in ((0, 2, 3.0), (2, 4, 5.0))
  ]
  _peft_file.write(tmp_path, modules, {})
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
  module = _peft_file.Module("head", "linear", np.ones((2, 8)), np.ones((7, 2)), 2.0)
  _peft_file.write(tmp_path, [module], {})
  assert peft.load(tmp_path, params())["head"]["kernel"].a.dtype == jnp.float32
  with jax.enable_x64(True):
    assert peft.load(tmp_path, params())["head"]["kernel"].a.dtype == jnp.float64


def test_a_base_on_disk_is_merged_tensor_by_tensor(tmp_path):
  """What a merge that streams needs: no tree, no JAX."""
  tree = adapted(targets="(head|conv)/kernel|embed/embedding", train="head/bias", axes=AXES)
  peft.save(tmp_path, tree)
  adapter = _peft_file.read(tmp_path)
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
  _peft_file.write(tmp_path, [_peft_file.Module("h.0.c_proj", "linear", a, b, 2.0)], {})
  adapter = _peft_file.read(tmp_path)
  gpt2 = {"h.0.c_attn.weight": (8, 24), "h.0.c_attn.bias": (24,), "h.0.c_proj.weight": (8, 8)}
  other = {"h.0.c_attn.weight": (24, 8), "h.0.c_attn.bias": (24,), "h.0.c_proj.weight": (8, 8)}
  base = np.zeros((8, 8), np.float32)
  for shapes, expected in ((gpt2, (b @ a).T), (other, b @ a)):
    first = adapter.stores_inputs_first(shapes)
    np.testing.assert_allclose(adapter.merged("h.0.c_proj.weight", base, inputs_first=first), expected, rtol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Names.


@pytest.mark.parametrize(
  ("path", "name"),
  [
    ("h/0/attn/c_attn/kernel", "transformer.h.0.attn.c_attn"),
    ("transformer/h/0/attn/c_attn/kernel", "transformer.h.0.attn.c_attn"),
    ("h_3/ln_1/scale", "transformer.h.3.ln_1"),
    ("wte/embedding", "transformer.wte"),
    ("layers_0/self_attn/q_proj/kernel", "model.layers.0.self_attn.q_proj"),
    ("layers/0/self_attn/q_proj/kernel", "model.layers.0.self_attn.q_proj"),
    ("model/layers/11/mlp/up_proj/kernel", "model.layers.11.mlp.up_proj"),
    ("params/embed_tokens/embedding", "model.embed_tokens"),
    ("lm_head/kernel", "lm_head"),
    ("bert/encoder/layer/1/attention/self/query/kernel", "bert.encoder.layer.1.attention.self.query"),
    ("blocks_2/Dense_0/kernel", "blocks.2.Dense_0"),
  ],
)
def test_names_by_the_habits_of_the_hub(path, name):
  target = _peft_names.default_target(path, 0)
  assert target.module == name
  key = (name, target.parameter)
  assert _peft_names.find_places([key], [path], None) == ({key: _peft_names.Place(path)}, {})


def test_the_index_of_a_scanned_layer_goes_where_the_list_is():
  assert _peft_names.default_target("model/layers/mlp/up/kernel", 1).module == "model.layers.{}.mlp.up"
  assert _peft_names.default_target("layers/experts/w1/kernel", 2).module == "model.layers.{}.experts.{}.w1"
  with pytest.raises(peft.PeftError, match=r"tower/up/kernel: nothing tells where.*names="):
    _peft_names.default_target("tower/up/kernel", 1)


NAMES = {
  r"layers_(\d)/attn/query": r"net.\1.q",
  r"layers_(\d)/attn/(out)": r"net.\1.\2",
  "embed/embedding": "tokens.weight",
  "head/(kernel|bias)": "top",
}


def test_kernels_of_three_axes_are_convolutions_where_the_name_says_so(tmp_path):
  base = {
    "conversation": {"out": {"kernel": normal(2, 3, 8)}},
    "Conv_0": {"kernel": normal(2, 3, 8)},
    "temporal": {"kernel": normal(2, 3, 8)},
  }
  tree = adapted(base, axes={".*": "iio"})
  peft.save(tmp_path, tree, names={"temporal": "time_conv1d"})
  shapes = {name: module.a.shape for name, module in _peft_file.read(tmp_path).modules.items()}
  assert shapes == {"conversation.out": (2, 6), "Conv_0": (2, 3, 2), "time_conv1d": (2, 3, 2)}
  assert_equal(peft.load(tmp_path, base, names={"temporal": "time_conv1d"}), tree)


def test_names_of_ones_own(tmp_path):
  base = params()
  tree = adapted(base, targets=".*(query|out)/kernel|embed.*", train="head/.*")
  peft.save(tmp_path, tree, names=NAMES)
  adapter = _peft_file.read(tmp_path)
  assert sorted(adapter.modules) == ["net.0.out", "net.0.q", "net.1.out", "net.1.q", "tokens"]
  assert sorted(adapter.whole) == ["top.bias", "top.weight"]
  assert_equal(peft.load(tmp_path, base, names=NAMES, axes=AXES), tree)


def test_names_of_scanned_layers_and_of_experts_in_them(tmp_path):
  base = {"tower": {"w": {"kernel": normal(2, 3, 8, 6)}, "norm": {"scale": normal(2, 8)}}}
  names = {"tower/w": "deep.{0}.expert.{1}.w", "tower/norm": "deep.{}.norm"}
  tree = adapted(base, axes={"tower/w.*": "ssio"}, targets="tower/w.*", train="tower/norm/.*")
  peft.save(tmp_path, tree, names=names)
  adapter = _peft_file.read(tmp_path)
  assert "deep.1.expert.2.w" in adapter.modules
  assert "deep.1.norm.weight" in adapter.whole
  assert_equal(peft.load(tmp_path, base, names=names), tree)
  swapped = {**names, "tower/w": "expert.{1}.of.{0}.w"}
  peft.save(tmp_path, tree, names=swapped)
  assert "expert.2.of.1.w" in _peft_file.read(tmp_path).modules
  assert_equal(peft.load(tmp_path, base, names=swapped), tree)


@pytest.mark.parametrize(
  ("names", "error", "message"),
  [
    ({"queery/.*": "q"}, peft.PeftError, r"'queery/\.\*' matches none of the \d+ leaves .*Nearest: .*query"),
    ({"(": "q"}, ValueError, "is not a regular expression"),
    ({"head": r"\3"}, ValueError, r"names\['head'\]: .* is no template"),
    (["head"], TypeError, "expected a dict of regexes"),
    ({"layers_(.)/attn/query": "q"}, peft.PeftError, "q: several leaves have this name in torch"),
    ({"head": "top.{}"}, peft.PeftError, "roles 'io' have 0 stacked axes, but names gives 'top.{}' with 1"),
  ],
)
def test_names_that_do_not_fit_are_errors(names, error, message, tmp_path):
  with pytest.raises(error, match=message):
    peft.save(tmp_path, adapted(), names=names)
  assert not list(tmp_path.iterdir())


def test_a_name_that_may_be_several_leaves_is_an_error(tmp_path):
  write(tmp_path, {"q": (2, 8, 6)})
  base = {"one": {"q": {"kernel": normal(8, 6)}}, "two": {"q": {"kernel": normal(8, 6)}}}
  with pytest.raises(peft.PeftError, match=r"q.weight: may be any of one/q/kernel, two/q/kernel\. Say which by names="):
    peft.load(tmp_path, base)
  assert isinstance(peft.load(tmp_path, base, names={"two/q": "q"})["two"]["q"]["kernel"], jaxlora.LoraWeight)


def test_two_names_for_one_leaf_are_an_error(tmp_path):
  write(tmp_path, {"layers_0.q": (2, 8, 6), "layers.0.q": (2, 8, 6)})
  with pytest.raises(
    peft.PeftError, match=r"layers_0/q/kernel: layers.0.q.weight, layers_0.q.weight all have its name"
  ):
    peft.load(tmp_path, {"layers_0": {"q": {"kernel": normal(8, 6)}}})


def test_models_of_many_layers_meet():
  paths = [f"layers_{k}/self_attn/q_proj/kernel" for k in range(300)]
  wanted = [(f"base.layers.{k}.self_attn.q_proj", "weight") for k in range(300)]
  places, problems = _peft_names.find_places(wanted, paths, None)
  assert [places[key].path for key in wanted] == paths
  assert not problems


def test_very_many_strange_names_do_not_take_for_ever():
  paths = [f"layers_{k}/q/kernel" for k in range(300)]
  wanted = [(f"m{k % 997}.{k}.1.2.3.4.5.6.7.q", "weight") for k in range(20_000)]
  start = time.perf_counter()
  _, problems = _peft_names.find_places(wanted, paths, None)
  assert len(problems) == 20_000
  assert time.perf_counter() - start < 30


def test_exact_names_win_over_likely_ones(tmp_path):
  write(tmp_path, {"head": (2, 8, 6), "model.tower.q": (2, 8, 6)})
  base = {"head": normal(8, 6), "model": {"head": normal(8, 6)}, "tower": {"q": normal(8, 6)}}
  loaded = peft.load(tmp_path, base)
  assert [leaf.path for leaf in jaxlora.summary(loaded).leaves] == ["head", "tower/q"]


def test_targets_pick_what_is_adapted_and_nothing_else():
  known = ["h.0.attn.c_proj", "h.1.attn.c_proj", "h.0.mlp.c_proj", "h.1.mlp.c_proj", "c_attn", "x.c_attn"]

  def picked(adapted):
    targets = _peft_file.target_modules(adapted, known, [], complete=True)
    if isinstance(targets, str):
      return targets, [name for name in known if re.fullmatch(targets, name)]
    return targets, [name for name in known if any(name == t or name.endswith(f".{t}") for t in targets)]

  assert picked(known[:4]) == (["c_proj"], known[:4])
  assert picked(known[:2]) == (["attn.c_proj"], known[:2])
  assert picked(known[1:2]) == (["1.attn.c_proj"], known[1:2])
  assert picked(["x.c_attn"]) == (["x.c_attn"], ["x.c_attn"])
  assert picked(["c_attn"]) == ("c_attn", ["c_attn"])


# ----------------------------------------------------------------------------------------------------------------------
# Errors.


def write(folder, modules, whole=None, **config):
  """A folder with random factors: name -> (rank, in, out)."""
  records = [
    _peft_file.Module(
      name,
      "linear",
      RANDOM.normal(size=(r, i)).astype("float32"),
      RANDOM.normal(size=(o, r)).astype("float32"),
      float(r),
    )
    for name, (r, i, o) in modules.items()
  ]
  _peft_file.write(folder, records, whole or {})
  edit(folder, **config)


def edit(folder, tensors=None, **config):
  """Changes a folder: tensors (`None` takes one out) and fields of the configuration."""
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | config))
  if tensors:
    path = folder / "adapter_model.safetensors"
    save_file({k: v for k, v in (load_file(path) | tensors).items() if v is not None}, path)


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
    "lora_alpha: found '16', expected a finite number above 0",
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
  assert peft.load(tmp_path, base, names={"layers_0/attn/out": "elsewhere.out"})
  edit(tmp_path, layers_to_transform=[0, 1, 2])
  assert peft.load(tmp_path, base)
  write(tmp_path, {name: shapes[name] for name in list(shapes)[:2]}, target_modules=["up"])
  with pytest.raises(
    peft.PeftError, match="layers/up/kernel: target_modules names 'up', but the file holds 2 of 3 layers"
  ):
    peft.load(tmp_path, base)


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
  adapter = _peft_file.read(tmp_path)
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
  with pytest.raises(peft.PeftError) as caught:
    peft.load(tmp_path, base)
  assert "stored as (out, in), say axes={pattern: 'oi'} or probe=" in str(caught.value)
  assert "the tree stores other matrices as (out, in), and a square one does not tell" in str(caught.value)


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
  assert sorted(_peft_file.read(tmp_path).whole) == ["head.weight", "pre_head.weight"]  # PEFT saves both by this name
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


# ----------------------------------------------------------------------------------------------------------------------
# Files that anybody may have written.


@pytest.mark.parametrize(
  "pattern",
  ["(a+)+", "(a|a)*b", "(.*)*", "((a|b)|(a|b))+", ".*.*.*.*.*.*x", "(a|a)" * 40, r"(a)\1", "(?=a)", "a{1000}",
   "x" * 9999, "a**", "[a-z]+" * 9, "(?:a?)" * 60, "\\"],
)  # fmt: skip
def test_patterns_that_could_take_for_ever_are_refused(pattern, tmp_path):
  write(tmp_path, {"a" * 400: (2, 8, 7)}, alpha_pattern={pattern: 3})
  start = time.perf_counter()
  with pytest.raises(peft.PeftError, match="is no pattern that is read here"):
    peft.load(tmp_path, params())
  assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
  "pattern",
  [
    "head",
    "^head$",
    r"net\.head",
    "net.head",
    ".*head",
    r"net\..*\.?head",
    "(foo|head)",
    "he[a-d]+",
    "(?:net.)?head",
    r"\w+",
  ],
)
def test_patterns_as_peft_has_them(pattern):
  regex, _ = _peft_file.compile_suffix(pattern, 60)
  for name in ("head", "net.head", "foo", "a.b.head", "xhead", "head.x"):
    assert bool(regex.match(name)) == bool(re.match(rf"(.*\.)?({pattern})$", name)), name


def junk(random):
  return random.choice(
    [
      None,
      True,
      -1,
      0,
      3,
      2.5,
      10**30,
      1e308,
      "",
      "head",
      "(a+)+",
      [],
      [1],
      ["head"],
      {},
      {"head": 4},
      {"": {}},
      [[[]]],
    ]
  )


def corrupt_json(random, text):
  """A configuration with some of it replaced, by structure or by bytes."""
  if random.random() < 0.5:
    config = json.loads(text)
    for _ in range(random.randint(1, 3)):
      field = random.choice([*config, "lora_bias", "exclude_modules", "trainable_token_indices"])
      config[field] = junk(random)
      if random.random() < 0.2:
        del config[field]
    return json.dumps(config).encode()
  return corrupt_bytes(random, text)


def corrupt_bytes(random, data):
  data = bytearray(data)
  for _ in range(random.randint(1, 4)):
    where = random.randrange(len(data) + 1)
    kind = random.random()
    if kind < 0.4 and where < len(data):
      data[where] = random.randrange(256)
    elif kind < 0.6:
      del data[where : where + random.randint(1, 40)]
    elif kind < 0.8:
      data[where:where] = bytes(random.randrange(256) for _ in range(random.randint(1, 8)))
    else:
      data = data[:where]
  return bytes(data)


def corrupt_tensors(random, data):
  """A safetensors file with some of its header replaced, by structure or by bytes."""
  if random.random() < 0.4:
    return corrupt_bytes(random, data)
  length = int.from_bytes(data[:8], "little")
  header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
  for _ in range(random.randint(1, 2)):
    name = random.choice(list(header))
    entry = header[name] if isinstance(header[name], dict) else {}
    kind = random.randrange(6)
    if kind == 0:
      entry["shape"] = random.choice(
        [[2**62, 2**62], [10**18], [-1, 8], [0, 10**18], [2**63 - 1], [], "x", [1.5], None]
      )
    elif kind == 1:
      entry["dtype"] = random.choice(["F64", "BF16", "I64", "BOOL", "F8_E4M3", "F4", "C64", "Z9", 3, None])
    elif kind == 2:
      entry["data_offsets"] = random.choice([[0, 2**63], [2**64, 1], [-4, 60], [8, 4], [0], "x", None, [0, len(body)]])
    elif kind == 3:
      header[random.choice(["head.lora_A.weight", f"{PREFIX}x.lora_A.weight", "", "\0", f"{PREFIX}.lora_A.weight"])] = (
        header.pop(name)
      )
    elif kind == 4:
      header[name] = junk(random)
    else:
      header[f"{name}2"] = copy.deepcopy(entry)
  text = json.dumps(header).encode()
  size = len(text) if random.random() < 0.8 else random.choice([0, 1, 2**31, 2**63, 2**64 - 1, len(text) - 1])
  return size.to_bytes(8, "little") + text + body


def test_corrupted_folders_give_one_kind_of_error(tmp_path):
  """Thousands of them: no crash, no other error, no memory beyond the file's."""
  import random as randomness

  random = randomness.Random(0)
  base = {"head": {"kernel": jnp.ones((8, 7)), "bias": jnp.ones(7)}, "pre": {"kernel": jnp.ones((8, 8))}}
  base["norm"] = {"scale": jnp.ones(8)}
  write(
    tmp_path,
    {"head": (2, 8, 7), "pre": (3, 8, 8)},
    {"head.bias": np.ones(7, np.float32), "norm.weight": 2 * np.ones(8, np.float32)},
  )
  good = {name: (tmp_path / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
  peft.load(tmp_path, base)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
  outcomes, longest = {"loaded": 0, "refused": 0}, 0
  start = time.perf_counter()
  for name, corrupt in (("adapter_config.json", corrupt_json), ("adapter_model.safetensors", corrupt_tensors)):
    for _ in range(2000):
      (tmp_path / name).write_bytes(corrupt(random, good[name]))
      try:
        peft.load(tmp_path, base)
        outcomes["loaded"] += 1
      except peft.PeftError as error:
        outcomes["refused"] += 1
        longest = max(longest, len(str(error)))
    (tmp_path / name).write_bytes(good[name])
  assert longest < 10_000
  assert outcomes["refused"] > 2500, outcomes
  assert outcomes["loaded"] > 100, outcomes
  assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB
  assert time.perf_counter() - start < 120


def test_deep_and_large_configurations(tmp_path):
  write(tmp_path, {"head": (2, 8, 7)})
  path = tmp_path / "adapter_config.json"
  for text in ("[" * 200_000, '{"r":' * 100_000, "[]", "null", "1" * 10_000, '{"r": ' + "9" * 10_000 + "}", "\xff" * 9):
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(peft.PeftError):
      peft.load(tmp_path, params())
  with path.open("wb") as file:
    file.truncate(1 << 30)  # sparse: it takes no room
  with pytest.raises(peft.PeftError, match="expected a configuration of at most"):
    peft.load(tmp_path, params())
