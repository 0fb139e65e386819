"""Leaves and their names in torch."""

import re
import time

import pytest

import jaxlora
from jaxlora import peft
from jaxlora.peft import _names, _patterns, _places
from jaxlora.peft._read import read
from tests.peft.folders import AXES, adapted, assert_equal, normal, params, write


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
  target = _names.default_target(path, 0)
  assert target.module == name
  key = (name, target.parameter)
  assert _places.find_places([key], [path], None) == ({key: _places.Place(path)}, {})


def test_the_index_of_a_scanned_layer_goes_where_the_list_is():
  assert _names.default_target("model/layers/mlp/up/kernel", 1).module == "model.layers.{}.mlp.up"
  assert _names.default_target("layers/experts/w1/kernel", 2).module == "model.layers.{}.experts.{}.w1"
  with pytest.raises(peft.PeftError, match=r"tower/up/kernel: nothing tells where.*names="):
    _names.default_target("tower/up/kernel", 1)


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
  shapes = {name: module.a.shape for name, module in read(tmp_path).modules.items()}
  assert shapes == {"conversation.out": (2, 6), "Conv_0": (2, 3, 2), "time_conv1d": (2, 3, 2)}
  assert_equal(peft.load(tmp_path, base, names={"temporal": "time_conv1d"}), tree)


def test_names_of_ones_own(tmp_path):
  base = params()
  tree = adapted(base, targets=".*(query|out)/kernel|embed.*", train="head/.*")
  peft.save(tmp_path, tree, names=NAMES)
  adapter = read(tmp_path)
  assert sorted(adapter.modules) == ["net.0.out", "net.0.q", "net.1.out", "net.1.q", "tokens"]
  assert sorted(adapter.whole) == ["top.bias", "top.weight"]
  assert_equal(peft.load(tmp_path, base, names=NAMES, axes=AXES), tree)


def test_names_of_scanned_layers_and_of_experts_in_them(tmp_path):
  base = {"tower": {"w": {"kernel": normal(2, 3, 8, 6)}, "norm": {"scale": normal(2, 8)}}}
  names = {"tower/w": "deep.{0}.expert.{1}.w", "tower/norm": "deep.{}.norm"}
  tree = adapted(base, axes={"tower/w.*": "ssio"}, targets="tower/w.*", train="tower/norm/.*")
  peft.save(tmp_path, tree, names=names)
  adapter = read(tmp_path)
  assert "deep.1.expert.2.w" in adapter.modules
  assert "deep.1.norm.weight" in adapter.whole
  assert_equal(peft.load(tmp_path, base, names=names), tree)
  swapped = {**names, "tower/w": "expert.{1}.of.{0}.w"}
  peft.save(tmp_path, tree, names=swapped)
  assert "expert.2.of.1.w" in read(tmp_path).modules
  assert_equal(peft.load(tmp_path, base, names=swapped), tree)


def test_layers_scanned_twice_need_no_names(tmp_path):
  base = {"layers": {"experts": {"w1": {"kernel": normal(2, 3, 8, 6)}}}}
  tree = adapted(base, axes={".*": "ssio"})
  peft.save(tmp_path, tree)
  assert "model.layers.1.experts.2.w1" in read(tmp_path).modules
  assert_equal(peft.load(tmp_path, base), tree)


def test_a_single_head_is_told_by_the_name(tmp_path):
  base = {"layers_0": {"query": {"kernel": normal(8, 1, 4)}, "out": {"kernel": normal(4, 1, 8)}}}
  tree = adapted(base, axes={".*query/kernel": "ioo", ".*out/kernel": "iio"})
  peft.save(tmp_path, tree)
  assert_equal(peft.load(tmp_path, base), tree)


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
  places, problems = _places.find_places(wanted, paths, None)
  assert [places[key].path for key in wanted] == paths
  assert not problems


def test_very_many_strange_names_do_not_take_for_ever():
  paths = [f"layers_{k}/q/kernel" for k in range(300)]
  wanted = [(f"m{k % 997}.{k}.1.2.3.4.5.6.7.q", "weight") for k in range(20_000)]
  start = time.perf_counter()
  _, problems = _places.find_places(wanted, paths, None)
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
    targets = _patterns.target_modules(adapted, known, [], complete=True)
    if isinstance(targets, str):
      return targets, [name for name in known if re.fullmatch(targets, name)]
    return targets, [name for name in known if any(name == t or name.endswith(f".{t}") for t in targets)]

  assert picked(known[:4]) == (["c_proj"], known[:4])
  assert picked(known[:2]) == (["attn.c_proj"], known[:2])
  assert picked(known[1:2]) == (["1.attn.c_proj"], known[1:2])
  assert picked(["x.c_attn"]) == (["x.c_attn"], ["x.c_attn"])
  assert picked(["c_attn"]) == ("c_attn", ["c_attn"])


@pytest.mark.parametrize(
  "names",
  [
    {r"model/layers/(\d+)/(.*)": r"net.layers.\1.\2"},
    {r"model/layers/(\d+)/(\w+)/(\w+)": r"net.layers.\1.\2.\3"},
    {r"model/(.*)/kernel": r"net.\1"},
  ],
)
def test_a_group_may_hold_several_components_of_a_path(names, tmp_path):
  base = {"model": {"layers": {"0": {"attn": {"q": {"kernel": normal(8, 6)}}}}}}
  tree = adapted(base)
  peft.save(tmp_path, tree, names=names)
  assert list(read(tmp_path).modules) == ["net.layers.0.attn.q"]
  assert_equal(peft.load(tmp_path, base, names=names), tree)


@pytest.mark.parametrize(
  ("params", "roles", "name"),
  [
    ({"": {"kernel": normal(6, 4)}}, "io", "some.module"),
    ({"layers": {"x{y}": {"kernel": normal(2, 6, 4)}}}, "sio", "model.layers.{}.x"),
  ],
)
def test_names_that_torch_cannot_have(params, roles, name, tmp_path):
  tree = adapted(params, targets=".*kernel", axes={".*": roles})
  with pytest.raises(peft.PeftError, match=r"no name for a torch module.*names=") as caught:
    peft.save(tmp_path, tree)
  (pattern,) = re.findall(r"names={'(.*?)': 'the.module.name'}", str(caught.value))
  names = {pattern.replace("\\\\", "\\"): name}  # the remedy
  peft.save(tmp_path, tree, names=names)
  assert_equal(peft.load(tmp_path, params, names=names), tree)
