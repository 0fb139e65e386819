"""One leaf of several torch modules, and several leaves of one: the update stays the same, both ways."""

import json

import jax
import numpy as np
import pytest

import jaxlora
from jaxlora import peft
from jaxlora._base.paths import flatten
from jaxlora.peft._parts import names_from_json
from tests import helpers
from tests.peft.folders import assert_equal, normal, write_modules

HEADS, WIDTH = 4, 2
IN = 6


def updates(tree):
  """The update of every adapted leaf, by path."""
  merged, base = (dict(flatten(f(tree))[0]) for f in (jaxlora.merge, jaxlora.strip))
  return {path: np.asarray(merged[path]) - np.asarray(base[path]) for path in merged}


def same(found, expected):
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def deltas(adapter):
  return {name: module.delta() for name, module in adapter.modules.items()}


# ----------------------------------------------------------------------------------------------------------------------
# Leaves that hold several modules. Each case: the shape of the leaf, the roles, the entry, and torch's modules by a
# function of the leaf's update, as (out, in).

QKV = ("q_proj", "k_proj", "v_proj")
split = lambda **fields: peft.Split(QKV, **fields)
KERNEL = lambda x: np.split(x.T, [8, 12])
HOLDS_SEVERAL = {
  "side by side": ((IN, 16), "io", split(sizes=(2, 1, 1)), KERNEL),
  "torch's layout": ((16, IN), "oi", split(sizes=(8, 4, 4)), lambda x: KERNEL(x.T)),
  "an axis of three first": (
    (IN, 3, HEADS, WIDTH), "iooo", split(), lambda x: [x[:, k].reshape(IN, -1).T for k in range(3)],
  ),
  "interleaved by heads": (
    (IN, HEADS, 3, WIDTH), "iooo", split(groups=HEADS), lambda x: [x[:, :, k].reshape(IN, -1).T for k in range(3)],
  ),
  "interleaved by heads, flat": (
    (IN, HEADS * 3 * WIDTH), "io", split(groups=HEADS, sizes=(1, 1, 1)),
    lambda x: [x.reshape(IN, HEADS, 3, WIDTH)[:, :, k].reshape(IN, -1).T for k in range(3)],
  ),
  "grouped queries, interleaved": (
    (IN, 2, 4, WIDTH), "iooo", split(groups=2, sizes=(2, 1, 1)),
    lambda x: [x[:, :, part].reshape(IN, -1).T for part in (slice(0, 2), 2, 3)],
  ),
  "stacked first, one adapter": (
    (3, IN, HEADS, WIDTH), "oioo", split(), lambda x: [x[k].reshape(IN, -1).T for k in range(3)],
  ),
  "stacked first, three adapters": (
    (3, IN, HEADS, WIDTH), "sioo", split(), lambda x: [x[k].reshape(IN, -1).T for k in range(3)],
  ),
  "Gemma's kv_einsum": (
    (3, HEADS, IN, WIDTH), "soio", split(), lambda x: [x[k].transpose(0, 2, 1).reshape(-1, IN) for k in range(3)],
  ),
  "Gemma's gating_einsum": ((3, 5, IN), "soi", split(), lambda x: list(x)),
  "rotated": (
    (IN, 3, 2, 4), "iooo",
    split(order=(peft.pairs_to_halves(4), peft.pairs_to_halves(4), None)),
    lambda x: [x[:, k][:, :, [0, 2, 1, 3] if k < 2 else [0, 1, 2, 3]].reshape(IN, -1).T for k in range(3)],
  ),
  "rotated, stacked": (
    (3, IN, 2, 4), "sioo",
    split(order=(peft.pairs_to_halves(4), peft.pairs_to_halves(4), None)),
    lambda x: [x[k][:, :, [0, 2, 1, 3] if k < 2 else [0, 1, 2, 3]].reshape(IN, -1).T for k in range(3)],
  ),
}  # fmt: skip
several = pytest.mark.parametrize(
  ("shape", "roles", "entry", "modules_of"), HOLDS_SEVERAL.values(), ids=list(HOLDS_SEVERAL)
)


@several
def test_a_leaf_of_several_modules_is_saved_as_these(shape, roles, entry, modules_of):
  tree = helpers.adapted({"qkv": {"kernel": normal(*shape)}}, targets=".*", axes={".*": roles}, alpha=3)
  found = deltas(peft.to_modules(tree, names={"qkv": entry}))
  for name, expected in zip(QKV, modules_of(updates(tree)["qkv/kernel"]), strict=True):
    same(found[name], expected)


@several
@pytest.mark.parametrize("left_out", [None, "k_proj"])
def test_several_modules_are_loaded_onto_one_leaf(shape, roles, entry, modules_of, left_out, tmp_path):
  base = {"qkv": {"kernel": normal(*shape)}}
  sizes = [len(module) for module in modules_of(np.zeros(shape))]
  modules = [
    linear(name, out, rank=2 + k, alpha=3 * k + 1) for k, (name, out) in enumerate(zip(QKV, sizes, strict=True))
  ]
  modules = [module for module in modules if module.name != left_out]
  write_modules(tmp_path, modules)
  tree = peft.load(tmp_path, base, names={"qkv": entry}, axes={".*": roles})
  assert isinstance(tree["qkv"]["kernel"], jaxlora.LoraWeight)
  wanted = {module.name: module.delta() for module in modules}
  for name, found in zip(QKV, modules_of(updates(tree)["qkv/kernel"]), strict=True):
    same(found, wanted.get(name, np.zeros_like(found)))


@several
def test_a_leaf_of_several_modules_comes_back_as_it_was(shape, roles, entry, modules_of, tmp_path):
  base = {"qkv": {"kernel": normal(*shape)}}
  tree = helpers.adapted(base, targets=".*", axes={".*": roles}, alpha=3)
  peft.save(tmp_path, tree, names={"qkv": entry})
  assert_equal(peft.load(tmp_path, base, names={"qkv": entry}, axes={".*": roles}), tree)


def linear(name, out, rank=2, alpha=2.0, magnitude=None, kind="linear"):
  a, b = (np.asarray(normal(*shape)) for shape in ((rank, IN), (out, rank)))
  return peft.Module(name, kind, a, b, alpha, magnitude=magnitude)


# ----------------------------------------------------------------------------------------------------------------------
# Leaves that are one module together.

SIZES = {"query": (IN, 4, 2), "key": (IN, 2, 2), "value": (IN, 2, 2)}
JOINED = {
  "side by side": ({}, lambda q, k, v: np.concatenate([q, k, v])),
  "interleaved by heads": (
    {"groups": 2},
    lambda *parts: np.concatenate([part.reshape(2, -1, IN) for part in parts], axis=1).reshape(-1, IN),
  ),
  "rotated": (
    {"order": [peft.halves_to_pairs(2), peft.halves_to_pairs(2), lambda n: np.arange(n)[::-1]]},
    lambda q, k, v: np.concatenate([q, k, v[::-1]]),
  ),
}
NAMES = lambda **fields: {
  r"layer_(\d)/(query|key|value)": peft.Joined(r"h.\1.qkv", ("query", "key", "value"), **fields)
}


def split_base():
  return {"layer_0": {name: {"kernel": normal(*shape)} for name, shape in SIZES.items()}}


def torch_of(tree, together):
  found = updates(tree)
  return together(*(found[f"layer_0/{name}/kernel"].reshape(IN, -1).T for name in SIZES))


@pytest.mark.parametrize(("fields", "together"), JOINED.values(), ids=list(JOINED))
@pytest.mark.parametrize("targets", [".*", ".*(query|value)/kernel"])
def test_leaves_of_one_module_are_saved_as_it_and_come_back(fields, together, targets, tmp_path):
  base, names = split_base(), NAMES(**fields)
  axes = {f".*{'(query|value)' if 'value' in targets else ''}.*kernel": "ioo"}
  tree = helpers.adapted(base, targets=targets, axes=axes, alpha=3, overrides={".*query.*": {"rank": 3, "alpha": 9}})
  peft.save(tmp_path, tree, names=names)
  adapter = peft.to_modules(tree, names=names)
  module = adapter.modules["h.0.qkv"]
  same(module.delta(), torch_of(tree, together))
  assert module.rank == sum(node.rank for node in helpers.lora_weights(tree))
  loaded = peft.load(tmp_path, base, names=names)
  same(torch_of(loaded, together), module.delta())
  if targets == ".*":
    assert [node.rank for node in helpers.lora_weights(loaded)] == [node.rank for node in helpers.lora_weights(tree)]


@pytest.mark.parametrize(("fields", "together"), JOINED.values(), ids=list(JOINED))
def test_one_module_is_loaded_onto_its_leaves_and_comes_back(fields, together, tmp_path):
  base, names = split_base(), NAMES(**fields)
  module = linear("h.0.qkv", 16, rank=3, alpha=5.0)
  write_modules(tmp_path, [module])
  tree = peft.load(tmp_path, base, names=names)
  same(torch_of(tree, together), module.delta())
  assert {node.rank for node in helpers.lora_weights(tree)} == {3}
  (again,) = peft.to_modules(tree, names=names).modules.values()
  np.testing.assert_array_equal(again.a, module.a)
  np.testing.assert_array_equal(again.b, module.b)
  assert again.alpha == module.alpha


def test_scanned_layers_and_stacked_axes_that_do_not_lead(tmp_path):
  base = {"layers": {"q": {"kernel": normal(IN, 3, 8)}, "kv": {"kernel": normal(2, 3, IN, 5)}, "v": normal(3, 4)}}
  axes = {".*/q/kernel": "iso", ".*/kv/kernel": "osio"}
  tree = helpers.adapted(base, targets=".*kernel", axes=axes)
  names = {
    "layers/q": peft.Split(("h.{}.a", "h.{}.b"), sizes=(5, 3)),
    "layers/kv": peft.Split(("h.{0}.k", "h.{0}.v")),
  }
  peft.save(tmp_path, tree, names=names)
  adapter = peft.to_modules(tree, names=names)
  found = updates(tree)
  same(adapter.modules["h.2.b"].delta(), found["layers/q/kernel"][:, 2, 5:].T)
  same(adapter.modules["h.1.v"].delta(), found["layers/kv/kernel"][1, 1].T)
  assert_equal(peft.load(tmp_path, base, names=names, axes=axes), tree)


def test_a_stack_of_layers_and_of_parts_in_one_leaf(tmp_path):
  base = {"layers": {"kv": {"kernel": normal(3, 2, 4, IN, 5)}}}
  tree = helpers.adapted(base, targets=".*", axes={".*": "ssoio"})
  names = {"layers/kv": peft.Split(("h.{}.k", "h.{}.v"))}
  peft.save(tmp_path, tree, names=names)
  delta = peft.to_modules(tree, names=names).modules["h.2.v"].delta()
  same(delta, updates(tree)["layers/kv/kernel"][2, 1].transpose(0, 2, 1).reshape(-1, IN))
  assert_equal(peft.load(tmp_path, base, names=names, axes={".*": "ssoio"}), tree)


@pytest.mark.parametrize("what", ["split", "joined"])
def test_dora_of_parts(what, tmp_path):
  if what == "split":
    base, axes, names = {"qkv": {"kernel": normal(IN, 16)}}, None, {"qkv": split(sizes=(2, 1, 1))}
  else:
    base, axes, names = split_base(), {".*": "ioo"}, NAMES(groups=2)
  tree = helpers.adapted(base, targets=".*", axes=axes, variant="dora")
  peft.save(tmp_path, tree, names=names)
  assert all(module.magnitude is not None for module in peft.to_modules(tree, names=names).modules.values())
  for path, update in updates(peft.load(tmp_path, base, names=names)).items():
    same(update, updates(tree)[path])


def test_dora_on_some_of_the_parts_is_refused(tmp_path):
  tree = helpers.adapted(split_base(), targets=".*query/kernel", axes={".*query/kernel": "ioo"}, variant="dora")
  with pytest.raises(peft.PeftError, match=r"h.0.qkv: some of its parts have a magnitude \(DoRA\)"):
    peft.save(tmp_path, tree, names=NAMES())
  assert not list(tmp_path.iterdir())


def test_parts_trained_whole_and_their_biases(tmp_path):
  base = {
    "layer_0": {name: {"kernel": normal(IN, 4), "bias": normal(4)} for name in ("query", "key", "value")},
    "two": {"kernel": normal(IN, 8), "bias": normal(8)},
    "head": {"kernel": normal(IN, 3)},
  }
  tree = helpers.adapted(base, targets="head.*", train=["layer_0/key", "two"])
  names = NAMES(groups=2) | {"two": peft.Split(("one", "other"), sizes=(1, 1), order=lambda n: np.arange(n)[::-1])}
  peft.save(tmp_path, tree, names=names)
  whole = peft.to_modules(tree, names=names).whole
  values = {path: np.asarray(leaf) for path, leaf in flatten(jaxlora.merge(tree))[0]}
  np.testing.assert_array_equal(whole["other.weight"], values["two/kernel"][:, :3:-1].T)
  np.testing.assert_array_equal(whole["one.bias"], values["two/bias"][3::-1])
  expected = np.concatenate([values[f"layer_0/{n}/bias"].reshape(2, -1) for n in ("query", "key", "value")], 1)
  np.testing.assert_array_equal(whole["h.0.qkv.bias"], expected.reshape(-1))
  assert whole["h.0.qkv.weight"].shape == (12, IN)
  loaded = peft.load(tmp_path, base, names=names)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.merge(loaded), jaxlora.merge(tree))


def test_gpt2s_c_attn_trained_whole_is_stored_inputs_first(tmp_path):
  base = {"attn": {name: {"kernel": normal(IN, 4)} for name in "qkv"}, "head": {"kernel": normal(IN, 3)}}
  names = {"attn/(q|k|v)": peft.Joined("h.c_attn", ("q", "k", "v"))}
  tree = helpers.adapted(base, targets="head.*", train=["attn"])
  whole = peft.to_modules(tree, names=names).whole["h.c_attn.weight"]
  merged = jaxlora.merge(tree)
  np.testing.assert_array_equal(whole, np.concatenate([merged["attn"][name]["kernel"] for name in "qkv"], 1))
  peft.save(tmp_path, tree, names=names)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.merge(peft.load(tmp_path, base, names=names)), merged)


# ----------------------------------------------------------------------------------------------------------------------
# What does not fit, and what the messages advise.


def test_several_leaves_under_one_name_are_told_of_joined(tmp_path):
  base = split_base()
  tree = helpers.adapted(base, targets=".*", axes={".*": "ioo"})
  with pytest.raises(peft.PeftError, match=r"several leaves have this name.*jaxlora.peft.Joined"):
    peft.save(tmp_path, tree, names={r"layer_(\d)/(query|key|value)": r"h.\1.qkv"})
  write_modules(tmp_path, [linear("h.0.qkv", 16)])
  with pytest.raises(peft.PeftError, match=r"may be any of .*jaxlora.peft.Joined"):
    peft.load(tmp_path, base, names={r"layer_(\d)/(query|key|value)": r"h.\1.qkv"})
  peft.load(tmp_path, base, names=NAMES())


def test_modules_without_a_leaf_are_told_of_split_and_joined(tmp_path):
  write_modules(tmp_path, [linear("h.0.qkv", 16)])
  with pytest.raises(peft.PeftError, match=r"h\.0\.qkv\.weight: no leaf(.|\n)*jaxlora\.peft\.Split.*Joined"):
    peft.load(tmp_path, split_base())


def test_sizes_that_nothing_tells_are_asked_for(tmp_path):
  base = {"qkv": {"kernel": normal(IN, 15)}}
  tree = helpers.adapted(base, targets=".*")
  with pytest.raises(
    peft.PeftError, match=r"qkv/kernel: nothing tells how many of its 15 outputs.*say sizes= in names"
  ):
    peft.save(tmp_path, tree, names={"qkv": split()})
  peft.save(tmp_path, tree, names={"qkv": split(sizes=(3, 1, 1))})
  write_modules(tmp_path, [linear("k_proj", 3)])
  with pytest.raises(peft.PeftError, match=r"nothing tells how many.*say sizes="):
    peft.load(tmp_path, base, names={"qkv": split()})
  loaded = peft.load(tmp_path, base, names={"qkv": split(sizes=(3, 1, 1))})
  assert not updates(loaded)["qkv/kernel"][:, :9].any()


def test_a_part_that_is_not_in_the_tree(tmp_path):
  base = split_base()
  del base["layer_0"]["value"]
  tree = helpers.adapted(base, targets=".*", axes={".*": "ioo"})
  with pytest.raises(peft.PeftError, match=r"'value' are no leaves of the tree, and nothing tells .*say sizes="):
    peft.save(tmp_path, tree, names=NAMES())
  peft.save(tmp_path, tree, names=NAMES(sizes=(4, 2, 2)))
  assert peft.to_modules(tree, names=NAMES(sizes=(4, 2, 2))).modules["h.0.qkv"].shape == (16, IN)
  with pytest.raises(peft.PeftError, match=r"h.0.qkv: its parts 'value' are no leaves of the tree"):
    peft.load(tmp_path, base, names=NAMES(sizes=(4, 2, 2)))


def test_the_trainable_half_alone_needs_sizes_where_a_part_is_frozen(tmp_path):
  tree = helpers.adapted(split_base(), targets=".*query.*", axes={".*query.*": "ioo"})
  _, half = jaxlora.split(tree)
  with pytest.raises(peft.PeftError, match=r"say sizes="):
    peft.save(tmp_path, half, names=NAMES())
  whole = peft.to_modules(tree, names=NAMES()).modules["h.0.qkv"]
  found = peft.to_modules(half, names=NAMES(sizes=(4, 2, 2))).modules["h.0.qkv"]
  np.testing.assert_array_equal(found.delta(), whole.delta())


@pytest.mark.parametrize(
  ("entry", "message"),
  [
    (split(sizes=(1, 1, 5)), "16 outputs do not fall into parts of sizes"),
    (split(sizes=(2, 1, 1), groups=3), "do not fall into 3 groups"),
    (split(sizes=(2, 1, 1), order=lambda n: np.zeros(n, int)), "expected a permutation"),
    (split(sizes=(2, 1, 1), order=peft.pairs_to_halves(6)), "no whole number of heads of 6"),
  ],
)
def test_entries_that_do_not_fit_the_leaf(entry, message, tmp_path):
  tree = helpers.adapted({"qkv": {"kernel": normal(IN, 16)}}, targets=".*")
  with pytest.raises(peft.PeftError, match=f"qkv/kernel: .*{message}"):
    peft.save(tmp_path, tree, names={"qkv": entry})


def test_files_whose_parts_have_other_sizes(tmp_path):
  write_modules(tmp_path, [linear("q_proj", 8), linear("k_proj", 6), linear("v_proj", 4)])
  base = {"qkv": {"kernel": normal(IN, 16)}}
  with pytest.raises(peft.PeftError, match="16 outputs in all, parts of 8, 4, 4 expected, 8, 6, 4 found"):
    peft.load(tmp_path, base, names={"qkv": split(sizes=(2, 1, 1))})
  with pytest.raises(peft.PeftError, match="16 outputs in all"):
    peft.load(tmp_path, base, names={"qkv": split()})


def test_a_leaf_that_is_no_part_is_an_error(tmp_path):
  tree = helpers.adapted(split_base(), targets=".*", axes={".*": "ioo"})
  with pytest.raises(peft.PeftError, match=r"layer_0/.*: its path holds 0 of the components a, b; expected one"):
    peft.save(tmp_path, tree, names={".*": peft.Joined("h", ("a", "b"))})


@pytest.mark.parametrize(
  ("make", "error"),
  [
    (lambda: peft.Split("abc"), TypeError),
    (lambda: peft.Split(("a", "a")), ValueError),
    (lambda: peft.Split(("a", "b"), sizes=(1,)), ValueError),
    (lambda: peft.Split(("a", "b"), sizes=(1, 0)), ValueError),
    (lambda: peft.Split(("a", "b"), groups=0), ValueError),
    (lambda: peft.Split(("a",), scale=0), ValueError),
    (lambda: peft.Split(("a",), scale=float("nan")), ValueError),
    (lambda: peft.Split(("a", "b"), order=[None]), TypeError),
    (lambda: peft.Joined(("a",), ("b",)), TypeError),
    (lambda: peft.Joined("a", ()), TypeError),
    (lambda: peft.pairs_to_halves(4, rotary=3), ValueError),
  ],
)
def test_entries_that_are_malformed(make, error):
  with pytest.raises(error, match=r"found .*expected"):
    make()


def test_orders_invert_each_other_and_leave_what_is_not_rotated():
  there, back = peft.pairs_to_halves(6, rotary=4), peft.halves_to_pairs(6, rotary=4)
  np.testing.assert_array_equal(there(12)[back(12)], np.arange(12))
  assert there(6).tolist() == [0, 2, 1, 3, 4, 5]


def test_names_of_a_json_file():
  found = names_from_json(
    json.loads("""{
      "a": "b",
      "q": {"split": ["q"], "scale": 0.5},
      "kv": {"split": ["k", "v"], "sizes": [1, 1], "order": [{"pairs_to_halves": 4}, null]},
      "(q|k)": {"joined": "qk", "parts": ["q", "k"], "groups": 2, "order": {"halves_to_pairs": [4, 2]}}
    }""")
  )
  assert found["a"] == "b"
  assert found["q"] == peft.Split(["q"], scale=0.5)
  assert (found["kv"].modules, found["kv"].sizes, found["kv"].order[1]) == (["k", "v"], [1, 1], None)
  assert found["kv"].order[0](4).tolist() == [0, 2, 1, 3]
  assert (found["(q|k)"].module, found["(q|k)"].parts, found["(q|k)"].groups) == ("qk", ["q", "k"], 2)
  assert found["(q|k)"].order(4).tolist() == [0, 1, 2, 3]
  for wrong in ({"joined": "a"}, {"split": ["a"], "size": [1]}, {"modules": []}):
    with pytest.raises(ValueError, match=r"names: 'x': found .*expected a torch name, "):
      names_from_json({"x": wrong})
  for wrong in ("rope", {"rope": 4}, {"pairs_to_halves": 0}, [3]):
    with pytest.raises(ValueError, match=r"names: 'x': order: found .*expected"):
      names_from_json({"x": {"split": ["a"], "order": wrong}})


def test_what_a_file_holds_beside_its_parts_is_not_lost(tmp_path):
  module = linear("h.0.qkv", 16)
  write_modules(tmp_path, [module], {"h.0.qkv.bias": np.ones(16, np.float32)})
  with pytest.raises(peft.PeftError, match=r"h\.0\.qkv\.bias: no leaf of the tree is called so"):
    peft.load(tmp_path, split_base(), names=NAMES())


def test_two_leaves_for_one_part_are_an_error(tmp_path):
  write_modules(tmp_path, [linear("h.0.qkv", 16)])
  with pytest.raises(peft.PeftError, match=r"layer_1/query/kernel, layer_0/query/kernel: are one part of h.0.qkv"):
    peft.load(
      tmp_path,
      {**split_base(), "layer_1": split_base()["layer_0"]},
      names={r"layer_./(query|key|value)": peft.Joined("h.0.qkv", ("query", "key", "value"))},
    )


def test_an_index_that_is_no_component_is_told_of_split(tmp_path):
  base = {"kv": {"w": normal(2, IN, 4)}}
  tree = helpers.adapted(base, targets=".*", axes={".*": "sio"})
  with pytest.raises(
    ValueError, match=r"'attn\.\{\}_proj': \{\} is the index of a layer.*jaxlora\.peft\.Split\(\(name"
  ):
    peft.save(tmp_path, tree, names={"kv": "attn.{}_proj"})
  names = {"kv": peft.Split(("attn.k_proj", "attn.v_proj"))}
  peft.save(tmp_path, tree, names=names)
  assert_equal(peft.load(tmp_path, base, names=names, axes={".*": "sio"}), tree)
