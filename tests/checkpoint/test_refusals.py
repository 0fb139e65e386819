"""Wrong bases and wrong calls are errors that say what is wrong."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from jaxlora.checkpoint import CheckpointError, CheckpointWarning, Manager
from tests.checkpoint.trees import assert_same, matrix_tree


def test_a_wrong_base_is_an_error_that_names_the_leaves(tmp_path):
  base = {f"w{k}": np.full((4, 3), k, np.float32) for k in range(6)} | {"frozen": np.ones(2, np.float32)}
  factors = {"a": np.ones((1, 4), np.float32), "b": np.ones((1, 3), np.float32)}
  tree = base | {f"w{k}": jaxlora.LoraWeight(base[f"w{k}"], **factors, rank=1, alpha=1.0) for k in range(5)}
  checkpoint.save(tmp_path / "a", tree)
  assert_same(checkpoint.restore(tmp_path / "a", base), jax.tree.map(jnp.asarray, tree))
  wrong = base | {"w1": np.ones((5, 3), np.float32), "w2": base["w2"] + 1, "w3": base["w3"].astype(np.float16)}
  wrong |= {"frozen": base["frozen"] * 2, "more": np.ones(1)}
  del wrong["w0"]
  with pytest.raises(CheckpointError) as error:
    checkpoint.restore(tmp_path / "a", wrong)
  expected = [
    r"w0 (adapted): missing in the base",
    r"w1 (adapted): shape (5, 3), expected (4, 3)",
    r"w2 (adapted): other values",
    r"w3 (adapted): dtype float16, expected float32",
    r"frozen (frozen): other values",
    r"more: only in the base given",
    "strict=False",
  ]
  for text in expected:
    assert text in str(error.value)
  assert "w4" not in str(error.value)
  with pytest.warns(CheckpointWarning) as warned:
    loaded = checkpoint.restore(tmp_path / "a", wrong, strict=False)
  assert len(warned[0].message.problems) == 6
  adapted = [name for name, node in loaded.items() if isinstance(node, jaxlora.LoraWeight)]
  assert adapted == ["w2", "w3", "w4"]
  with pytest.raises(CheckpointError, match="no adapted leaf of the checkpoint fits"):
    checkpoint.restore(tmp_path / "a", {"frozen": base["frozen"]}, strict=False)
  with pytest.raises(CheckpointError, match=r"w0 is adapted.*jaxlora\.strip"):
    checkpoint.restore(tmp_path / "a", tree)


def test_an_abstract_base_is_checked_by_shape(tmp_path):
  base, tree = matrix_tree()
  checkpoint.save(tmp_path / "a", tree)
  abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, base))
  assert np.array_equal(checkpoint.restore(tmp_path / "a", abstract)["w"].a, tree["w"].a)


@pytest.mark.parametrize(
  ("metadata", "place"),
  [
    ({"a": [1, (2, 3)]}, r"metadata\['a'\]\[1\]: found \(2, 3\)"),
    ({"a": float("nan")}, r"metadata\['a'\]: found nan"),
    ({1: 2}, "the key 1 is no string"),
    ({"a": np.float32(1)}, r"metadata\['a'\].*float32"),
    ([1], "expected a dict"),
  ],
)
def test_metadata_is_json_or_an_error_that_names_the_place(tmp_path, metadata, place):
  with pytest.raises(CheckpointError, match=place):
    checkpoint.save(tmp_path / "a", matrix_tree()[1], metadata=metadata)
  assert not (tmp_path / "a").exists()


def test_what_cannot_be_saved_is_said(tmp_path):
  base, tree = matrix_tree()
  with pytest.raises(CheckpointError, match="no adapted leaf"):
    checkpoint.save(tmp_path / "a", base)
  with pytest.raises(CheckpointError, match=r"base missing.*join"):
    checkpoint.save(tmp_path / "a", jaxlora.split(tree)[1])
  with pytest.raises(CheckpointError, match="traced"):
    jax.jit(lambda tree: checkpoint.save(tmp_path / "a", tree))(tree)
  with pytest.raises(CheckpointError, match="no complete checkpoint"):
    checkpoint.restore(tmp_path / "a", base)


def test_save_keeps_to_folders_of_its_own(tmp_path):
  base, tree = matrix_tree()
  (tmp_path / "mine").mkdir()
  (tmp_path / "mine" / "thesis.tex").write_text("")
  with pytest.raises(CheckpointError, match=r"holds other files \(thesis.tex\)"):
    checkpoint.save(tmp_path / "mine", tree)
  with pytest.raises(CheckpointError, match="is a file"):
    checkpoint.save(tmp_path / "mine" / "thesis.tex", tree)
  with Manager(tmp_path / "run", asynchronous=False) as manager:
    manager.save(3, tree)
  with pytest.raises(CheckpointError, match="training run"):
    checkpoint.save(tmp_path / "run", tree)
  checkpoint.restore(tmp_path / "run", base)  # the adapter of a training run
  checkpoint.restore(tmp_path / "run" / "3", base)
  with pytest.raises(CheckpointError, match="expected step 4, found steps 3"):
    checkpoint.restore(tmp_path / "run", base, step=4)
  for value in (1.0, 2.0, 3.0):
    checkpoint.save(tmp_path / "a", matrix_tree(value)[1])
    assert len(os.listdir(tmp_path / "a")) == 1
  assert checkpoint.restore(tmp_path / "a", base)["w"].a[0, 0] == 3
  with Manager(tmp_path / "a") as manager, pytest.raises(CheckpointError, match="an adapter alone"):
    manager.restore(base)


def test_a_newer_format_is_refused(tmp_path):
  base, tree = matrix_tree()
  checkpoint.save(tmp_path / "a", tree)
  file = tmp_path / "a" / "0" / "record" / "metadata"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 3}))
  with pytest.raises(CheckpointError, match=r"version 3; this jaxlora reads up to 2: install a newer"):
    checkpoint.restore(tmp_path / "a", base)
