"""Added tokens: resized vocabularies, and rows of them alone (LlamaFactory#3125, open-instruct#190, vllm#4186)."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import _cli, peft
from jaxlora.peft._read import read
from jaxlora.peft._write import write
from tests.peft.folders import PREFIX, adapted, assert_equal, edit, normal, tensors_of


def model(vocabulary, features=8):
  return {
    "model": {"embed_tokens": {"embedding": normal(vocabulary, features)}, "up": {"kernel": normal(features, 6)}},
    "lm_head": {"kernel": normal(features, vocabulary), "bias": normal(vocabulary)},
  }


@pytest.fixture
def tokens(tmp_path):
  """A folder with rows for some tokens of the embedding."""
  base = model(11)
  peft.save(tmp_path, adapted(base, targets=".*up/kernel", axes={}))
  rows = np.arange(16, dtype="float32").reshape(2, 8)
  edit(
    tmp_path,
    {f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": rows},
    trainable_token_indices={"embed_tokens": [9, 2]},
  )
  return tmp_path, base, rows


def test_rows_of_some_tokens_replace_the_bases(tokens):
  folder, base, rows = tokens
  for indices in ({"embed_tokens": [9, 2]}, [9, 2]):
    edit(folder, trainable_token_indices=indices)
    tree = peft.load(folder, base)
    expected = np.array(base["model"]["embed_tokens"]["embedding"])
    expected[[9, 2]] = rows
    node = tree["model"]["embed_tokens"]["embedding"]
    assert (node.variant, node.b.shape) == ("tokens", (2, 8))
    np.testing.assert_allclose(node.materialize(), expected, rtol=1e-6, atol=1e-6)
    assert node.base is base["model"]["embed_tokens"]["embedding"]
    adapter = read(folder)
    merged = adapter.merged("model.embed_tokens.weight", np.asarray(base["model"]["embed_tokens"]["embedding"]))
    np.testing.assert_array_equal(merged, expected)
    peft.save(folder / "again", tree)
    again = peft.load(folder / "again", base)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6, atol=1e-6), again, tree)
    assert tensors_of(folder / "again").keys() == tensors_of(folder).keys()
    write(folder / "same", adapter)
    assert_equal(peft.load(folder / "same", base), tree)
    assert tensors_of(folder / "same").keys() == tensors_of(folder).keys()


def test_rows_of_a_head_are_columns_of_its_kernel(tokens):
  folder, base, rows = tokens
  edit(
    folder,
    {
      f"{PREFIX}model.embed_tokens.token_adapter.trainable_tokens_delta": None,
      f"{PREFIX}lm_head.token_adapter.trainable_tokens_delta": rows,
    },
    trainable_token_indices={"lm_head": [0, 10]},
  )
  expected = np.array(base["lm_head"]["kernel"])
  expected[:, [0, 10]] = rows.T
  loaded = peft.load(folder, base)
  np.testing.assert_allclose(loaded["lm_head"]["kernel"].materialize(), expected, rtol=1e-6, atol=1e-6)
  written = peft.to_modules(loaded).tokens["lm_head.weight"]
  assert written.indices == (0, 10)
  np.testing.assert_allclose(written.rows, rows, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
  ("indices", "message"),
  [
    ([9], r"model.embed_tokens: \(2, 8\) rows of tokens in adapter_model.safetensors, 1 trainable_token_indices"),
    ([9, 9], r"trainable_token_indices: found \[9, 9\] for model.embed_tokens, expected a list of tokens"),
    ([-1, 2], r"trainable_token_indices: found \[-1, 2\]"),
    ([True, 2], r"trainable_token_indices: found \[True, 2\]"),
    ("all", "trainable_token_indices: found 'all'"),
    (None, "trainable_token_indices: found None for model.embed_tokens"),
    ({"embed_tokens": [9, 2], "lm_head": [1]}, "trainable_token_indices: names lm_head, and adapter_model.safetensors"),
    (
      [9, 11],
      r"model.embed_tokens.weight: 11 tokens, and the adapter has rows for token 11. Tokens were added: resize",
    ),
  ],
  ids=str,
)
def test_rows_that_do_not_fit(indices, message, tokens):
  folder, base, _ = tokens
  edit(folder, trainable_token_indices=indices)
  with pytest.raises(peft.PeftError, match=message):
    peft.load(folder, base)


def test_rows_need_the_bases_values_and_a_leaf_of_their_own(tokens):
  folder, base, _ = tokens
  with pytest.raises(peft.PeftError, match="the base has a shape alone; load onto the base's values"):
    peft.load(folder, jax.eval_shape(lambda: base))
  edit(folder, {f"{PREFIX}model.embed_tokens.weight": np.ones((11, 8), np.float32)}, modules_to_save=["embed_tokens"])
  with pytest.raises(peft.PeftError, match="its tokens are trained, and it is adapted or saved whole, too"):
    peft.load(folder, base)


@pytest.mark.parametrize("features", [8, 11], ids=["rectangular", "square"])
@pytest.mark.parametrize(
  "fields",
  [
    {"targets": ".*up/kernel", "train": ".*(embed_tokens|lm_head)/.*"},
    {"targets": ".*(up|lm_head)/kernel|.*embedding"},
    {"targets": ".*up/kernel", "train": ".*embed_tokens/.*"},
  ],
  ids=str,
)
def test_the_remedy_for_a_larger_vocabulary(features, fields, tmp_path):
  """The error names `resized`, and with it the adapter does what it does on the base that it was trained on."""
  small, large = model(11, features), model(14, features)
  for leaf, axis in ((("model", "embed_tokens", "embedding"), 0), (("lm_head", "kernel"), 1), (("lm_head", "bias"), 0)):
    here, there = small, large
    for part in leaf[:-1]:
      here, there = here[part], there[part]
    there[leaf[-1]] = jnp.concatenate([here[leaf[-1]], there[leaf[-1]].take(jnp.arange(11, 14), axis)], axis)
  large["model"]["up"] = small["model"]["up"]
  tree = adapted(large, axes={}, **fields)
  peft.save(tmp_path, tree, task_type="FEATURE_EXTRACTION")
  with pytest.raises(peft.PeftError, match=re.escape("params = jaxlora.peft.resized(params, folder)")):
    peft.load(tmp_path, small)
  params = peft.resized(small, tmp_path)
  assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, large)
  loaded = peft.load(tmp_path, params)
  found, expected = jaxlora.merge(loaded), jaxlora.merge(tree)
  old = lambda leaf, axis: np.take(np.asarray(leaf), np.arange(11), axis)
  np.testing.assert_allclose(
    old(found["model"]["embed_tokens"]["embedding"], 0),
    old(expected["model"]["embed_tokens"]["embedding"], 0),
    rtol=1e-6,
  )
  np.testing.assert_allclose(old(found["lm_head"]["kernel"], 1), old(expected["lm_head"]["kernel"], 1), rtol=1e-6)
  if "embed_tokens" in fields.get("train", ""):
    np.testing.assert_array_equal(
      found["model"]["embed_tokens"]["embedding"], expected["model"]["embed_tokens"]["embedding"]
    )
  else:  # LoRA on top of rows that the folder does not hold, unless PEFT saved the base beside the factors
    whole = np.asarray(large["model"]["embed_tokens"]["embedding"])
    edit(tmp_path, {f"{PREFIX}model.embed_tokens.base_layer.weight": whole})
    again = jaxlora.merge(peft.load(tmp_path, peft.resized(small, tmp_path)))
    np.testing.assert_allclose(
      again["model"]["embed_tokens"]["embedding"], expected["model"]["embed_tokens"]["embedding"], rtol=1e-6
    )
  shapes = peft.resized(jax.eval_shape(lambda: small), tmp_path)
  assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(jnp.shape, large)


def test_rows_of_added_tokens(tokens):
  folder, base, rows = tokens
  edit(folder, trainable_token_indices=[11, 12])
  params = peft.resized(base, folder)
  assert params["model"]["embed_tokens"]["embedding"].shape == (13, 8)
  assert params["lm_head"]["kernel"].shape == (8, 13)
  np.testing.assert_array_equal(
    peft.load(folder, params)["model"]["embed_tokens"]["embedding"].materialize()[11:], rows
  )
  with pytest.raises(peft.PeftError, match="holds no embedding or head with more tokens than the parameters have"):
    peft.resized(params, folder)


def test_another_models_adapter_is_not_taken_for_a_larger_vocabulary(tmp_path):
  peft.save(tmp_path, adapted(model(11, 10), targets=".*up/kernel", axes={}))
  with pytest.raises(peft.PeftError) as caught:
    peft.load(tmp_path, model(11, 8))
  assert "resized" not in str(caught.value)


def test_the_command_line_of_rows(tokens, capsys):
  folder, base, rows = tokens
  table = np.asarray(base["model"]["embed_tokens"]["embedding"])
  others = {"model.up.weight": np.asarray(base["model"]["up"]["kernel"]).T.copy()}
  save_file({"model.embed_tokens.weight": table, **others}, folder / "base.safetensors")
  assert _cli.main(["merge", *(str(folder / name) for name in ("base.safetensors", ".", "out.safetensors"))]) == 0
  expected = np.array(table)
  expected[[9, 2]] = rows
  np.testing.assert_array_equal(load_file(folder / "out.safetensors")["model.embed_tokens.weight"], expected)
  save_file({"model.embed_tokens.weight": table[:5], **others}, folder / "base.safetensors")
  assert _cli.main(["merge", *(str(folder / name) for name in ("base.safetensors", ".", "out2.safetensors"))]) == 1
  assert "5 tokens, and the adapter has rows for token 9. Tokens were added: resize the base" in capsys.readouterr().err
  assert _cli.main(["inspect", str(folder)]) == 0
  assert re.search(r"model.embed_tokens.weight +2 x 8 +tokens", capsys.readouterr().out)
  assert _cli.main(["convert", str(folder), str(folder / "checkpoint")]) == 1
  assert "model.embed_tokens.weight), whose layout in Flax only the base tells" in capsys.readouterr().err
