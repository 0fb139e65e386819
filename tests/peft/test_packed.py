"""`target_parameters`: one parameter of all experts in torch, a stack of experts here."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import peft
from jaxlora.peft._read import read
from tests import helpers
from tests.peft.folders import assert_equal, edit, normal

EXPERTS, WIDTH, INNER, RANK = 3, 4, 5, 2
ROOT = "model.layers.0.mlp.experts"
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SHAPES = {"gate_up_proj": (WIDTH, 2 * INNER), "down_proj": (INNER, WIDTH)}  # (in, out)


def base(shapes=None, dtype="float32"):
  experts = {name: {"kernel": normal(EXPERTS, *shape, dtype=dtype)} for name, shape in (shapes or SHAPES).items()}
  return {"model": {"layers": {"0": {"mlp": {"experts": experts}}}}}


def experts_of(tree):
  return tree["model"]["layers"]["0"]["mlp"]["experts"]


def packed_factors(ins, outs, swapped=False):
  """PEFT's factors of a parameter, and the update (experts, in, out), by PEFT's own sum."""
  a, b = normal(EXPERTS * RANK, outs if swapped else ins), normal(ins if swapped else outs, EXPERTS * RANK)
  stack_a, stack_b = np.reshape(a, (EXPERTS, RANK, -1)), np.reshape(b, (len(b), RANK, EXPERTS))
  return np.asarray(a), np.asarray(b), np.einsum("ore,eri->eoi" if swapped else "ore,eri->eio", stack_b, stack_a)


def write(folder, shapes=None, names=("gate_up_proj", "down_proj"), swapped=False, **config):
  """A folder as PEFT writes it, the first parameter innermost; returns the updates by parameter."""
  tensors, updates = {}, {}
  for k, name in enumerate(names):
    a, b, updates[name] = packed_factors(*(shapes or SHAPES)[name], swapped)
    key = f"base_model.model.{ROOT}{'.base_layer' * (len(names) - 1 - k)}"
    tensors |= {f"{key}.lora_A.weight": a, f"{key}.lora_B.weight": b}
  save_file(tensors, folder / "adapter_model.safetensors")
  fields = {"peft_type": "LORA", "r": RANK, "lora_alpha": 2 * RANK, "target_modules": []}
  fields |= {"target_parameters": [f"mlp.experts.{name}" for name in names]}
  (folder / "adapter_config.json").write_text(json.dumps(fields | config))
  return {name: 2 * update for name, update in updates.items()}


def assert_updated(tree, params, updates):
  for name, update in updates.items():
    node = experts_of(tree)[name]["kernel"]
    assert isinstance(node, jaxlora.LoraWeight)
    found = np.asarray(node.materialize()) - np.asarray(experts_of(params)[name]["kernel"])
    np.testing.assert_allclose(found, update, rtol=1e-5, atol=1e-5)


SQUARE = {"gate_up_proj": (WIDTH, 2 * WIDTH), "down_proj": (WIDTH, WIDTH)}


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(
  ("shapes", "names"),
  [
    (SHAPES, ("gate_up_proj", "down_proj")),
    (SQUARE, ("gate_up_proj", "down_proj")),
    (SQUARE, ("gate_up_proj",)),
    (SHAPES, ("down_proj",)),
  ],
)
def test_packed_experts_load_onto_a_stack_of_them(shapes, names, swapped, tmp_path):
  updates = write(tmp_path, shapes, names, swapped)
  params = base(shapes)
  tree = peft.load(tmp_path, params)
  assert_updated(tree, params, updates)
  nodes = helpers.lora_weights(tree)
  assert {(node.roles, node.rank, node.scale) for node in nodes} == {("sio", RANK, 2.0)}


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("gate_up_proj",), ("down_proj",)])
def test_what_is_loaded_is_written_as_it_was(names, tmp_path):
  write(tmp_path, names=names)
  tree = peft.load(tmp_path, base())
  peft.save(tmp_path / "again", tree)
  found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", tmp_path))
  assert found.keys() == expected.keys()
  for key in found:
    np.testing.assert_array_equal(found[key], expected[key])
  config = json.loads((tmp_path / "again" / "adapter_config.json").read_text())
  assert config["target_parameters"] == sorted(f"experts.{name}" for name in names)
  assert config["target_modules"] == []
  loaded = peft.load(tmp_path / "again", jaxlora.strip(tree))
  assert_equal(loaded, tree)


def test_scanned_layers_of_experts_ranks_that_differ_and_names_of_ones_own(tmp_path):
  params = {"blocks": {"w1": normal(2, EXPERTS, WIDTH, 6), "w2": normal(2, EXPERTS, 6, WIDTH)}, "q": normal(4, 4)}
  names = {"blocks/w1": peft.Experts("net.{}.moe.gate_up_proj"), "blocks/w2": peft.Experts("net.{}.moe.down_proj")}
  tree = helpers.adapted(
    params, targets=".*", axes={".*w.": "ssio", "q": "io"}, overrides={".*w2": {"rank": 3, "alpha": 1}}
  )
  peft.save(tmp_path, tree, names=names)
  config = json.loads((tmp_path / "adapter_config.json").read_text())
  assert config["target_parameters"] == ["moe.down_proj", "moe.gate_up_proj"]
  assert list(config["rank_pattern"].values()) == [3]
  found = load_file(tmp_path / "adapter_model.safetensors")
  w2 = np.asarray(tree["blocks"]["w2"].b)
  np.testing.assert_array_equal(
    found["base_model.model.net.1.moe.lora_B.weight"], w2[1].transpose(2, 1, 0).reshape(WIDTH, -1)
  )
  assert_equal(peft.load(tmp_path, params, names=names, axes={".*w.": "ssio", "q": "io"}), tree)


def test_gate_and_up_of_their_own_are_joined_in_the_parameter(tmp_path):
  updates = write(tmp_path)
  experts = {name: {"kernel": normal(EXPERTS, WIDTH, INNER)} for name in ("wi_0", "wi_1")}
  params = {"layer_0": experts | {"wo": {"kernel": normal(EXPERTS, INNER, WIDTH)}}}
  names = {
    r"layer_(\d)/wi_.": peft.Joined(r"model.layers.\1.mlp.experts.{}.gate_up_proj", ("wi_0", "wi_1")),
    r"layer_(\d)/wo": peft.Experts(r"model.layers.\1.mlp.experts.down_proj"),
  }
  tree = peft.load(tmp_path, params, names=names)
  found = [np.asarray(tree["layer_0"][n]["kernel"].materialize() - params["layer_0"][n]["kernel"]) for n in experts]
  np.testing.assert_allclose(np.concatenate(found, -1), updates["gate_up_proj"], rtol=1e-5, atol=1e-5)
  peft.save(tmp_path / "again", tree, names=names)
  expected, again = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, tmp_path / "again"))
  assert expected.keys() == again.keys()
  for key in expected:
    np.testing.assert_array_equal(again[key], expected[key])


def test_experts_that_are_modules_of_their_own_stay_so(tmp_path):
  shapes = {"gate_proj": (WIDTH, INNER), "down_proj": (INNER, WIDTH)}
  tree = helpers.adapted(base(shapes), targets=".*", axes={".*": "sio"})
  peft.save(tmp_path, tree)
  assert f"{ROOT}.2.down_proj" in read(tmp_path).modules
  assert "target_parameters" not in json.loads((tmp_path / "adapter_config.json").read_text())


def test_a_square_parameter_alone_does_not_tell_its_inputs(tmp_path):
  write(tmp_path, SQUARE, ("down_proj",))
  with pytest.raises(peft.PeftError, match=r"down_proj.*does not tell which; say axes=.*merge_and_unload"):
    peft.load(tmp_path, base(SQUARE))


def test_axes_tell_the_inputs_of_a_parameter_alone(tmp_path):
  updates = write(tmp_path, names=("down_proj",))
  params = {"w2": normal(EXPERTS, INNER, WIDTH)}
  names = {"w2": peft.Experts(f"{ROOT}.down_proj")}
  with pytest.raises(peft.PeftError, match=r"w2 .*say axes="):
    peft.load(tmp_path, params, names=names)
  tree = peft.load(tmp_path, params, names=names, axes={"w2": "sio"})
  found = np.asarray(tree["w2"].materialize() - params["w2"])
  np.testing.assert_allclose(found, updates["down_proj"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("inputs_first", [True, False])
@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("shapes", [SHAPES, SQUARE], ids=["", "square"])
def test_merged_into_torchs_parameter(shapes, inputs_first, swapped, tmp_path):
  updates = write(tmp_path, shapes, swapped=swapped)
  adapter = read(tmp_path)
  values = {f"{ROOT}.{name}": np.asarray(normal(EXPERTS, *shape)) for name, shape in shapes.items()}
  if not inputs_first:
    values = {name: value.transpose(0, 2, 1) for name, value in values.items()}
  held = {name: value.shape for name, value in values.items()}
  for name, value in values.items():
    first = adapter.stores_experts_inputs_first(name, held)
    update = updates[name.rpartition(".")[2]]
    expected = value + (update if inputs_first else update.transpose(0, 2, 1))
    np.testing.assert_allclose(adapter.merged(name, value, inputs_first=first), expected, rtol=1e-5, atol=1e-5)
  with pytest.raises(peft.PeftError, match="It is another model's"):
    adapter.merged(name, np.ones((EXPERTS, 2, 2), np.float32))


def test_a_square_parameter_merged_without_knowing_how_it_is_stored(tmp_path):
  write(tmp_path, SQUARE)
  with pytest.raises(peft.PeftError, match="does not tell whether its experts are"):
    read(tmp_path).merged(f"{ROOT}.down_proj", np.ones((EXPERTS, WIDTH, WIDTH), np.float32))


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"target_parameters": "experts"}, "target_parameters: found 'experts', expected a list of names"),
    ({"r": 4}, r"gate_up_proj: lora_A has 6 rows, which are no whole number of experts of rank 4"),
    ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "names gate_up_proj of it, the file holds factors for 2"),
    ({"target_parameters": ["mlp.experts.w1", "mlp.experts.w2"]}, "nothing tells which of its 2 factors"),
  ],
)
def test_what_does_not_fit_is_an_error(changes, message, tmp_path):
  write(tmp_path)
  edit(tmp_path, **changes)
  with pytest.raises(peft.PeftError, match=message):
    peft.load(tmp_path, base())


def test_dora_and_whole_experts_are_refused(tmp_path):
  tree = helpers.adapted(base(), targets=".*", axes={".*": "sio"}, variant="dora")
  with pytest.raises(peft.PeftError, match="gate_up_proj: PEFT has no DoRA on parameters"):
    peft.save(tmp_path, tree)
  axes = {".*gate_up_proj/kernel": "sio"}
  tree = helpers.adapted(base(), targets=".*gate_up_proj/kernel", axes=axes, train=["down_proj"])
  with pytest.raises(peft.PeftError, match=r"PEFT saves no expert of .*down_proj whole"):
    peft.save(tmp_path, tree)
  assert not list(tmp_path.iterdir())


def test_the_trainable_half_is_packed_alike(tmp_path):
  tree = helpers.adapted(base(), targets=".*", axes={".*": "sio"})
  _, half = jaxlora.split(tree)
  peft.save(tmp_path, half)
  assert sorted(read(tmp_path).packed) == [f"{ROOT}.down_proj", f"{ROOT}.gate_up_proj"]
  assert_equal(peft.load(tmp_path, jaxlora.strip(tree), axes={".*": "sio"}), tree)
