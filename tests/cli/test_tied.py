"""`jaxlora merge` where the base's embedding is the head, too: one tensor for what both become, or a second one."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import checkpoint, peft
from tests.cli.files import flat
from tests.helpers import adapted
from tests.peft.test_tied import ALIKE, DIFFERENT, OWN, ROWS, TABLE, TIED, TOKENS, WHOLE, A, B, write

TABLE_NAME, HEAD_NAME = "model.embed_tokens.weight", "lm_head.weight"
LM = {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True}


@pytest.fixture
def base(tmp_path):
  """Writes a torch model's folder: with or without a tensor of the head, and the configuration that it is given."""

  def make(config, *, head=None, embedding=TABLE_NAME):
    folder = tmp_path / "base"
    folder.mkdir()
    tensors = {embedding: np.asarray(TABLE), "model.layers.0.q_proj.weight": np.ones((4, 6), np.float32)}
    tensors |= {} if head is None else {HEAD_NAME: np.asarray(head)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
      (folder / "config.json").write_text(json.dumps(config))
    return folder

  return make


def uses(tensors):
  """What becomes of the look-ups and of the head, by the tensors of a PEFT folder."""
  table = TABLE + 2 * (B @ A).T if "model.embed_tokens.lora_embedding_A" in tensors else TABLE
  head = TABLE
  if "lm_head.lora_A.weight" in tensors:
    head = TABLE + 2 * tensors["lm_head.lora_B.weight"] @ tensors["lm_head.lora_A.weight"]
  return tensors.get(TABLE_NAME, np.asarray(table)), tensors.get(HEAD_NAME, np.asarray(head))


@pytest.mark.parametrize("config", [LM, {"architectures": ["LlamaForCausalLM"]}, None], ids=str)
@pytest.mark.parametrize("case", DIFFERENT)
def test_what_one_tensor_cannot_hold_is_refused_and_untie_writes_two(run, tmp_path, base, case, config):
  tensors, about = DIFFERENT[case]
  write(tmp_path / "p", tensors, **about)
  folder = base(config)
  error = run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert f"{TABLE_NAME} is the head's weight, too" in error
  assert "Pass --untie" in error
  report = run("merge", folder, tmp_path / "p", tmp_path / "out", "--untie")
  got = load_file(tmp_path / "out" / "model.safetensors")
  for name, want in zip((TABLE_NAME, HEAD_NAME), uses(tensors), strict=True):
    np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)
  if config is not None:
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == {**config, "tie_word_embeddings": False}
  assert HEAD_NAME in report["merged"]


@pytest.mark.parametrize("head", [None, TABLE], ids=["one tensor", "two tensors"])
@pytest.mark.parametrize("option", [[], ["--untie"]], ids=str)
@pytest.mark.parametrize("case", ALIKE)
def test_what_both_become_alike_is_in_one_tensor_or_in_two(run, tmp_path, base, case, option, head):
  tensors, about = ALIKE[case]
  write(tmp_path / "p", tensors, **about)
  run("merge", base(LM, head=head), tmp_path / "p", tmp_path / "out", *option)
  got = load_file(tmp_path / "out" / "model.safetensors")
  want = WHOLE[TABLE_NAME] if case.startswith("values") else TABLE + 2 * (B @ A).T
  names = {TABLE_NAME} if head is None and not option else {TABLE_NAME, HEAD_NAME}
  assert set(got) == names | {"model.layers.0.q_proj.weight"}
  for name in names:
    np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)
  tied = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
  assert tied is not bool(option)


UNTIED = {
  "said": ({"tie_word_embeddings": False}, TABLE),
  "other values": ({"architectures": ["LlamaForCausalLM"]}, TABLE + 1),
  "other values, nothing said": (None, TABLE + 1),
  "no head": ({"architectures": ["LlamaForSequenceClassification"]}, None),
  "no head, said": ({"tie_word_embeddings": False}, None),
}


@pytest.mark.parametrize("case", UNTIED)
def test_an_embedding_that_is_not_tied_is_merged_alone(run, tmp_path, base, case):
  config, head = UNTIED[case]
  tensors, about = DIFFERENT["look-ups adapted"]
  write(tmp_path / "p", tensors, **about)
  folder = base(config, head=head)
  assert "--untie" in run("merge", folder, tmp_path / "p", tmp_path / "out", "--untie", code=1)["error"]
  run("merge", folder, tmp_path / "p", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_allclose(got[TABLE_NAME], uses(tensors)[0], rtol=1e-5, atol=1e-6)
  if head is not None:
    np.testing.assert_array_equal(got[HEAD_NAME], head)


def test_two_equal_tensors_are_tied_unless_the_configuration_says_otherwise(run, tmp_path, base):
  tensors, about = DIFFERENT["head adapted"]
  write(tmp_path / "p", tensors, **about)
  folder = base(None, head=TABLE)
  assert "tied to it" in run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  run("merge", folder, tmp_path / "p", tmp_path / "out", "--untie")
  (folder / "config.json").write_text('{"tie_word_embeddings": false}')  # the other remedy
  run("merge", folder, tmp_path / "p", tmp_path / "o2")
  for out in ("out", "o2"):
    got = load_file(tmp_path / out / "model.safetensors")
    np.testing.assert_array_equal(got[TABLE_NAME], TABLE)
    np.testing.assert_allclose(got[HEAD_NAME], uses(tensors)[1], rtol=1e-5)


@pytest.mark.parametrize("head", [None, TABLE], ids=["one tensor", "two tensors"])
def test_a_checkpoint_of_a_tied_tree_changes_both_uses(run, tmp_path, base, head):
  tree = adapted(TIED, alpha=5, targets=["embed_tokens"])
  checkpoint.save(tmp_path / "c", tree)
  run("merge", base(LM, head=head), tmp_path / "c", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  want = jaxlora.merge(tree)["model"]["embed_tokens"]["embedding"]
  for name in {TABLE_NAME} if head is None else {TABLE_NAME, HEAD_NAME}:
    np.testing.assert_allclose(got[name], want, rtol=1e-5, atol=1e-6)


def test_the_head_of_an_index_of_several_files_goes_beside_its_embedding(run, tmp_path, base):
  tensors, about = DIFFERENT["head adapted"]
  write(tmp_path / "p", tensors, **about)
  folder = base(LM)
  (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
  names = dict.fromkeys((TABLE_NAME, "model.layers.0.q_proj.weight"), "model-00001-of-00001.safetensors")
  index = {"metadata": {"total_size": 1}, "weight_map": names}
  (folder / "model.safetensors.index.json").write_text(json.dumps(index))
  run("merge", folder, tmp_path / "p", tmp_path / "out", "--untie")
  told = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
  assert told["weight_map"] == {**names, HEAD_NAME: "model-00001-of-00001.safetensors"}
  got = load_file(tmp_path / "out" / "model-00001-of-00001.safetensors")
  assert told["metadata"]["total_size"] == sum(value.nbytes for value in got.values())


def test_a_tied_flax_base_takes_what_both_uses_share(run, tmp_path):
  save_file(flat(TIED), tmp_path / "flax.safetensors")
  tensors, about = ALIKE["factors"]
  write(tmp_path / "p", tensors, **about)
  run("merge", tmp_path / "flax.safetensors", tmp_path / "p", tmp_path / "out.safetensors")
  np.testing.assert_allclose(
    load_file(tmp_path / "out.safetensors")["model/embed_tokens/embedding"], TABLE + 2 * (B @ A).T, rtol=1e-5, atol=1e-6
  )
  tensors, about = DIFFERENT["look-ups adapted"]
  write(tmp_path / "q", tensors, **about)
  error = run("merge", tmp_path / "flax.safetensors", tmp_path / "q", tmp_path / "o.safetensors", code=1)["error"]
  assert "Give the tree a head of its own" in error


def test_merged_models_with_adapters_of_peft_saved_here(run, tmp_path, base):
  """What `save` writes of a tied tree merges into the tied torch model as the tree does."""
  tree = adapted(TIED, alpha=5, targets=["embed_tokens"])
  peft.save(tmp_path / "p", tree)
  run("merge", base(LM), tmp_path / "p", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_allclose(got[TABLE_NAME], jaxlora.merge(tree)["model"]["embed_tokens"]["embedding"], rtol=1e-5)


@pytest.mark.parametrize("head", [None, TABLE], ids=["one tensor", "two tensors"])
def test_rows_of_tokens_change_both_uses(run, tmp_path, base, head):
  write(tmp_path / "p", ROWS, **TOKENS)
  run("merge", base(LM, head=head), tmp_path / "p", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  for name in {TABLE_NAME} if head is None else {TABLE_NAME, HEAD_NAME}:
    np.testing.assert_array_equal(got[name][[1, 3]], next(iter(ROWS.values())))
    np.testing.assert_array_equal(got[name][[0, 2]], TABLE[np.array([0, 2])])


def test_convert_without_a_base_takes_no_look_ups_alone(run, tmp_path):
  tensors, about = DIFFERENT["look-ups adapted"]
  write(tmp_path / "p", tensors, **about)
  assert "Pass --base FILE" in run("convert", tmp_path / "p", tmp_path / "c", code=1)["error"]
  save_file(flat(OWN), tmp_path / "flax.safetensors")
  run("convert", tmp_path / "p", tmp_path / "c", "--base", tmp_path / "flax.safetensors")  # the remedy
  assert set(checkpoint.contents(tmp_path / "c").leaves) == {
    "model/embed_tokens/embedding", "model/layers_0/q_proj/kernel"
  }  # fmt: skip
  tensors, about = ALIKE["factors"]
  write(tmp_path / "q", tensors, **about)
  run("convert", tmp_path / "q", tmp_path / "d")
  assert set(checkpoint.contents(tmp_path / "d").leaves) == {
    "model/embed_tokens/embedding", "model/layers/0/q_proj/kernel"
  }  # fmt: skip


def test_an_embedding_that_encoder_and_decoder_share_is_refused(run, tmp_path, base):
  write(
    tmp_path / "p", {"shared.lora_embedding_A": A, "shared.lora_embedding_B": B}, target_modules=["q_proj", "shared"]
  )
  folder = base({"architectures": ["T5ForConditionalGeneration"]}, embedding="shared.weight")
  assert "its update is never used" in run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  write(tmp_path / "p", DIFFERENT["head adapted"][0], **DIFFERENT["head adapted"][1])
  assert "is tied to shared.weight" in run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  write(tmp_path / "p", DIFFERENT["head adapted"][0], **DIFFERENT["head adapted"][1])
  assert "is tied to shared.weight" in run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  write(tmp_path / "p", {})  # the remedy
  run("merge", folder, tmp_path / "p", tmp_path / "out")
  np.testing.assert_array_equal(load_file(tmp_path / "out" / "model.safetensors")["shared.weight"], TABLE)


HEADS = {  # of models whose head is not lm_head: the embedding, a module beside it, and the head
  "BERT": ("bert.embeddings.word_embeddings", "cls.predictions.transform.dense", "cls.predictions.decoder"),
  "ALBERT": ("albert.embeddings.word_embeddings", "predictions.dense", "predictions.decoder"),
  "RoBERTa": ("roberta.embeddings.word_embeddings", "lm_head.layer_norm", "lm_head.decoder"),
  "DistilBERT": ("distilbert.embeddings.word_embeddings", "vocab_transform", "vocab_projector"),
  "ELECTRA": ("electra.embeddings.word_embeddings", "generator_predictions.dense", "generator_lm_head"),
  "ModernBERT": ("model.embeddings.tok_embeddings", "decoder", "decoder"),
  "GPT-NeoX": ("gpt_neox.embed_in", "gpt_neox.final_layer_norm", "embed_out"),
  "Whisper": ("model.decoder.embed_tokens", "model.encoder.conv1", "proj_out"),
  "BioGPT": ("biogpt.embed_tokens", "biogpt.layer_norm", "output_projection"),
  "GPT": ("transformer.tokens_embed", "transformer.h.0.ln_1", "lm_head"),
}


@pytest.mark.parametrize("model", HEADS)
def test_heads_of_other_names(run, tmp_path, base, model):
  """Transformers would leave a head of another name aside, and draw its own at random."""
  embedding, beside, head = HEADS[model]
  factors = {f"{embedding}.lora_embedding_A": A, f"{embedding}.lora_embedding_B": B}
  write(tmp_path / "p", factors, target_modules=["q_proj", embedding])
  folder = base(None, embedding=f"{embedding}.weight")
  held = load_file(folder / "model.safetensors")
  save_file(held | {f"{beside}.bias": np.ones(6, np.float32)}, folder / "model.safetensors")
  error = run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert f"{embedding}.weight is the head's weight, too" in error
  run("merge", folder, tmp_path / "p", tmp_path / "out", "--untie")
  got = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_array_equal(got[f"{head}.weight"], TABLE)
  np.testing.assert_allclose(got[f"{embedding}.weight"], TABLE + 2 * (B @ A).T, rtol=1e-5, atol=1e-6)


def test_the_embedding_of_an_encoder_without_a_head(run, tmp_path, base):
  embedding = HEADS["BERT"][0]
  factors = {f"{embedding}.lora_embedding_A": A, f"{embedding}.lora_embedding_B": B}
  write(tmp_path / "p", factors, target_modules=["q_proj", embedding])
  run("merge", base(None, embedding=f"{embedding}.weight"), tmp_path / "p", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_allclose(got[f"{embedding}.weight"], TABLE + 2 * (B @ A).T, rtol=1e-5, atol=1e-6)


def test_an_embedding_of_an_unknown_name_that_may_be_tied_is_refused(run, tmp_path, base):
  """XLNet's, for instance, whose head is called `lm_loss`."""
  embedding = "transformer.word_embedding"
  factors = {f"{embedding}.lora_embedding_A": A, f"{embedding}.lora_embedding_B": B}
  write(tmp_path / "p", factors, target_modules=["q_proj", embedding])
  config = {"architectures": ["XLNetLMHeadModel"], "vocab_size": 11}
  folder = base(config, embedding=f"{embedding}.weight")
  error = run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert f"{embedding}.weight: may be the head's weight, too" in error
  (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))  # the remedy
  run("merge", folder, tmp_path / "p", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  np.testing.assert_allclose(got[f"{embedding}.weight"], TABLE + 2 * (B @ A).T, rtol=1e-5, atol=1e-6)
