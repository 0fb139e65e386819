"""An embedding that is the head, too: what one leaf can hold is loaded and saved, and the rest is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import peft
from tests.helpers import adapted, array

PREFIX = "base_model.model."
TABLE = array(1, (11, 6), jnp.float32)
TIED = {
  "model": {
    "embed_tokens": {"embedding": TABLE},
    "layers_0": {"q_proj": {"kernel": array(2, (6, 4), jnp.float32)}},
  }
}
OWN = {**TIED, "lm_head": {"kernel": TABLE.T}}


def look_up(params):
  return (
    params["model"]["embed_tokens"]["embedding"][jnp.zeros(3, int)] @ params["model"]["layers_0"]["q_proj"]["kernel"]
  )


def tied(params):
  table = params["model"]["embed_tokens"]["embedding"]
  look_up(params)
  return table[jnp.zeros(3, int)] @ table.T


def write(folder, tensors, **config):
  """A folder as PEFT writes it, with factors of `q_proj` beside what is given."""
  factors = {
    "model.layers.0.q_proj.lora_A.weight": random(9, 2, 6),
    "model.layers.0.q_proj.lora_B.weight": random(8, 4, 2),
  }
  folder.mkdir(exist_ok=True)
  save_file(
    {PREFIX + name: np.ascontiguousarray(tensor) for name, tensor in {**factors, **tensors}.items()},
    folder / "adapter_model.safetensors",
  )
  told = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"], **config}
  (folder / "adapter_config.json").write_text(json.dumps(told))


def random(seed, *shape):
  return np.asarray(array(seed, shape, jnp.float32))


A, B = random(3, 2, 11), random(4, 6, 2)
EMBEDDING = {"model.embed_tokens.lora_embedding_A": A, "model.embed_tokens.lora_embedding_B": B}
HEAD = {"lm_head.lora_A.weight": B.T, "lm_head.lora_B.weight": A.T}
WHOLE = {"model.embed_tokens.weight": random(5, 11, 6)}
SAVED = {"modules_to_save": ["embed_tokens"]}
ADAPTED = {"target_modules": ["q_proj", "embed_tokens"]}
BOTH = {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}

ALIKE = {
  "factors": ({**EMBEDDING, **HEAD}, BOTH),
  "factors, said": (EMBEDDING, {**ADAPTED, "ensure_weight_tying": True}),
  "values": ({**WHOLE, "lm_head.weight": WHOLE["model.embed_tokens.weight"]}, SAVED),
  "values, said": (WHOLE, {**SAVED, "ensure_weight_tying": True}),
}


@pytest.mark.parametrize("case", ALIKE)
@pytest.mark.parametrize("probe", [None, tied])
def test_what_changes_both_uses_alike_is_one_leaf(tmp_path, case, probe):
  tensors, config = ALIKE[case]
  write(tmp_path / "p", tensors, **config)
  tree = peft.load(tmp_path / "p", TIED, probe=probe)
  table = jaxlora.merge(tree)["model"]["embed_tokens"]["embedding"]
  want = WHOLE["model.embed_tokens.weight"] if case.startswith("values") else TABLE + 2 * (B @ A).T
  np.testing.assert_allclose(table, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  "variant", [{"targets": ["embed_tokens", "q_proj"]}, {"targets": ["q_proj"], "train": ["embed_tokens"]}]
)
def test_a_tied_leaf_is_saved_as_both_modules(tmp_path, variant):
  tree = adapted(TIED, alpha=5, **variant)
  peft.save(tmp_path / "p", tree)
  held = load_file(tmp_path / "p" / "adapter_model.safetensors")
  config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
  assert config["ensure_weight_tying"] is True
  assert any(name.startswith(f"{PREFIX}lm_head.") for name in held)
  again = peft.load(tmp_path / "p", TIED)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True):
    np.testing.assert_array_equal(x, y)
  # On a tree whose head is a leaf of its own both leaves change.
  merged = jaxlora.merge(peft.load(tmp_path / "p", OWN))
  np.testing.assert_allclose(merged["lm_head"]["kernel"].T, merged["model"]["embed_tokens"]["embedding"], rtol=1e-5)
  peft.save(tmp_path / "headless", tree, task_type="FEATURE_EXTRACTION")
  assert not any("lm_head" in name for name in load_file(tmp_path / "headless" / "adapter_model.safetensors"))


def test_what_dora_makes_of_a_tied_leaf_is_said(tmp_path):
  """PEFT changes its look-ups alone; the remedies of the warning."""
  tree = adapted(TIED, targets=["embed_tokens", "q_proj"], variant="dora")
  with pytest.warns(UserWarning, match=r"save: model/embed_tokens/embedding: .* In PEFT the look-ups alone change"):
    peft.save(tmp_path / "p", tree)
  assert not any("lm_head" in name for name in load_file(tmp_path / "p" / "adapter_model.safetensors"))
  peft.save(tmp_path / "headless", tree, task_type="FEATURE_EXTRACTION")
  peft.save(tmp_path / "own", adapted(OWN, targets=["embed_tokens", "q_proj"], variant="dora"))
  peft.save(tmp_path / "out", adapted(TIED, targets=".*", exclude=".*embedding", variant="dora"))


DIFFERENT = {
  "look-ups adapted": (EMBEDDING, ADAPTED),
  "look-ups saved": (WHOLE, SAVED),
  "head adapted": (HEAD, {"target_modules": ["q_proj", "lm_head"]}),
  "head saved": ({"lm_head.weight": random(6, 11, 6)}, {"modules_to_save": ["lm_head"]}),
  "both adapted": ({**EMBEDDING, "lm_head.lora_A.weight": B.T, "lm_head.lora_B.weight": A.T + 1}, BOTH),
  "both saved": ({**WHOLE, "lm_head.weight": random(6, 11, 6)}, {"modules_to_save": ["embed_tokens", "lm_head"]}),
  "one adapted, one saved": (
    {**EMBEDDING, "lm_head.weight": random(6, 11, 6)},
    {**ADAPTED, "modules_to_save": ["lm_head"]},
  ),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("probe", [None, tied])
def test_what_one_leaf_cannot_say_is_refused_and_a_head_of_its_own_takes_it(tmp_path, case, probe):
  tensors, config = DIFFERENT[case]
  write(tmp_path / "p", tensors, **config)
  with pytest.raises(peft.PeftError, match=r"1 problem.*\n.*Give the tree a head of its own: lm_head/kernel, with the"):
    peft.load(tmp_path / "p", TIED, probe=probe)
  merged = jaxlora.merge(peft.load(tmp_path / "p", OWN))  # the remedy
  table, head = merged["model"]["embed_tokens"]["embedding"], merged["lm_head"]["kernel"].T
  want = {"table": TABLE, "head": TABLE}
  for use, name, factors in (
    ("table", "model.embed_tokens", ("lora_embedding_A", "lora_embedding_B")),
    ("head", "lm_head", ("lora_B.weight", "lora_A.weight")),
  ):
    first, second = (tensors.get(f"{name}.{factor}") for factor in factors)
    if first is not None:
      want[use] = TABLE + 2 * ((second @ first).T if use == "table" else first @ second)
    want[use] = tensors.get(f"{name}.weight", want[use])
  np.testing.assert_allclose(table, want["table"], rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(head, want["head"], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("case", ["look-ups adapted", "look-ups saved"])
def test_a_model_without_a_head_takes_look_ups_once_that_is_shown(tmp_path, case):
  tensors, config = DIFFERENT[case]
  write(tmp_path / "p", tensors, **config)
  with pytest.raises(peft.PeftError, match="where the model has no head, pass probe="):
    peft.load(tmp_path / "p", TIED)
  tree = peft.load(tmp_path / "p", TIED, probe=look_up)  # the remedy
  write(tmp_path / "q", tensors, **config, task_type="SEQ_CLS")
  by_task = peft.load(tmp_path / "q", TIED)
  for x, y in zip(jax.tree.leaves(tree), jax.tree.leaves(by_task), strict=True):
    np.testing.assert_array_equal(x, y)
  assert not np.array_equal(jaxlora.merge(tree)["model"]["embed_tokens"]["embedding"], TABLE)


def test_a_name_does_not_make_the_head_of_an_embedding(tmp_path):
  write(tmp_path / "p", DIFFERENT["head saved"][0], **DIFFERENT["head saved"][1])
  names = {"model/embed_tokens/embedding": "lm_head.weight"}
  with pytest.raises(peft.PeftError, match="Give the tree a head of its own"):
    peft.load(tmp_path / "p", TIED, names=names)


def test_a_half_that_does_not_show_the_head_is_refused_and_the_whole_tree_is_saved(tmp_path):
  tree = adapted(OWN, targets=["embed_tokens", "q_proj"])
  frozen, trainable = jaxlora.split(tree)
  with pytest.raises(peft.PeftError, match=r"Save the whole tree: jaxlora.join\(frozen, trainable\)"):
    peft.save(tmp_path / "p", trainable)
  peft.save(tmp_path / "p", jaxlora.join(frozen, trainable))  # the remedy
  assert not any("lm_head" in name for name in load_file(tmp_path / "p" / "adapter_model.safetensors"))
  peft.save(tmp_path / "q", trainable, task_type="FEATURE_EXTRACTION")
  _, trainable = jaxlora.split(adapted(OWN, targets=["embed_tokens", "lm_head"]))
  peft.save(tmp_path / "r", trainable)  # the head is in this half


ROWS = {"model.embed_tokens.token_adapter.trainable_tokens_delta": random(6, 2, 6)}
TOKENS = {"trainable_token_indices": {"embed_tokens": [1, 3]}}


@pytest.mark.parametrize("probe", [None, tied])
def test_rows_of_tokens_belong_to_both_uses_as_in_peft(tmp_path, probe):
  write(tmp_path / "p", ROWS, **TOKENS)
  table = jaxlora.merge(peft.load(tmp_path / "p", TIED, probe=probe))["model"]["embed_tokens"]["embedding"]
  np.testing.assert_allclose(table[np.array([1, 3])], next(iter(ROWS.values())), rtol=1e-5, atol=1e-6)


SHARED = {"shared": {"embedding": TABLE}, "decoder": {"q_proj": {"kernel": array(2, (6, 4), jnp.float32)}}}


def test_an_embedding_that_encoder_and_decoder_share_is_none_of_pefts(tmp_path):
  """In PEFT its factors do nothing: the module that holds them is not the one that is called."""
  tensors = {"shared.lora_embedding_A": A, "shared.lora_embedding_B": B}
  write(tmp_path / "p", tensors, target_modules=["q_proj", "shared"])
  with pytest.raises(peft.PeftError, match=r"its update is never used. For what it does in PEFT leave its tensors"):
    peft.load(tmp_path / "p", SHARED, names={"decoder/(.*)": r"model.layers.0.\1"})
  write(tmp_path / "p", {})  # the remedy
  tree = peft.load(tmp_path / "p", SHARED, names={"decoder/(.*)": r"model.layers.0.\1"})
  assert tree["shared"]["embedding"] is TABLE
  for fields in ({"targets": ["shared"]}, {"targets": ["q_proj"], "train": ["shared"]}):
    tree = adapted(SHARED, **fields)
    with pytest.raises(peft.PeftError, match=r"never used. Merge it into the base \(jaxlora.merge\)"):
      peft.save(tmp_path / "q", tree)
    merged = jaxlora.merge(tree)  # the remedy
    assert isinstance(merged["shared"]["embedding"], jax.Array)


HEADS = {  # the leaf of an embedding, that of a module beside it, and the one that its head would have
  "BERT": ("bert/embeddings/word_embeddings", "cls/predictions/transform/dense", "cls/predictions/decoder"),
  "RoBERTa": ("roberta/embeddings/word_embeddings", "lm_head/layer_norm", "lm_head/decoder"),
  "GPT-NeoX": ("gpt_neox/embed_in", "gpt_neox/final_layer_norm", "embed_out"),
  "an encoder alone": ("bert/embeddings/word_embeddings", "bert/pooler/dense", None),
}


def nested(leaves):
  tree = {}
  for path, leaf in leaves.items():
    node, (*modules, name) = tree, path.split("/")
    for module in modules:
      node = node.setdefault(module, {})
    node[name] = leaf
  return tree


def at(tree, path):
  for name in path.split("/"):
    tree = tree[name]
  return tree


@pytest.mark.parametrize("model", HEADS)
def test_heads_of_other_names(tmp_path, model):
  embedding, beside, head = HEADS[model]
  tied = {f"{embedding}/embedding": TABLE, f"{beside}/bias": jnp.ones(6)}
  module = embedding.replace("/", ".")
  adapter = peft.Adapter({module: peft.Module(module, "embedding", A, B, 4.0)}, {}, {}, {})
  if head is not None:
    with pytest.raises(peft.PeftError, match=f"Give the tree a head of its own: {head}/kernel"):
      peft.from_modules(adapter, nested(tied))
  own = {} if head is None else {f"{head}/kernel": TABLE.T}  # the remedy
  merged = jaxlora.merge(peft.from_modules(adapter, nested({**tied, **own})))
  np.testing.assert_allclose(at(merged, f"{embedding}/embedding"), TABLE + 2 * (B @ A).T, rtol=1e-5, atol=1e-6)
  for path, value in own.items():
    np.testing.assert_array_equal(at(merged, path), value)
  saved = peft.to_modules(adapted(nested(tied), targets=[f"{embedding}/embedding"]))
  assert set(saved.modules) == {module} | ({head.replace("/", ".")} if head else set())
  assert saved.config.get("ensure_weight_tying") is (True if head else None)
