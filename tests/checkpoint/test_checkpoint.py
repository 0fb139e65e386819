"""Checkpoints: exact round trips, wrong bases, damaged files, full disks, and processes killed in the middle."""

import contextlib
import dataclasses
import itertools
import json
import os
from pathlib import Path
import random
import resource
import shutil
import signal
import subprocess
import tempfile
import time
from typing import Any, NamedTuple

from flax import linen as nn
from flax import serialization
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import jaxlora
from jaxlora import checkpoint
from jaxlora._variants import VARIANTS
from jaxlora.checkpoint import CheckpointError, CheckpointWarning, Manager
from tests.helpers import array, trained
from tests.helpers.forks import Forks, numbered


class Pair(NamedTuple):
  left: Any
  right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
  kernel: Any
  inner: Any
  name: str = dataclasses.field(metadata={"static": True}, default="block")


def make_params():
  return {
    "block": Block(
      array(1, (6, 5), jnp.float32), [array(2, (5, 4), jnp.bfloat16), None, {"bias": array(3, (4,), jnp.float32)}]
    ),
    "pair": Pair(array(4, (3, 4, 5), jnp.float32), (array(5, (2, 3, 7), jnp.float32),)),
    "box": nn.Partitioned(array(6, (4, 5), jnp.float32), names=("a", "b")),
    "step": jnp.int32(3),
    "key": jax.random.key(5),
    "temperature": array(7, (), jnp.float32),
  }


CONFIG = jaxlora.LoraConfig(
  rank=2,
  alpha=3,
  targets=["kernel", "inner/0", "pair", "box"],
  axes={"pair/left": "sio", "pair/right/0": "iio"},
  train=["bias", "temperature"],
  scaling="rslora",
  overrides={
    "box": {"rank": 3, "alpha": 1.5, "dropout": 0.25, "dtype": "bfloat16"},
    "block/kernel": {"scaling": "standard"},
  },
)


@pytest.fixture(scope="module")
def params():
  return make_params()


@pytest.fixture(scope="module")
def tree(params):
  return trained(jaxlora.adapt(params, CONFIG, jax.random.key(0)))


def assert_same(got, want):
  """The same structure, static fields included, and the same bits."""
  got_leaves, got_def = jax.tree.flatten(got)
  want_leaves, want_def = jax.tree.flatten(want)
  assert got_def == want_def
  for x, y in zip(got_leaves, want_leaves, strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def matrix_tree(value=1.0, shape=(6, 4)):
  """A tree without a compilation: one adapted matrix with NumPy factors."""
  base = {"w": np.arange(np.prod(shape), dtype=np.float32).reshape(shape), "b": np.zeros(3, np.float32)}
  factors = {"a": np.full((2, shape[0]), value, np.float32), "b": np.full((2, shape[1]), value, np.float32)}
  return base, base | {"w": jaxlora.LoraWeight(base["w"], **factors, rank=2, alpha=2.0)}


# ----------------------------------------------------------------------------------------------------------------------
# Round trips.


def test_every_container_and_node_comes_back_bit_for_bit(tmp_path, params, tree):
  checkpoint.save(tmp_path / "deep" / "adapter", tree, metadata={"task": "é", "scores": [1, 2.5, None]})
  restored = checkpoint.restore(tmp_path / "deep" / "adapter", params)
  assert_same(restored, tree)
  assert restored["block"].kernel.base is params["block"].kernel
  assert restored["box"].value.dropout == 0.25


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "lora"])
def test_every_variant_and_its_halves_come_back(tmp_path, variant):
  params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32"))}
  config = jaxlora.LoraConfig(rank=2, variant=variant, axes={"kernel": "sio"})
  tree = jaxlora.adapt(params, config, jax.random.key(0))
  checkpoint.save(tmp_path / "a", tree)
  back = checkpoint.restore(tmp_path / "a", params)
  assert_same(back, tree)
  assert_same(jaxlora.join(*jaxlora.split(back)), tree)


def test_starting_factors_come_back(tmp_path):
  params = {"kernel": jnp.asarray(np.random.default_rng(0).normal(size=(6, 8)).astype("float32"))}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, init="pissa"), jax.random.key(0))
  checkpoint.save(tmp_path / "a", tree)
  assert_same(checkpoint.restore(tmp_path / "a", params), tree)


def test_contents_need_no_base(tmp_path, params, tree):
  checkpoint.save(tmp_path / "a", tree, metadata={"task": "é"})
  found = checkpoint.contents(tmp_path / "a")
  assert found.metadata == {"task": "é"}
  assert not found.training
  assert found.versions == {"version": 1, "jaxlora": jaxlora.__version__, "jax": jax.__version__}
  assert found.base == checkpoint.fingerprint(params)
  assert list(found.leaves) == [
    "block/kernel",
    "block/inner/0",
    "block/inner/2/bias",
    "box",
    "pair/left",
    "pair/right/0",
    "temperature",
  ]
  node = found.leaves["pair/left"]
  assert (node.roles, node.rank, node.alpha, node.scaling, node.base.shape) == ("sio", 2, 3.0, "rslora", (3, 4, 5))
  assert np.array_equal(node.a, tree["pair"].left.a)


def test_the_base_is_not_written(tmp_path):
  base = {"w": np.random.default_rng(0).standard_normal((600, 500)).astype(np.float32)}
  factors = {"a": np.ones((2, 600), np.float32), "b": np.ones((2, 500), np.float32)}
  checkpoint.save(tmp_path / "a", {"w": jaxlora.LoraWeight(base["w"], **factors, rank=2, alpha=2.0)})
  assert sum(file.stat().st_size for file in (tmp_path / "a").rglob("*") if file.is_file()) < base["w"].nbytes / 20


FLOATS = ["float16", "bfloat16", "float32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "float8_e3m4"]


def test_every_dtype_and_shape(tmp_path):
  whole = [*FLOATS, "float4_e2m1fn", "complex64"]
  params = {dtype: np.arange(6).reshape(2, 3).astype(dtype) for dtype in whole}
  params |= {"scalar": np.float32(2.5), "empty": np.zeros((0, 3), np.float32)}
  params |= {
    "int8": np.arange(-3, 3, dtype=np.int8),
    "int4": np.arange(-3, 3).astype("int4"),
    "bool": np.array([True, False]),
  }
  tree = {
    path: leaf if path in ("int8", "int4", "bool") else jaxlora.FullWeight(base=leaf, value=jnp.asarray(leaf + leaf))
    for path, leaf in params.items()
  }
  for dtype in FLOATS:
    factor = jnp.asarray(np.arange(8).reshape(2, 4).astype(dtype))
    params[f"low {dtype}"] = np.ones((4, 4), np.float32)
    tree[f"low {dtype}"] = jaxlora.LoraWeight(params[f"low {dtype}"], factor, factor, rank=2, alpha=1.0)
  checkpoint.save(tmp_path / "a", tree)
  assert_same(checkpoint.restore(tmp_path / "a", params), tree)


def test_double_precision_is_not_narrowed(tmp_path, x64):
  base = {"w": jnp.ones((3, 4), jnp.float64)}
  factors = {"a": jnp.full((1, 3), 0.1, jnp.float64), "b": jnp.full((1, 4), 0.1, jnp.float64)}
  tree = {"w": jaxlora.LoraWeight(base["w"], **factors, rank=1, alpha=1.0)}
  checkpoint.save(tmp_path / "a", tree)
  assert_same(checkpoint.restore(tmp_path / "a", base), tree)
  with jax.enable_x64(False), pytest.raises(CheckpointError, match="jax_enable_x64"):
    checkpoint.restore(tmp_path / "a", base)


def test_factors_are_sharded_as_their_base(tmp_path):
  mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
  put = lambda value, *spec: jax.device_put(value, NamedSharding(mesh, P(*spec)))
  plain = {"w": np.ones((8, 12), np.float32), "s": np.ones((2, 8, 3, 4), np.float32), "b": np.ones(8, np.float32)}
  config = jaxlora.LoraConfig(rank=2, targets=["w", "s"], train=["b"], axes={"s": "sioo"})
  saved = trained(jaxlora.adapt(plain, config, jax.random.key(0)))
  params = {
    "w": put(plain["w"], "x", "y"),
    "s": put(plain["s"], "x", None, None, "y"),
    "b": put(plain["b"], ("x", "y")),
  }
  on_mesh = jaxlora.LoraWeight(
    params["w"], put(saved["w"].a, None, "x"), put(saved["w"].b, None, "y"), rank=2, alpha=2.0
  )
  checkpoint.save(tmp_path / "a", saved | {"w": on_mesh})
  restored = checkpoint.restore(tmp_path / "a", params)
  assert_same(restored, saved)
  where = lambda value: value.sharding
  assert where(restored["w"].a) == NamedSharding(mesh, P(None, "x"))
  assert where(restored["w"].b) == NamedSharding(mesh, P(None, "y"))
  assert where(restored["s"].a) == NamedSharding(mesh, P("x", None, None))
  assert where(restored["s"].b) == NamedSharding(mesh, P("x", None, None, "y"))
  assert where(restored["b"].value) == params["b"].sharding
  with Manager(tmp_path / "run") as manager:  # the optimizer state goes where its template is
    manager.save(1, saved, {"moment": plain["w"]})
    moment = manager.restore(params, {"moment": params["w"]}).opt_state["moment"]
  assert where(moment) == params["w"].sharding
  on_one = jax.device_put(plain, jax.devices()[3])
  assert checkpoint.restore(tmp_path / "a", on_one)["w"].a.devices() == {jax.devices()[3]}
  assert not checkpoint.restore(tmp_path / "a", jax.tree.map(jnp.asarray, plain))["w"].a.committed


def test_flax_serialization_and_tree_util_round_trips(params, tree):
  blank = jaxlora.adapt(params, CONFIG, jax.random.key(9))
  del blank["key"], tree["key"]  # flax has no form for random keys
  try:
    assert_same(serialization.from_state_dict(blank, serialization.to_state_dict(tree)), tree)
    plain = {name: tree[name] for name in ("pair", "box", "temperature")}
    back = serialization.from_bytes({name: blank[name] for name in plain}, serialization.to_bytes(plain))
    assert_same(back, plain)
    _, trainable = jaxlora.split(plain)
    assert_same(
      serialization.from_bytes(jaxlora.split(blank)[1]["pair"], serialization.to_bytes(trainable["pair"])),
      trainable["pair"],
    )
    leaves, treedef = jax.tree_util.tree_flatten_with_path(tree)
    assert_same(jax.tree_util.tree_unflatten(treedef, [leaf for _, leaf in leaves]), tree)
    places = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    assert {"block/kernel/a", "block/inner/2/bias/value", "pair/right/0/base"} <= set(places)
  finally:
    tree["key"] = params["key"]


# ----------------------------------------------------------------------------------------------------------------------
# Fingerprints.


def test_the_fingerprint_is_its_formula():
  x = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)

  def mix(word):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      word = (word ^ (word >> shift)) * factor % 2**32
    return word ^ (word >> 16)

  digest = ""
  for lane in (0x243F6A88, 0x85A308D3):
    total = 0
    for place in itertools.product(*map(range, x.shape)):
      seed = lane
      for index in place:
        seed = mix(seed ^ ((index + 1) * 0x9E3779B9 % 2**32))
      total += mix(int(x[place].view(np.uint32)) ^ seed)
    digest += f"{total % 2**32:08x}"
  assert checkpoint.fingerprint({"x": x}) == {"x": f"float32[2,3,2]:{digest}"}


WORDS = ["bfloat16", "float8_e4m3fn", "float4_e2m1fn", "int8", "uint4", "bool", "complex64", "int64", "float64"]


@pytest.mark.parametrize("dtype", WORDS)
def test_fingerprints_of_numpy_and_jax_arrays_agree_and_see_every_element(dtype):
  x = np.arange(6).reshape(2, 3).astype(dtype)
  with jax.enable_x64(True):
    on_device = jnp.asarray(x)
  assert on_device.dtype == x.dtype
  assert checkpoint.fingerprint({"x": x}) == checkpoint.fingerprint({"x": on_device})
  seen = {checkpoint.fingerprint({"x": x})["x"]}
  for place in np.ndindex(x.shape):
    changed = x.copy()
    changed[place] = (x[place] == 0) if dtype == "bool" else x[(place[0] + 1) % 2, place[1]]
    seen.add(checkpoint.fingerprint({"x": changed})["x"])
  assert len(seen) == 7


def test_fingerprints_depend_on_no_sharding_and_are_remembered():
  x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
  want = checkpoint.fingerprint({"x": x})
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    for spec in (P("x", "y"), P(None, ("x", "y"))):
      sharded = jax.device_put(x, NamedSharding(mesh, spec))
      assert checkpoint.fingerprint({"x": sharded}) == want
      with jax.log_compiles(False), jax.transfer_guard("disallow"):
        assert checkpoint.fingerprint({"x": sharded}) == want  # nothing moves any more
  rows = np.arange(3 * 2**20, dtype=np.uint8).reshape(3, -1)  # several pieces
  assert checkpoint.fingerprint({"x": rows}) == checkpoint.fingerprint({"x": jnp.asarray(rows)})


def test_what_is_no_array_is_told_by_type():
  found = checkpoint.fingerprint(
    {"n": 3, "f": jnp.tanh, "s": jax.ShapeDtypeStruct((2,), "float32"), "k": jax.random.key(0)}
  )
  assert found["s"] == "float32[2]"
  assert ":" not in found["f"]
  assert found["n"] != checkpoint.fingerprint({"n": 4})["n"]
  assert found["k"] != checkpoint.fingerprint({"k": jax.random.key(1)})["k"]


# ----------------------------------------------------------------------------------------------------------------------
# Wrong bases, wrong calls.


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
  file.write_text(json.dumps(json.loads(file.read_text()) | {"version": 2}))
  with pytest.raises(CheckpointError, match=r"version 2; this jaxlora reads up to 1: install a newer"):
    checkpoint.restore(tmp_path / "a", base)


# ----------------------------------------------------------------------------------------------------------------------
# Training state.


class Small(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(jnp.tanh(nn.Dense(8)(x)))


def training(tx):
  """A loop with dropout whose key is carried along, over data whose position is."""
  apply = lambda params, x, key: jaxlora.wrap(Small().apply, dropout_key=key)({"params": params}, x)

  @jax.jit
  def step(trainable, opt_state, key, frozen, x):
    key, now = jax.random.split(key)
    loss = lambda t: jnp.mean(apply(jaxlora.join(frozen, t), x, now) ** 2)
    value, grads = jax.value_and_grad(loss)(trainable)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, key, value

  def loop(steps, state, frozen, data):
    *state, index = state
    losses = []
    for _ in range(steps):
      *state, loss = step(*state, frozen, data[index : index + 4])
      index += 4
      losses.append(float(loss))
    return (*state, index), losses

  return loop


@pytest.mark.usefixtures("lenient")  # optax.add_noise promotes
def test_20_steps_are_10_and_10_bit_for_bit(tmp_path):
  data = np.random.default_rng(0).standard_normal((80, 5)).astype(np.float32)
  weights = lambda seed, *shape: {"kernel": array(seed, shape, jnp.float32), "bias": jnp.zeros(shape[-1])}
  params = {"Dense_1": weights(1, 5, 8), "Dense_0": weights(2, 8, 3)}
  config = jaxlora.LoraConfig(rank=2, dropout=0.3, targets=["Dense_0", "Dense_1"], train=["bias"])
  frozen, trainable = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(1)))
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), optax.add_noise(1e-3, 0.5, jax.random.key(3)))
  train = training(tx)
  start = (trainable, tx.init(trainable), jax.random.key(2), 0)
  straight, losses = train(20, start, frozen, data)

  half, first = train(10, start, frozen, data)
  with Manager(tmp_path / "run", max_to_keep=2, save_interval_steps=10) as manager:
    assert manager.latest_step() is None
    assert manager.save(10, jaxlora.join(frozen, half[0]), half[1], data={"index": half[3]}, key={"dropout": half[2]})
    assert not manager.save(11, jaxlora.join(frozen, half[0]), half[1])
  with Manager(tmp_path / "run") as manager:
    state = manager.restore(params, lambda tree: tx.init(jaxlora.split(tree)[1]))
  assert (state.step, state.data) == (10, {"index": 40})
  frozen, trainable = jaxlora.split(state.tree)
  end, second = train(10, (trainable, state.opt_state, state.key["dropout"], state.data["index"]), frozen, data)
  assert_same(end[:3], straight[:3])
  assert first + second == losses
  assert len(set(losses)) == 20


def test_saving_goes_on_behind_while_the_state_is_donated(tmp_path):
  base, tree = matrix_tree(5.0)
  base, tree = jax.tree.map(jnp.asarray, (base, tree))
  own = np.full(1000, 7.0, np.float32)
  spoil = jax.jit(lambda leaves: jax.tree.map(lambda x: x * 0 - 1, leaves), donate_argnums=0)
  with Manager(tmp_path / "run") as manager:
    manager.save(1, tree, {"own": own, "count": 3})
    spoil((tree["w"].a, tree["w"].b))
    own[:] = -1
    state = manager.restore(base, {"own": own, "count": 0})
  assert (np.asarray(state.tree["w"].a) == 5).all()
  assert (state.opt_state["own"] == 7).all()
  assert state.opt_state["count"] == 3


def test_manager_keeps_the_latest_and_says_what_is_wrong(tmp_path):
  base, tree = matrix_tree()
  with Manager(tmp_path / "run", max_to_keep=2) as manager:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
      manager.restore(base)
    for step in (1, np.int32(2), jnp.int32(5)):
      assert manager.save(
        step, tree, {"m": np.ones(2, np.float32)}, key=jax.random.key(step), metadata={"s": int(step)}
      )
    assert manager.all_steps() == [2, 5]
    assert manager.restore(base, step=2).metadata == {"s": 2}
    assert manager.restore(base).opt_state is None
    with pytest.raises(CheckpointError, match="found step 5, expected one above the latest, 5"):
      manager.save(5, tree)
    with pytest.raises(CheckpointError, match=r"step is 1\.5"):
      manager.save(1.5, tree)
    with pytest.raises(CheckpointError, match=r"data\['rng'\]"):
      manager.save(6, tree, data={"rng": np.ones(2)})
    with pytest.raises(CheckpointError, match="expected a random key"):
      manager.save(6, tree, key=3)
    with pytest.raises(CheckpointError, match=r"another structure.*m \(saved float32\[2\], expected float32\[3\]\)"):
      manager.restore(base, {"m": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"v \(saved nothing"):
      manager.restore(base, {"v": np.ones(2, np.float32)})
    assert manager.save(6, tree)
    assert manager.latest_step() == 6


def test_numpy_generators_resume(tmp_path):
  base, tree = matrix_tree()
  rng = np.random.default_rng(0)
  with Manager(tmp_path / "run") as manager:
    manager.save(1, tree, data=rng.bit_generator.state)
    want = rng.random(3)
    other = np.random.default_rng()
    other.bit_generator.state = manager.restore(base).data
  assert np.array_equal(other.random(3), want)


# ----------------------------------------------------------------------------------------------------------------------
# Damage.


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # where one read of orbax's fails
def test_altered_and_truncated_files_are_errors_or_do_not_matter(tmp_path):
  """Every file, cut short, altered in the middle, and deleted: the values that were saved, or a `CheckpointError`."""
  base, tree = matrix_tree(shape=(64, 48))
  tree["w"].a[:] = np.random.default_rng(0).standard_normal((2, 64))
  with Manager(tmp_path / "run", asynchronous=False) as manager:
    for step in (1, 2):
      manager.save(step, tree, {"m": tree["w"].a}, data=step)
  good = shutil.copytree(tmp_path / "run", tmp_path / "good")
  files = sorted(file.relative_to(good) for file in (good / "2").rglob("*") if file.is_file())
  failed = {}
  for file in files:
    content = (good / file).read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :] if content else b"x"
    for kind, damaged in (("cut", content[:middle]), ("altered", altered), ("deleted", None)):
      target = tmp_path / "run" / file
      target.unlink() if damaged is None else target.write_bytes(damaged)
      with Manager(tmp_path / "run") as manager:
        try:
          assert_same(manager.restore(base, {"m": tree["w"].a}).tree, jax.tree.map(jnp.asarray, tree))
        except CheckpointError:
          failed[str(file), kind] = True
          assert manager.restore(base, step=1).data == 1  # the earlier one stands
      target.write_bytes(content)
  for kind in ("cut", "altered", "deleted"):
    assert failed["2/record/metadata", kind]
    for item in ("adapter", "training"):
      assert sum(path.startswith(f"2/{item}/") and k == kind for path, k in failed) >= 2


def test_values_altered_within_a_sound_file_are_an_error(tmp_path):
  """What tensorstore has no reason to doubt: arrays of another save, under the record of this one."""
  base, tree = matrix_tree(1.0)
  checkpoint.save(tmp_path / "a", tree)
  checkpoint.save(tmp_path / "b", matrix_tree(2.0)[1])
  shutil.rmtree(tmp_path / "a" / "0" / "adapter")
  shutil.copytree(tmp_path / "b" / "0" / "adapter", tmp_path / "a" / "0" / "adapter")
  with pytest.raises(CheckpointError, match=r"w \(a\).*damaged or altered"):
    checkpoint.restore(tmp_path / "a", base)
  record = tmp_path / "b" / "0" / "record" / "metadata"
  record.write_text(record.read_text().replace('"alpha": 2.0', '"alpha": 8.0'))
  with pytest.raises(CheckpointError, match="the record is not the one that was saved"):
    checkpoint.restore(tmp_path / "b", base)


# ----------------------------------------------------------------------------------------------------------------------
# Disks that are full, folders that cannot be written.


@contextlib.contextmanager
def small_disk(folder: Path):
  mounted = shutil.which("mount") and subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, check=False
  )
  if not mounted or mounted.returncode:
    pytest.skip("mounting a small tmpfs is not permitted here")
  try:
    yield lambda: contextlib.nullcontext()
  finally:
    subprocess.run(["umount", folder], check=True)


@contextlib.contextmanager
def small_files(folder: Path):
  """The kernel lets no file grow beyond 32 KiB while the limit holds."""

  @contextlib.contextmanager
  def limited():
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (32 * 1024, before[1]))
    try:
      yield
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, before)

  yield limited


# Where one write fails, orbax closes the loop that the others report to.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("disk", [small_disk, small_files])
def test_on_a_full_disk_the_earlier_checkpoint_stands(tmp_path, disk):
  base, small = matrix_tree(3.0)
  noise = np.random.default_rng(0).standard_normal((2, 100_000)).astype(np.float32)  # does not compress
  large_base = {"w": np.zeros((100_000, 4), np.float32)}
  large = {"w": jaxlora.LoraWeight(large_base["w"], noise, small["w"].b, rank=2, alpha=1.0)}
  (tmp_path / "disk").mkdir()
  with disk(tmp_path / "disk") as limited:
    checkpoint.save(tmp_path / "disk" / "a", small)
    with limited(), pytest.raises(CheckpointError, match="cannot be written; what was there before stands"):
      checkpoint.save(tmp_path / "disk" / "a", large)
    assert checkpoint.restore(tmp_path / "disk" / "a", base)["w"].a[0, 0] == 3
    checkpoint.save(tmp_path / "disk" / "a", matrix_tree(4.0)[1])
    assert checkpoint.restore(tmp_path / "disk" / "a", base)["w"].a[0, 0] == 4

    manager = Manager(tmp_path / "disk" / "run", max_to_keep=1)
    manager.save(1, small)
    manager.wait()
    with limited(), pytest.raises(CheckpointError, match="earlier steps stand"):
      manager.save(2, large) and manager.wait()
    assert manager.all_steps() == [1]
    assert sorted(os.listdir(tmp_path / "disk" / "run")) == ["1"]
    assert manager.restore(base).step == 1
    manager.save(3, small)
    assert manager.all_steps() == [3]
    manager.close()
    assert sorted(os.listdir(tmp_path / "disk" / "run")) == ["3"]


@contextlib.contextmanager
def without_root():
  """Root may write anywhere: for a while, be nobody."""
  if os.geteuid():
    yield
    return
  os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(0)


def test_a_folder_that_cannot_be_written_is_an_error():
  base, tree = matrix_tree(3.0)
  with tempfile.TemporaryDirectory(dir="/tmp") as name:
    folder = Path(name)
    checkpoint.save(folder / "a", tree)
    places = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
    for path in places:
      path.chmod(0o555)
    try:
      with without_root():
        with pytest.raises(CheckpointError, match="cannot be written; what was there before stands: PermissionError"):
          checkpoint.save(folder / "a", matrix_tree(4.0)[1])
        with pytest.raises(CheckpointError, match="PermissionError"):
          Manager(folder / "run")
        assert checkpoint.restore(folder / "a", base)["w"].a[0, 0] == 3
    finally:
      for path in places:
        path.chmod(0o755)


# ----------------------------------------------------------------------------------------------------------------------
# Killed.

KILLS = 25  # for each of the two ways to save


@pytest.fixture(scope="module")
def forks():
  with contextlib.closing(Forks()) as started:
    yield started


@pytest.mark.parametrize("job", ["save_on", "train_on"])
def test_killed_at_any_moment_the_latest_complete_checkpoint_restores(tmp_path, forks, job):
  """A process that saves the numbers 1, 2, 3, ... is killed again and again, and another goes on where it stopped."""
  rng, path = random.Random(job), tmp_path / "a"
  params, _ = numbered(0)
  latest, in_the_middle, length = 0, 0, 0.0
  for kill in range(KILLS + 1):
    lines = forks.run(job, str(path), *([latest] if job == "save_on" else []))
    pid, ready = next(lines), next(lines)
    assert (pid[0], ready) == ("pid", ["ready"])
    started = time.monotonic()
    said = []
    if not kill:  # the first one tells how long a save takes
      said = [next(lines), next(lines), next(lines)]
      length = (time.monotonic() - started) / 3
    time.sleep(rng.uniform(0, 2 * length))
    os.kill(pid[1], signal.SIGKILL)
    said += list(lines)
    assert said[-1] == ["gone", signal.SIGKILL]
    in_the_middle += any("tmp" in name for name in os.listdir(path))
    acknowledged = max([latest, *(line[1] for line in said[:-1])])
    if job == "save_on":
      tree = checkpoint.restore(path, params)
      numbers = [checkpoint.contents(path).metadata["number"]]
    else:
      with Manager(path, max_to_keep=2) as manager:
        state = manager.restore(params, {"moment": np.zeros((2, 8), np.float32)})
      tree = state.tree
      numbers = [state.step, state.data["number"], *np.unique(state.opt_state["moment"])]
      assert np.array_equal(state.key, [0, 7])
    factors = [np.asarray(part) for layer in tree.values() for part in (layer["kernel"].a, layer["kernel"].b)]
    numbers += [number for factor in factors for number in np.unique(factor)]
    assert len(set(numbers)) == 1  # of one save
    assert numbers[0] in (acknowledged, acknowledged + 1, acknowledged + 2)  # no completed save is lost
    latest = int(numbers[0])
  assert in_the_middle >= KILLS // 4
  assert latest >= 3
