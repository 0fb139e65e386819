"""Weights stored (out, in), stacks whose axis does not lead: what tells, and what is refused where nothing does."""

import equinox as eqx
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import peft
from tests.helpers import adapted, array


def normal(*shape, seed=0):
  return array(seed + sum(shape), shape, jnp.float32)


def linear(name, ins, outs, seed=1, rank=2):
  a, b = (np.asarray(normal(*shape, seed=seed)) for shape in ((rank, ins), (outs, rank)))
  return peft.Module(name, "linear", a, b, alpha=3.0)


def loaded(params, *modules, whole=None, **options):
  adapter = peft.Adapter({module.name: module for module in modules}, whole or {}, bases={}, config={})
  return peft.from_modules(adapter, params, **options)


def update(node):
  return np.asarray(jaxlora.merge(node)) - np.asarray(node.base)


def close(x, y):
  np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5)


BESIDE = {
  "a habit of names": {},
  "a bias": {"up": {"weight": normal(6, 8), "bias": normal(6)}},
}


@pytest.mark.parametrize("beside", BESIDE)
def test_a_square_weight_is_out_in_by_what_is_beside_it(beside):
  params = {"q": {"weight": normal(8, 8)}, **BESIDE[beside]}
  module = linear("q", 8, 8)
  tree = loaded(params, module)
  close(update(tree["q"]["weight"]), module.delta())  # (out, in) both
  close(peft.to_modules(tree).modules["q"].delta(), module.delta())


def test_a_square_weight_is_in_out_where_those_beside_it_are():
  params = {"c_attn": {"weight": normal(8, 24), "bias": normal(24)}, "c_proj": {"weight": normal(8, 8)}}
  module = linear("c_proj", 8, 8)
  tree = loaded(params, module)
  close(update(tree["c_proj"]["weight"]), module.delta().T)


@pytest.mark.parametrize("name", ["weight", "w", "other"])
@pytest.mark.parametrize("shape", [(12, 4), (4, 12)])
def test_a_weight_that_is_not_square_is_told_by_its_adapter_and_tells_of_the_square_ones(name, shape):
  params = {"up": {name: normal(*shape)}, "q": {name: normal(8, 8)}}
  up, q = linear("up", 4, 12), linear("q", 8, 8)
  given = None if name != "other" else {"up/other": "up.weight", "q/other": "q.weight"}
  tree = loaded(params, up, q, names=given)
  outputs_first = shape[0] == 12
  for module, node in ((up, tree["up"][name]), (q, tree["q"][name])):
    close(update(node), module.delta() if outputs_first else module.delta().T)
  assert tree["up"][name].sure
  assert not tree["q"][name].sure


def test_equinox_modules_there_and_back():
  keys = jax.random.split(jax.random.key(0), 2)
  params = {"layers": [{"q": eqx.nn.Linear(8, 8, key=keys[0])}, {"table": eqx.nn.Embedding(11, 8, key=keys[1])}]}
  tree = adapted(params, targets=".*weight")
  modules = peft.to_modules(tree).modules
  close(modules["model.layers.0.q"].delta(), update(tree["layers"][0]["q"].weight))
  assert modules["model.layers.1.table"].kind == "embedding"
  again = peft.from_modules(peft.to_modules(tree), params)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  jax.tree.map(close, again, tree)


def test_a_save_without_evidence_is_refused_and_every_remedy_works():
  params, x = {"q": {"other": normal(8, 8)}}, normal(3, 8)
  names = {"q/other": "q.weight"}
  use = lambda p: x @ p["q"]["other"].T
  tree = adapted(params, targets=".*")
  with pytest.raises(
    peft.PeftError, match=r"q/other: roles 'io' were taken without evidence.*\n?.*axes=.*or adapt with probe="
  ):
    peft.to_modules(tree, names=names)
  true = update(tree["q"]["other"])  # (out, in), as `use` has it
  for half in (tree, jaxlora.split(tree)[1]):
    close(peft.to_modules(half, names=names, axes={"q/other": "oi"}).modules["q"].delta(), true)
    close(peft.to_modules(half, names=names, axes={"q/other": "io"}).modules["q"].delta(), true.T)
  for remedy in ({"axes": {"q/other": "oi"}}, {"probe": use}):
    tree = adapted(params, targets=".*", **remedy)
    close(peft.to_modules(tree, names=names).modules["q"].delta(), update(tree["q"]["other"]))


@pytest.mark.parametrize("variant", ["dora", "lora"])
def test_axes_that_contradict_an_adapted_leaf_are_refused(variant):
  known = {"axes": {".*": "io"}} if variant == "lora" else {}
  tree = adapted({"q": {"other": normal(8, 8)}}, targets=".*", variant=variant, **known)
  names, axes = {"q/other": "q.weight"}, {"q/.*": "oi"}
  with pytest.raises(peft.PeftError, match="axes says 'oi', and the leaf is adapted with roles 'io'"):
    peft.to_modules(tree, names=names, axes=axes)


def test_a_load_without_evidence_is_refused_and_every_remedy_works():
  params, module = {"q": {"other": normal(8, 8)}}, linear("q", 8, 8)
  names = {"q/other": "q.weight"}
  with pytest.raises(peft.PeftError, match="a square one does not tell; say axes= or probe="):
    loaded(params, module, names=names)
  for remedy in ({"axes": {"q/other": "oi"}}, {"probe": lambda p: p["q"]["other"] @ jnp.ones(8)}):
    close(update(loaded(params, module, names=names, **remedy)["q"]["other"]), module.delta())


def test_a_loaded_guess_that_the_function_contradicts_is_an_error():
  tree = loaded({"q": {"weight": normal(8, 8)}}, linear("q", 8, 8))
  with pytest.raises(ValueError, match="q/weight: roles 'oi' of shape"):
    jaxlora.wrap(lambda p, x: x @ p["q"]["weight"])(tree, normal(3, 8))


def test_a_kernel_with_heads_that_fits_both_ways_is_checked_by_the_function():
  """(heads, width, features) of a projection to heads, which is (out, in): the adapter fits (in, out) as well."""
  params, x = {"q_proj": {"kernel": normal(2, 4, 8)}}, normal(3, 8)
  tree = loaded(params, linear("q_proj", 8, 8))
  use = lambda p, x: jnp.einsum("bd,hkd->bhk", x, p["q_proj"]["kernel"])
  with pytest.raises(ValueError, match="q_proj/kernel: roles 'iio' of shape"):
    jaxlora.wrap(use)(tree, x)
  tree = loaded(params, linear("q_proj", 8, 8), axes={".*": "ooi"})  # the remedy
  close(jaxlora.wrap(use)(tree, x), use(jaxlora.merge(tree), x))
  out = loaded({"o_proj": params["q_proj"]}, linear("o_proj", 8, 8))
  jaxlora.wrap(lambda p, x: jnp.einsum("bhk,hkd->bd", x, p["o_proj"]["kernel"]))(out, normal(3, 2, 4))
  for shape, name in (((8, 2, 4), "q_proj"), ((2, 4, 8), "o_proj")):  # Flax' own layouts
    tree = loaded({name: {"kernel": normal(*shape)}}, module := linear(name, 8, 8))
    close(peft.to_modules(tree).modules[name].delta(), module.delta())


@pytest.mark.parametrize("name", ["weight", "kernel"])
def test_whole_weights_in_both_layouts(name):
  square, wide = normal(8, 8), normal(12, 4)
  params = {"q": {name: jnp.zeros((8, 8))}, "up": {name: jnp.zeros((12, 4) if name == "weight" else (4, 12))}}
  params["wpe"] = {"weight": jnp.zeros((11, 8))}
  table = normal(11, 8)
  tensors = {"q.weight": np.asarray(square), "up.weight": np.asarray(wide), "wpe.weight": np.asarray(table)}
  tree = loaded(params, whole=tensors)
  turned = (lambda x: x) if name == "weight" else (lambda x: x.T)
  close(tree["q"][name].value, turned(square))
  close(tree["up"][name].value, turned(wide))
  close(tree["wpe"]["weight"].value, table)
  saved = peft.to_modules(tree, names={"wpe": "wpe"}).whole
  assert saved.keys() == tensors.keys()
  jax.tree.map(close, saved, tensors)


def block(attention, mlp):
  """A block whose modules are called as GPT-2's: the outputs of `c_attn`, and the names of its MLP."""
  shapes = {"attn": {"c_attn": (8, attention), "c_proj": (8, 8)}, "mlp": {mlp: (8, 12), "c_proj": (12, 8)}}
  leaf = lambda shape: {"kernel": jnp.zeros(shape), "bias": jnp.zeros(shape[1])}
  return {"h": {"0": jax.tree.map(leaf, shapes, is_leaf=lambda x: isinstance(x, tuple))}}


BLOCKS = {  # and whether torch has them as GPT-2's Conv1D: (in, out)
  "GPT-2": (block(24, "c_fc"), True),
  "GPT-BigCode": (block(12, "c_fc"), False),  # one head of keys and values
  "Qwen": (block(24, "w1"), False),
}


@pytest.mark.parametrize("model", BLOCKS)
@pytest.mark.parametrize("said", ["by the tree", "by the configuration", "by a bias"])
def test_square_weights_of_modules_called_as_gpt2s(model, said):
  params, inputs_first = BLOCKS[model]
  square, bias = np.asarray(normal(8, 8)), np.asarray(normal(8))
  torch = square.T if inputs_first else square  # `square` is (out, in)
  tree = jax.tree.map(lambda x: x, params)
  own = "transformer.h.0.attn.c_proj"
  tensors = {f"{own}.weight": torch, f"{own}.bias": bias}
  config, modules = {}, {}
  if said == "by the configuration":  # PEFT sets it where it finds a Conv1D
    config = {"fan_in_fan_out": inputs_first}
    modules = {name: linear(name, 8, 12) for name in ["transformer.h.0.mlp.c_fc"]} if model != "Qwen" else {}
    modules |= {name: linear(name, 8, 24) for name in ["transformer.h.0.attn.c_attn"] if model == "Qwen"}
  if said == "by a bias":
    wide = np.asarray(normal(12, 8) if inputs_first else normal(8, 12))
    tensors |= {"transformer.h.0.mlp.c_proj.weight": wide, "transformer.h.0.mlp.c_proj.bias": bias}
  loaded = peft.from_modules(peft.Adapter(modules, tensors, {}, config), tree)
  close(loaded["h"]["0"]["attn"]["c_proj"]["kernel"].value, square.T)
  back = peft.to_modules(loaded)
  jax.tree.map(close, back.whole, tensors)
  assert back.config["fan_in_fan_out"] == bool(modules and inputs_first)


# ----------------------------------------------------------------------------------------------------------------------
# Stacked axes that do not lead.

NAMES = {r"dec/layers/(\w+)": r"model.layers.{}.\1"}
LAYERS, WIDTH = 3, 8


def scanned(axis, layers=LAYERS):
  stack = lambda *shape: jnp.stack([normal(*shape, seed=k) for k in range(layers)], axis)
  return {
    "dec": {"layers": {
      "q": {"kernel": stack(WIDTH, 2, 4)},
      "up": {"kernel": stack(WIDTH, 12)},
      "norm": {"scale": stack(WIDTH)},
    }}
  }  # fmt: skip


def stacked_roles(axis, own):
  return own[:axis] + "s" + own[axis:]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("layers", [LAYERS, WIDTH])
def test_what_is_trained_whole_is_cut_along_the_axis_of_its_scanned_module(axis, layers):
  params = scanned(axis, layers)
  axes = {".*q/kernel": stacked_roles(axis, "ioo")}
  tree = adapted(params, targets=["q"], train=["norm", "up"], axes=axes)
  if layers == WIDTH:  # sizes do not tell the norm's axes apart, the roles of the kernel do
    assert params["dec"]["layers"]["norm"]["scale"].shape == (WIDTH, WIDTH)
  adapter = peft.to_modules(tree, names=NAMES)
  for k in range(layers):
    leaf = lambda name, kind: jnp.take(tree["dec"]["layers"][name][kind].value, k, axis)
    close(adapter.whole[f"model.layers.{k}.norm.weight"], leaf("norm", "scale"))
    close(adapter.whole[f"model.layers.{k}.up.weight"], leaf("up", "kernel").T)
  assert len(adapter.whole) == 2 * layers
  again = peft.from_modules(adapter, params, names=NAMES, axes=axes)
  jax.tree.map(close, again, tree)


@pytest.mark.parametrize("axis", [0, 1])
def test_loading_finds_the_axis_by_what_fits(axis):
  params = scanned(axis)
  modules = [
    linear(f"model.layers.{k}.{name}", WIDTH, n, seed=k) for k in range(LAYERS) for name, n in (("q", 8), ("up", 12))
  ]
  whole = {f"model.layers.{k}.norm.weight": np.asarray(normal(WIDTH, seed=20 + k)) for k in range(LAYERS)}
  tree = loaded(params, *modules, whole=whole, names=NAMES)["dec"]["layers"]
  assert tree["q"]["kernel"].roles == stacked_roles(axis, "ioo")
  for k in range(LAYERS):
    close(jnp.take(update(tree["q"]["kernel"]), k, axis).reshape(WIDTH, 8), modules[2 * k].delta().T)
    close(jnp.take(update(tree["up"]["kernel"]), k, axis), modules[2 * k + 1].delta().T)
    close(jnp.take(tree["norm"]["scale"].value, k, axis), whole[f"model.layers.{k}.norm.weight"])


@pytest.mark.parametrize("axis", [0, 1])
def test_more_layers_than_the_tree_has_are_refused(axis):
  modules = [linear(f"model.layers.{k}.up", WIDTH, 12, seed=k) for k in range(LAYERS + 1)]
  with pytest.raises(
    peft.PeftError,
    match=r"up/kernel \(model.layers.3.up\): shape .* has no axis for weights \(12, 8\) of the layers up to 3",
  ):
    loaded(scanned(axis), *modules, names=NAMES)


def test_sizes_that_do_not_tell_are_refused_and_axes_is_the_remedy():
  whole = {f"model.layers.{k}.norm.weight": np.asarray(normal(WIDTH, seed=k)) for k in range(WIDTH)}
  params = {"dec": {"layers": {"norm": {"scale": jnp.zeros((WIDTH, WIDTH))}}}}
  with pytest.raises(
    peft.PeftError, match=r"norm/scale: nothing tells which axis of shape \(8, 8\) is that of the layers"
  ):
    loaded(params, whole=whole, names=NAMES)
  for roles, axis in (("os", 1), ("so", 0)):
    tree = loaded(params, whole=whole, names=NAMES, axes={"dec/layers/norm/scale": roles})
    close(jnp.take(tree["dec"]["layers"]["norm"]["scale"].value, 5, axis), whole["model.layers.5.norm.weight"])
    assert peft.to_modules(tree, names=NAMES, axes={".*scale": roles}).whole.keys() == whole.keys()
    jax.tree.map(close, peft.to_modules(tree, names=NAMES, axes={".*scale": roles}).whole, whole)
  with pytest.raises(peft.PeftError, match="nothing tells which axis"):
    peft.to_modules(tree, names=NAMES)


def test_other_leaves_of_the_scanned_module_tell_the_axis():
  """The axis along which all of them have one size is that of the layers."""
  whole = {f"model.layers.{k}.norm.weight": np.asarray(normal(WIDTH, seed=k)) for k in range(WIDTH)}
  modules = [linear(f"model.layers.{k}.up", WIDTH, 12, seed=k) for k in range(WIDTH)]
  params = {
    "dec": {"layers": {"norm": {"scale": jnp.zeros((WIDTH, WIDTH))}, "up": {"kernel": normal(WIDTH, WIDTH, 12)}}}
  }
  with pytest.raises(peft.PeftError, match="up/kernel: nothing tells which axis"):
    loaded(params, *modules, whole=whole, names=NAMES)
  params["dec"]["layers"]["down"] = {"kernel": normal(12, WIDTH, 5)}
  modules += [linear(f"model.layers.{k}.down", 12, 5, seed=k) for k in range(WIDTH)]
  tree = loaded(params, *modules, whole=whole, names=NAMES)["dec"]["layers"]
  assert tree["up"]["kernel"].roles == "iso"
  close(tree["norm"]["scale"].value[:, 5], whole["model.layers.5.norm.weight"])


def test_names_of_axes_in_flaxs_boxes_tell():
  whole = {f"model.layers.{k}.norm.weight": np.asarray(normal(WIDTH, seed=k)) for k in range(WIDTH)}
  box = lambda names: {"dec": {"layers": {"norm": {"scale": nn.Partitioned(jnp.zeros((WIDTH, WIDTH)), names)}}}}
  for names, axis in ((("embed", "layers"), 1), (("layers", None), 0)):
    tree = loaded(box(names), whole=whole, names=NAMES)
    value = tree["dec"]["layers"]["norm"]["scale"].value.value
    close(jnp.take(value, 5, axis), whole["model.layers.5.norm.weight"])
    jax.tree.map(close, peft.to_modules(tree, names=NAMES).whole, whole)
