"""The example that decodes: one adapter is swapped mid-stream, and nobody else notices."""

import importlib.util
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers.paths import EXAMPLES

EXAMPLE = EXAMPLES / "decode.py"


@pytest.fixture(scope="module")
def decode():
  if not EXAMPLE.exists():
    pytest.skip("the examples are not beside the tests")
  with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
    spec = importlib.util.spec_from_file_location("decode", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module


@pytest.fixture(scope="module")
def served(decode):
  """A base and a bank as if trained."""
  tokens = jnp.zeros((1, decode.LENGTH), jnp.int32)
  params = jax.jit(decode.MODEL.init)(jax.random.key(0), tokens)["params"]
  config = jaxlora.LoraConfig(rank=2, alpha=4)
  tree = jaxlora.adapt(params, config, jax.random.key(1), probe=lambda p: decode.apply(p, tokens))
  trees = {name: helpers.trained(tree, seed) for seed, name in enumerate(("one", "two", "three"))}
  return SimpleNamespace(params=params, bank=jaxlora.stack(trees, capacity=9), trees=trees)


def test_a_swap_mid_stream_leaves_the_others_alone(decode, served):
  names, letters, step = [None, "one", "two", "one"], "aaqz", 8
  before = decode.generate(served.params, served.bank, names, letters)
  swapped = decode.generate(served.params, served.bank, names, letters, (step, "two", "three"))
  assert decode.write._cache_size() == 1
  for row, name in enumerate(names):
    if name != "two":
      assert swapped[row] == before[row]
  assert swapped[2][:step] == before[2][:step]
  assert swapped[2][step:] != before[2][step:]


def test_rows_write_what_their_adapter_writes_alone(decode, served):
  texts = decode.generate(served.params, served.bank, [None, "two"], "ab")
  apply = jax.jit(decode.MODEL.apply)
  for name, letter, text in ((None, "a", texts[0]), ("two", "b", texts[1])):
    params = served.params if name is None else jaxlora.merge(served.trees[name])
    whole = np.asarray([[decode.ALPHABET.index(letter) for letter in text]])
    logits = apply({"params": params}, whole)  # without a cache
    np.testing.assert_array_equal(logits[0, :-1].argmax(-1), whole[0, 1:])
    assert text[0] == letter


def test_it_trains_its_adapters_in_one_batch(decode, capsys):
  written = decode.main(["--steps", "3"])
  assert {len(texts) for texts in written.values()} == {5}
  assert "Functions compiled for writing:" in capsys.readouterr().out
