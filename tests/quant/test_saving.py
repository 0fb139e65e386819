"""Quantised trees in checkpoints, PEFT folders, banks and Flax's state dicts."""

import dataclasses

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from tests import helpers

KEY = jax.random.key(0)
PARAMS = {
  "layers_0": {
    "q_proj": {"kernel": helpers.array(0, (64, 32), np.float32), "bias": helpers.array(0, (32,), np.float32, 0.0)}
  },
  "lm_head": {"kernel": helpers.array(1, (32, 16), np.float32)},
}
BASE = jaxlora.quantize(PARAMS, "nf4", targets=".*/kernel")
CONFIG = jaxlora.LoraConfig(rank=2, alpha=4, targets=["q_proj"])
X = jnp.ones((3, 64))


def model(p, x):
  layer = p["layers_0"]["q_proj"]
  return jnp.tanh(x @ layer["kernel"] + layer["bias"][None]) @ p["lm_head"]["kernel"]


@pytest.fixture(scope="module")
def tree():
  return helpers.trained(jaxlora.adapt(BASE, CONFIG, KEY))


def same(x, y):
  jax.tree.map(np.testing.assert_array_equal, x, y)


def test_checkpoints(tmp_path, tree):
  checkpoint.save(tmp_path / "a", tree)
  same(checkpoint.load(tmp_path / "a", BASE), tree)
  held = checkpoint.contents(tmp_path / "a")
  assert held.base["lm_head/kernel"].startswith("float32[32,16]:")
  assert held.leaves["layers_0/q_proj/kernel"].shape == (64, 32)


def test_another_base_is_an_error(tmp_path, tree):
  checkpoint.save(tmp_path / "a", tree)
  others = {
    "floats": PARAMS,
    "another format": jaxlora.quantize(PARAMS, "int8", targets=".*/kernel"),
    "without double quantisation": jaxlora.quantize(PARAMS, "nf4", targets=".*/kernel", double=False),
  }
  for base in others.values():
    with pytest.raises(checkpoint.CheckpointError, match=r"layers_0/q_proj/kernel \(adapted\): other values"):
      checkpoint.load(tmp_path / "a", base)
  with pytest.warns(checkpoint.CheckpointWarning, match="other values"):  # the remedy that the error names
    loose = checkpoint.load(tmp_path / "a", PARAMS, strict=False)
  same(loose["layers_0"]["q_proj"]["kernel"].a, tree["layers_0"]["q_proj"]["kernel"].a)


def test_fingerprints_tell_formats_codes_and_scales_apart():
  prints = checkpoint.fingerprint(BASE)
  assert prints.keys() == {"layers_0/q_proj/kernel", "layers_0/q_proj/bias", "lm_head/kernel"}
  leaf = BASE["lm_head"]["kernel"]
  changed = [
    leaf.with_parts({"codes": leaf.codes.at[0, 0].set(leaf.codes[0, 0] ^ 1)}),
    leaf.with_parts({"scales": leaf.scales.with_parts({"offset": leaf.scales.offset * 2})}),
    leaf.with_parts({"format": "int4", "codes": leaf.codes.astype(jnp.int4)}),
  ]
  found = {checkpoint.fingerprint({"lm_head": {"kernel": other}})["lm_head/kernel"] for other in changed}
  assert len(found | {prints["lm_head/kernel"]}) == 4
  like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), BASE)
  assert checkpoint.fingerprint(like)["lm_head/kernel"] == "float32[32,16]"


def test_training_runs(tmp_path, tree):
  import optax

  _, trainable = jaxlora.split(tree)
  opt_state = optax.sgd(0.1, momentum=0.9).init(trainable)
  with checkpoint.Manager(tmp_path / "run") as manager:
    manager.save(3, tree, opt_state)
  with checkpoint.Manager(tmp_path / "run") as manager:
    found = manager.restore(BASE, opt_state)
  same(found.tree, tree)
  same(found.opt_state, opt_state)


def test_peft_folders(tmp_path, tree):
  """The adapter alone is written: a folder does not say what its base was quantised to."""
  peft = pytest.importorskip("jaxlora.peft")
  peft.save(tmp_path / "codes", tree)
  peft.save(tmp_path / "floats", jaxlora.dequantize(tree))
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    assert (tmp_path / "codes" / name).read_bytes() == (tmp_path / "floats" / name).read_bytes()
  again = peft.load(tmp_path / "codes", BASE)
  same(again["layers_0"]["q_proj"]["kernel"].a, tree["layers_0"]["q_proj"]["kernel"].a)
  assert isinstance(again["layers_0"]["q_proj"]["kernel"].base, jaxlora.QuantizedArray)
  helpers.assert_close(jaxlora.wrap(model)(again, X), jaxlora.wrap(model)(tree, X), 1e-6)


def test_banks(tree):
  other = helpers.trained(jaxlora.adapt(BASE, CONFIG, jax.random.key(5)))
  bank = jaxlora.stack({"one": tree, "other": other})
  ids = bank.ids(["other", None, "one"])
  got = jax.jit(jaxlora.route(model))(BASE, bank, ids, X)
  apply = jaxlora.wrap(model)
  for row, expected in enumerate((other, BASE, tree)):
    helpers.assert_close(got[row], apply(expected, X[row : row + 1])[0], 1e-5)
  single = jaxlora.pad(tree, 4)
  helpers.assert_close(apply(single, X), apply(tree, X), 1e-5)


def test_arithmetic_and_svd(tree):
  plain = jaxlora.dequantize(tree)
  helpers.assert_close(jaxlora.spectrum(tree), jaxlora.spectrum(plain), 1e-5)
  half = jaxlora.combine([tree, tree], [0.5, 0.25])
  helpers.assert_close(jaxlora.wrap(model)(half, X), model(jaxlora.dequantize(jaxlora.merge(half)), X), 1e-5)
  small = jaxlora.compress(tree, rank=1)
  assert small["layers_0"]["q_proj"]["kernel"].rank == 1


def test_state_dicts(tree):
  state = serialization.to_bytes(tree)
  same(serialization.from_bytes(jax.tree.map(jnp.zeros_like, tree), state), tree)


def test_an_exported_function_takes_codes(tree):
  exported = jax.export.export(jax.jit(jaxlora.wrap(model)), platforms=["cpu", "tpu"])(tree, X)
  again = jax.export.deserialize(exported.serialize())
  helpers.assert_close(again.call(tree, X), jaxlora.wrap(model)(tree, X), 1e-5)


def test_trained_whole():
  config = jaxlora.LoraConfig(rank=2, targets=["q_proj"], train="lm_head/kernel")
  tree = jaxlora.adapt(BASE, config, KEY)
  node = tree["lm_head"]["kernel"]
  np.testing.assert_array_equal(node.value, node.base.dequantize())
  helpers.assert_close(jaxlora.wrap(model)(tree, X), model(jaxlora.dequantize(BASE), X), 1e-5)
  merged = jaxlora.merge(tree)
  assert merged["lm_head"]["kernel"].dtype == jnp.float32


def test_what_changed_is_told_from_floats():
  tuned = jaxlora.quantize(jax.tree.map(lambda x: x + 1, PARAMS), "nf4", targets=".*/kernel")
  with pytest.raises(ValueError, match=r"extract: layers_0/q_proj/kernel is quantised.*jaxlora.dequantize"):
    jaxlora.extract(BASE, tuned, rank=2)
  assert jaxlora.extract(jaxlora.dequantize(BASE), jaxlora.dequantize(tuned), rank=2) is not None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Watched:
  """Codes whose floats are formed inside of a program alone."""

  codes: jax.Array

  shape = property(lambda self: self.codes.shape)
  dtype = jnp.dtype(jnp.float32)

  def dequantize(self):
    assert isinstance(self.codes, jax.core.Tracer), "a base was formed outside of any program"
    return self.codes.astype(jnp.float32) / 8


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_starts_from_data_form_no_base_ahead(method):
  codes = jax.random.randint(KEY, (64, 64), -8, 8, jnp.int8)
  tree = jaxlora.adapt({"w": Watched(codes), "v": Watched(codes.T)}, jaxlora.LoraConfig(rank=2, targets="w"), KEY)
  fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["w"]) @ p["v"])
  found = jaxlora.init_from_data(tree, fn, [jax.random.normal(KEY, (8, 64))], KEY, method=method)
  assert found["w"].base.codes is codes
  assert not np.array_equal(found["w"].a, tree["w"].a)


@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_starts_from_data(method):
  """Codes stay as they are; the factors are those of the floats that they stand for."""
  tree = jaxlora.adapt(BASE, CONFIG, KEY)
  fn = lambda p, x: jnp.sum(model(p, x)) if method == "lora_ga" else model(p, x)
  batches = [jax.random.normal(jax.random.key(k), (8, 64)) for k in range(2)]
  got, want = (
    jaxlora.init_from_data(start, fn, batches, KEY, method=method) for start in (tree, jaxlora.dequantize(tree))
  )
  node, other = got["layers_0"]["q_proj"]["kernel"], want["layers_0"]["q_proj"]["kernel"]
  helpers.assert_close(node.delta(), other.delta(), 1e-4)
  assert node.base.codes is BASE["layers_0"]["q_proj"]["kernel"].codes
  assert got["lm_head"]["kernel"].codes is BASE["lm_head"]["kernel"].codes
