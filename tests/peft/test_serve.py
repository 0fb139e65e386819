"""What readers make of a folder: `save(serve=)`, `check`, and each rule against the reader that it is of."""

import dataclasses
import functools
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlora
from jaxlora import peft
from jaxlora._cli import main as cli
from jaxlora.peft._read import read
from jaxlora.peft._serve import READERS as NAMES
from jaxlora.peft._serve import RULES
from jaxlora.peft._served import uniform
from tests import helpers
from tests.peft.folders import PREFIX, edit, normal, tensors_of
from tests.peft.folders import write as write_folder
from tests.peft.readers import READERS, Refused

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def layer():
  sizes = {"q_proj": (8, 8), "k_proj": (8, 4), "v_proj": (8, 4), "o_proj": (8, 8)}
  mlp = {"gate_proj": (8, 12), "up_proj": (8, 12), "down_proj": (12, 8)}
  return {
    "self_attn": {name: {"kernel": normal(*shape)} for name, shape in sizes.items()},
    "mlp": {name: {"kernel": normal(*shape)} for name, shape in mlp.items()},
    "input_layernorm": {"scale": normal(8)},
  }


BASE = {
  "model": {
    "embed_tokens": {"embedding": normal(11, 8)},
    "layers": {"0": layer(), "1": layer()},
    "norm": {"scale": normal(8)},
  },
  "lm_head": {"kernel": normal(8, 11)},
}
BLOCKS = {
  "transformer": {"h": {"0": {"attn": {"c_attn": {"kernel": normal(8, 24)}, "c_proj": {"kernel": normal(8, 8)}}}}}
}
IMAGES = {"layers_0": {"conv": {"kernel": normal(3, 3, 4, 5)}}}

TREES = {
  "plain": {},
  "rslora": {"scaling": "rslora"},
  "ranks": {"overrides": {".*q_proj.*": {"rank": 2, "alpha": 2.0}}},
  "ranks, of one alpha": {"overrides": {".*q_proj.*": {"rank": 2}}},
  "ranks above r": {"overrides": {".*/1/self_attn/q_proj.*": {"rank": 7, "alpha": 14.0}}},
  "alphas": {"overrides": {".*down_proj.*": {"alpha": 3}}},
  "ranks and alphas, rslora": {
    "scaling": "rslora",
    "overrides": {".*q_proj.*": {"rank": 2}, ".*/0/.*up_.*": {"alpha": 3}},
  },
  "scalings": {"overrides": {".*down_proj.*": {"scaling": "rslora"}}},
  "bfloat16": {"dtype": "bfloat16", "overrides": {".*q_proj.*": {"alpha": 3}, ".*v_proj.*": {"alpha": 4}}},
  "dora": {"variant": "dora"},
  "pissa": {"init": "pissa"},
  "loha": {"variant": "loha", "rank": 2},
  "head": {"targets": [*LINEAR, "lm_head"]},
  "embedding": {"targets": [*LINEAR, "embed_tokens"]},
  "head whole": {"train": ["lm_head"]},
  "norm whole": {"train": ["model/norm"]},
  "a layer's norm whole": {"train": [".*input_layernorm.*"]},
  "one layer": {"targets": ".*/1/.*_proj/kernel"},
  "tied": {"targets": [*LINEAR, "embed_tokens"]},
  "tied, another scale": {"targets": [*LINEAR, "embed_tokens"], "overrides": {".*embed.*": {"alpha": 3.0}}},
  "queries": {"targets": ["q_proj"]},
  "keys": {"targets": ["k_proj"]},
  "queries and values": {"targets": ["q_proj", "v_proj"]},
  "gates": {"targets": ["gate_proj", "down_proj"]},
  "up alone": {"targets": ["up_proj"]},
}


@functools.cache
def tree_of(case):
  fields = {"rank": 4, "alpha": 8, "targets": list(LINEAR), **TREES[case]}
  if "train" in fields and fields["train"][0].startswith(".*"):
    fields["train"] = fields["train"][0]
  return helpers.adapted(base_of(case), **fields)


def base_of(case):
  return {"model": BASE["model"]} if case.startswith("tied") else BASE


def is_right(reader, folder, tree):
  """Whether a reader makes of a folder what the tree is: the same updates, and nothing trained whole left out."""
  adapter = peft.to_modules(tree)
  try:
    found = READERS[reader](folder)
  except Refused:
    return False
  if adapter.whole or any(module.magnitude is not None for module in adapter.modules.values()):
    return False
  expected = {name: module.delta().astype("float64") for name, module in adapter.modules.items()}
  more = [update for name, update in found.items() if name not in expected]
  return not any(update.any() for update in more) and all(
    name in found and np.allclose(found[name], update, rtol=2e-6, atol=1e-6) for name, update in expected.items()
  )


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", TREES)
def test_a_rule_is_broken_exactly_where_the_reader_is_wrong(case, reader, tmp_path):
  tree = tree_of(case)
  peft.save(tmp_path, tree, base_model_name_or_path="org/base")
  broken = [finding for finding in peft.check(tmp_path, reader) if not finding.rule.note]
  assert (not broken) == is_right(reader, tmp_path, tree)


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", TREES)
def test_what_is_saved_for_a_reader_is_right_or_refused(case, reader, tmp_path):
  tree = tree_of(case)
  try:
    peft.save(tmp_path, tree, serve=reader, base_model_name_or_path="org/base")
  except peft.PeftError as error:
    said = str(error)
    peft.save(tmp_path, tree)
    mended = ("fused",) if reader == "sglang" else ()  # by zero factors, of which the folder alone knows no sizes
    broken = [finding for finding in peft.check(tmp_path, reader) if not (finding.rule.made or finding.rule.note)]
    broken = [finding for finding in broken if finding.rule.name not in mended]
    assert len(broken) > 0
    assert not [finding for finding in broken if str(finding) not in said]
    assert not is_right(reader, tmp_path, tree)
  else:
    assert is_right(reader, tmp_path, tree)
    assert not [finding for finding in peft.check(tmp_path, reader) if not finding.rule.note]
    assert not peft.check(tmp_path, "peft")
    merged = jaxlora.merge(peft.load(tmp_path, base_of(case)))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), merged, jaxlora.merge(tree))


def test_what_is_right_is_written_as_it_is(tmp_path):
  for name, serve in (("plain", "peft"), ("served", ("vllm", "llama.cpp"))):
    peft.save(tmp_path / name, tree_of("plain"), serve=serve)
  for file in ("adapter_config.json", "adapter_model.safetensors"):
    assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "served" / file).read_bytes()


@pytest.mark.parametrize("case", ["ranks", "ranks and alphas, rslora", "scalings", "bfloat16"])
def test_one_rank_and_one_scale_are_those_of_pad(case, tmp_path):
  """The same updates as `jaxlora.pad` makes; B is rounded nowhere, where half precision could not hold it."""
  tree = tree_of(case)
  rank = max(node.rank for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, jaxlora.LoraWeight))
             if isinstance(node, jaxlora.LoraWeight))  # fmt: skip
  peft.save(tmp_path, tree, serve=["vllm", "sglang", "llama.cpp"])
  found, padded = read(tmp_path), peft.to_modules(jaxlora.pad(tree, rank))
  exact = peft.to_modules(tree).modules
  assert {module.rank for module in found.modules.values()} == {rank}
  assert len({module.alpha for module in found.modules.values()}) == 1
  for name, module in found.modules.items():
    assert module.a.shape == padded.modules[name].a.shape
    np.testing.assert_allclose(module.delta(), exact[name].delta(), rtol=1e-6, atol=1e-7)
    tolerance = 2e-2 if case == "bfloat16" else 1e-6
    np.testing.assert_allclose(module.delta(), padded.modules[name].delta(), rtol=tolerance, atol=tolerance)
  if case == "bfloat16":
    kinds = {name.split(".")[-1]: str(module.b.dtype) for name, module in found.modules.items()}
    assert (kinds["q_proj"], kinds["v_proj"], kinds["o_proj"]) == ("float32", "bfloat16", "bfloat16")


def test_notes(tmp_path):
  """What may be met outside of the folder is told, and refuses nothing."""
  base = {"layers_0": {"up": {"kernel": normal(24, 24)}}, "lm_head": {"kernel": normal(24, 30)}}
  tree = helpers.adapted(base, rank=20, targets=".*kernel")
  peft.save(tmp_path, tree, serve=["vllm", "sglang", "llama.cpp"])
  said = {(finding.reader, finding.rule.name): str(finding) for finding in peft.check(tmp_path)}
  assert set(said) == {("vllm", "max-lora-rank"), ("llama.cpp", "head-of-its-own"), ("llama.cpp", "base")}
  assert "found rank 20, so that --max-lora-rank 32 is needed" in said["vllm", "max-lora-rank"]
  peft.save(tmp_path, tree, base_model_name_or_path="org/model")  # the remedy of the last
  assert "base" not in [finding.rule.name for finding in peft.check(tmp_path)]


def test_an_adapter_that_is_off_is_off_for_llama_cpp(tmp_path):
  off = lambda node: dataclasses.replace(node, alpha=0.0) if isinstance(node, jaxlora.LoraWeight) else node
  tree = jax.tree.map(off, tree_of("plain"), is_leaf=lambda x: isinstance(x, jaxlora.LoraWeight))
  peft.save(tmp_path, tree)
  assert [finding.rule.name for finding in peft.check(tmp_path, "llama.cpp") if not finding.rule.note] == ["zero-alpha"]
  assert np.abs(READERS["llama.cpp"](tmp_path)["model.layers.0.mlp.up_proj"]).max() > 0
  peft.save(tmp_path, tree, serve="llama.cpp")
  assert not np.abs(READERS["llama.cpp"](tmp_path)["model.layers.0.mlp.up_proj"]).any()


@pytest.mark.parametrize(
  "change",
  [
    lambda key: key,
    lambda key: key.replace(".weight", ".default.weight"),
    lambda key: f"_orig_mod.{key}",
    lambda key: re.sub(r"(layers\.\d+)", r"\1._fsdp_wrapped_module", key),
    lambda key: PREFIX + key,
    lambda key: f"module.{key}",
  ],
)
def test_keys_of_other_savers(change, tmp_path):
  tree = tree_of("plain")
  peft.save(tmp_path, tree)
  save_file({change(key): value for key, value in tensors_of(tmp_path).items()}, tmp_path / "adapter_model.safetensors")
  fine = change("x.weight") == "x.weight" and "wrapped" not in change("layers.0.x")
  for reader in ("vllm", "sglang", "llama.cpp"):
    names = [finding.rule.name for finding in peft.check(tmp_path, reader) if not finding.rule.note]
    assert names == ([] if fine else ["keys"])


def test_other_models(tmp_path):
  blocks = helpers.adapted(BLOCKS, rank=2, targets=".*kernel")
  peft.save(tmp_path, blocks)
  assert [finding.rule.name for finding in peft.check(tmp_path, "sglang")] == ["layers"]
  assert not READERS["sglang"](tmp_path)  # everything is left out, without a word
  images = helpers.adapted(IMAGES, rank=2, targets=".*kernel", axes={".*": "iiio"})
  for reader in READERS:
    with pytest.raises(peft.PeftError, match="expected that adapted modules are linear, or embeddings"):
      peft.save(tmp_path, images, serve=reader)


def test_experts_in_one_parameter_and_rows_of_tokens(tmp_path):
  base = {"layer_0": {"w1": normal(4, 8, 6)}}
  tree = helpers.adapted(base, rank=2, targets=".*w1", axes={".*": "sio"})
  names = {r"layer_(\d)/w1": peft.Experts(r"model.layers.\1.mlp.experts.gate_up_proj")}
  peft.save(tmp_path, tree, names=names)
  (note,) = peft.check(tmp_path, "peft")
  assert (note.rule.name, note.rule.note) == ("experts", True)
  tokens = tmp_path / "tokens"
  peft.save(tokens, tree_of("plain"))
  edit(
    tokens,
    {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": np.ones((2, 8), np.float32)},
    trainable_token_indices=[1, 2],
  )
  assert not peft.check(tokens, "peft")
  for reader in READERS:
    assert "experts" in [finding.rule.name for finding in peft.check(tmp_path, reader)]
    with pytest.raises(peft.PeftError, match=rf"{reader}, experts: .*Serve the merged model"):
      peft.save(tmp_path, tree, names=names, serve=reader)
    assert [f.rule.name for f in peft.check(tokens, reader) if not f.rule.note] == ["whole"]


def test_one_module_of_a_high_rank_does_not_fill_the_memory(tmp_path):
  modules = {f"layers.{k}.down_proj": (1, 4096, 8) for k in range(40)} | {"layers.0.up_proj": (100_000, 2, 2)}
  write_folder(tmp_path / "a", modules, rank_pattern={"up_proj": 100_000})
  assert cli(["check", str(tmp_path / "a"), "--serve", "vllm", "--write", str(tmp_path / "b")]) == 1
  with pytest.raises(peft.PeftError, match=r"is 100000, and [\d,]+ numbers instead of.*jaxlora.compress\(tree, rank="):
    uniform(read(tmp_path / "a"))


def test_patterns_instead_of_lists(tmp_path):
  peft.save(tmp_path, tree_of("plain"))
  edit(tmp_path, target_modules=r".*(q|k|v|o|gate|up|down)_proj")
  assert [finding.rule.name for finding in peft.check(tmp_path, "sglang")] == ["targets"]
  edit(tmp_path, target_modules=None)
  assert [finding.rule.name for finding in peft.check(tmp_path, "vllm")] == ["targets"]


def test_every_reader_has_rules_with_a_source_and_a_remedy():
  assert {reader for rule in RULES for reader in rule.readers} == set(NAMES)
  for rule in RULES:
    assert re.search(r"\.(py|cpp|h): |get_layer_id", rule.source), rule.name
    assert all((rule.requires, rule.otherwise, rule.remedy))
  assert len({(reader, rule.name) for rule in RULES for reader in rule.readers}) == sum(len(r.readers) for r in RULES)


def test_remedies_work(tmp_path):
  """Each remedy that a message names, where it is not `serve=` itself."""
  with pytest.raises(peft.PeftError, match=re.escape("lower rank: jaxlora.compress(tree, rank=512)")):
    peft.save(
      tmp_path, wide := helpers.adapted({"layers_0": {"up": {"kernel": normal(520, 520)}}}, rank=513), serve="vllm"
    )
  peft.save(tmp_path, jaxlora.compress(wide, rank=512), serve="vllm")
  tree = tree_of("queries")
  with pytest.raises(
    peft.PeftError, match=r"sglang, fused.*Write zero factors.*save\(whole tree, serve='sglang'\); or serve"
  ):
    peft.save(tmp_path, jaxlora.split(tree)[1], serve="sglang")
  peft.save(tmp_path, tree, serve="sglang")
  assert READERS["sglang"](tmp_path)["model.layers.0.self_attn.v_proj"].shape == (4, 8)
  dora = tree_of("dora")
  with pytest.raises(peft.PeftError, match=r"vllm, dora.*Serve the merged model: jaxlora.merge"):
    peft.save(tmp_path, dora, serve="vllm")
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(jaxlora.merge(dora)))
  with pytest.raises(ValueError, match="serve: found 'vLLM', expected one or several of 'peft', 'vllm'"):
    peft.save(tmp_path, dora, serve="vLLM")


def test_heads_that_peft_takes_from_the_file(tmp_path):
  base = {"query": {"kernel": normal(8, 8)}, "classifier": {"kernel": normal(8, 3), "bias": normal(3)}}
  tree = helpers.adapted(base, targets="query/kernel")
  peft.save(tmp_path, tree, task_type="SEQ_CLS")
  assert sorted(read(tmp_path).whole) == ["classifier.bias", "classifier.weight"]
  assert read(tmp_path).config["modules_to_save"] == ["classifier"]
  merged = jaxlora.merge(peft.load(tmp_path, base))
  jax.tree.map(np.testing.assert_array_equal, merged, jaxlora.merge(tree))

  peft.save(tmp_path, tree, task_type="QUESTION_ANS")  # the model has no such head
  assert not read(tmp_path).whole
  half = jaxlora.split(tree)[1]
  with pytest.raises(
    peft.PeftError, match=r"peft, head: .* found no weights of classifier or score.*Save the whole tree"
  ):
    peft.save(tmp_path, half, task_type="SEQ_CLS")
  peft.save(tmp_path, half, task_type=None)
  shapes = dict(tree, classifier=jax.eval_shape(lambda: base["classifier"]))
  with pytest.raises(
    peft.PeftError, match=r"classifier/kernel: its value is needed.*Pass the whole tree, with the base's"
  ):
    peft.save(tmp_path, shapes, task_type="SEQ_CLS")
  peft.save(tmp_path, shapes)

  with pytest.raises(
    peft.PeftError, match=r"peft, adapted-head: .* classifier: adapted.*task_type=None; or train the head"
  ):
    peft.save(tmp_path, helpers.adapted(base, targets=".*/kernel"), task_type="TOKEN_CLS")
  peft.save(tmp_path, helpers.adapted(base, targets=".*/kernel"), task_type=None)
  whole = helpers.adapted(base, targets=".*/kernel", exclude="classifier/kernel", train="classifier/.*")
  peft.save(tmp_path, whole, task_type="TOKEN_CLS")
  with pytest.raises(peft.PeftError, match="peft, task: expected that task_type is one of SEQ_CLS"):
    peft.save(tmp_path, tree, task_type="CLASSIFICATION")


def test_a_head_of_several_layers_is_saved_whole(tmp_path):
  """RoBERTa's: PEFT saves the module `classifier`, whatever it consists of."""
  layer = lambda out: {"kernel": normal(8, out), "bias": normal(out)}
  base = {"query": {"kernel": normal(8, 8)}, "classifier": {"dense": layer(8), "out_proj": layer(3)}}
  for fields in ({}, {"train": "classifier/.*"}, {"train": "classifier/out_proj/.*"}):
    tree = helpers.adapted(base, targets="query/kernel", **fields)
    peft.save(tmp_path, tree, task_type="SEQ_CLS")
    whole = {f"classifier.{name}.{parameter}" for name in ("dense", "out_proj") for parameter in ("weight", "bias")}
    assert read(tmp_path).whole.keys() == whole
    assert read(tmp_path).config["modules_to_save"] == ["classifier"]
    assert not peft.check(tmp_path, "peft")
    jax.tree.map(np.testing.assert_array_equal, jaxlora.merge(peft.load(tmp_path, base)), jaxlora.merge(tree))
  with pytest.raises(
    peft.PeftError, match=r"classifier\.dense: PEFT adapts nothing in .* \(classifier\)\n.*adapt fewer"
  ):
    peft.save(tmp_path, helpers.adapted(base, targets=".*(query|dense)/kernel"), task_type="SEQ_CLS")
  with pytest.raises(peft.PeftError, match=r"peft, head: .* found no weights of classifier or score"):
    peft.save(tmp_path, jaxlora.split(helpers.adapted(base, targets="query/kernel"))[1], task_type="SEQ_CLS")


def test_a_model_whose_names_begin_like_pefts(tmp_path):
  """A reward model that holds its language model as `base_model`."""
  base = {"base_model": {"model": {"layers": {"0": {"up_proj": {"kernel": normal(8, 8)}}}}}}
  tree = helpers.adapted(base, targets=".*kernel")
  peft.save(tmp_path, tree)
  assert list(read(tmp_path).modules) != list(peft.to_modules(tree).modules)  # taken for a PeftModel in a PeftModel
  again = peft.load(tmp_path, base)
  jax.tree.map(np.testing.assert_array_equal, again, tree)


def test_check_of_folders_that_peft_cannot_load(tmp_path):
  base = {"query": {"kernel": normal(8, 8)}}
  peft.save(tmp_path, helpers.adapted(base, targets="query/kernel"))
  for config, rule in (
    ({"task_type": "SEQ_CLS", "modules_to_save": ["classifier", "score"]}, "head"),
    ({"task_type": "CLS", "modules_to_save": None}, "task"),
    ({"task_type": None, "rank_pattern": None}, "null-patterns"),
    ({"rank_pattern": {}, "modules_to_save": ["query"]}, "adapted-head"),
  ):
    edit(tmp_path, **config)
    assert [finding.rule.name for finding in peft.check(tmp_path, "peft")] == [rule]
