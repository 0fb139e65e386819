"""Checkpoints that earlier versions wrote are read.

`written_by_0_1_0.zip` holds `adapter`, by `checkpoint.save`, and `run`, by `Manager.save` at step 7, of the tree below:
a DoRA weight, a LoRA weight of two layers, a bias trained whole, and momentum.
"""

import pathlib
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from jaxlora import checkpoint
from tests.checkpoint.trees import assert_same

BASE = {
  "w": np.arange(12, dtype=np.float32).reshape(4, 3) / 8,
  "heads": np.arange(36, dtype=np.float32).reshape(2, 3, 2, 3) / 16,
  "bias": np.ones(3, np.float32),
}
CONFIG = jaxlora.LoraConfig(
  rank=2,
  alpha=6.0,
  targets=["w", "heads"],
  axes={"heads": "sioo"},
  train="bias",
  overrides={"w": {"variant": "dora", "scaling": "rslora", "dropout": 0.1}},
)
SHAPES = {"bias": {"value": (3,)}, "heads": {"a": (2, 2, 3), "b": (2, 2, 2, 3)}}
SHAPES["w"] = {"a": (2, 4), "b": (2, 3), "magnitude": (1, 3)}


def expected():
  """The tree, and its trainable half: each array counts up in quarters from its number among all of them."""
  tree = jaxlora.adapt(BASE, CONFIG, jax.random.key(0))
  order = [(leaf, part) for leaf in ("bias", "heads", "w") for part in SHAPES[leaf]]
  for number, (leaf, part) in enumerate(order):
    shape = SHAPES[leaf][part]
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 4 + number
    tree[leaf] = tree[leaf].with_parts({part: jnp.asarray(values)})
  return tree, jaxlora.split(tree)[1]


@pytest.fixture
def folder(tmp_path):
  with zipfile.ZipFile(pathlib.Path(__file__).with_name("written_by_0_1_0.zip")) as archive:
    archive.extractall(tmp_path)
  return tmp_path


def test_an_adapter_is_loaded(folder):
  tree, _ = expected()
  assert_same(checkpoint.load(folder / "adapter", BASE), jax.tree.map(jnp.asarray, tree))
  found = checkpoint.contents(folder / "adapter")
  assert found.metadata == {"task": "summaries"}
  assert found.versions["jaxlora"] == "0.1.0"
  assert found.base == checkpoint.fingerprint(BASE)
  assert repr(found.leaves["w"]) == "LoraWeight(4x3 io, rank 2, f32, dora, scale 4.24264, dropout 0.1)"


def test_a_run_is_resumed(folder):
  tree, trainable = expected()
  opt_state = optax.sgd(0.1, momentum=0.9).init(trainable)
  with checkpoint.Manager(folder / "run") as manager:
    state = manager.restore(BASE, jax.tree.map(lambda x: x + 1, opt_state))
    assert manager.latest_step() == 7
  assert (state.step, state.data, state.metadata) == (7, {"index": 640}, {"note": [1, 2]})
  assert_same(state.tree, jax.tree.map(jnp.asarray, tree))
  assert_same(state.opt_state, opt_state)
  assert_same(state.key, jax.random.key(3))


def test_the_state_of_optimizer_was_once_wrapped(tmp_path):
  """Earlier versions kept that of `tx` inside of masks: `(MaskedState(inner_state), MaskedState(EmptyState()))`."""
  tree, _ = expected()
  now = jaxlora.optimizer(optax.adam(0.1)).init(tree)
  then = (optax.MaskedState(jax.tree.map(lambda x: x + 1, now)), optax.MaskedState(optax.EmptyState()))
  with checkpoint.Manager(tmp_path / "run") as manager:
    assert manager.save(1, tree, then)
    manager.wait()
    assert_same(manager.restore(BASE, now).opt_state, jax.tree.map(lambda x: x + 1, now))
    assert_same(manager.restore(BASE, then).opt_state, then)


def test_the_older_name_of_load():
  assert checkpoint.restore is checkpoint.load
