"""What was saved comes back bit for bit: every container, node, dtype, variant and sharding."""

from flax import serialization
import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from jaxlora._weight.variant import VARIANTS
from jaxlora.checkpoint import CheckpointError, Manager
from tests.checkpoint.trees import CONFIG, assert_same
from tests.helpers import adapted


def test_every_container_and_node_comes_back_bit_for_bit(tmp_path, params, tree):
  checkpoint.save(tmp_path / "deep" / "adapter", tree, metadata={"task": "é", "scores": [1, 2.5, None]})
  restored = checkpoint.restore(tmp_path / "deep" / "adapter", params)
  assert_same(restored, tree)
  assert restored["block"].kernel.base is params["block"].kernel
  assert restored["box"].value.dropout == 0.25


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "lora"])
def test_every_variant_and_its_halves_come_back(tmp_path, variant):
  params = {"kernel": jax.device_put(np.random.default_rng(0).normal(size=(2, 6, 8)).astype("float32"))}
  config = jaxlora.LoraConfig(rank=2, variant=variant, axes={"kernel": "sio"})
  tree = jaxlora.adapt(params, config, jax.random.key(0))
  checkpoint.save(tmp_path / "a", tree)
  back = checkpoint.restore(tmp_path / "a", params)
  assert_same(back, tree)
  assert_same(jaxlora.join(*jaxlora.split(back)), tree)


def test_factors_of_one_shape_come_back_in_their_places(tmp_path):
  params = {"kernel": jnp.ones((6, 6))}
  tree = adapted(params, targets="kernel")
  checkpoint.save(tmp_path / "a", tree)
  assert_same(checkpoint.restore(tmp_path / "a", params), tree)


def test_starting_factors_come_back(tmp_path):
  params = {"kernel": jax.device_put(np.random.default_rng(0).normal(size=(6, 8)).astype("float32"))}
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
  saved = adapted(plain, targets=["w", "s"], train=["b"], axes={"s": "sioo"})
  params = {
    "w": put(plain["w"], "x", "y"),
    "s": put(plain["s"], "x", None, None, "y"),
    "b": put(plain["b"], ("x", "y")),
  }
  factors = {"a": put(saved["w"].a, None, "x"), "b": put(saved["w"].b, None, "y")}
  on_mesh = saved["w"].with_parts({"base": params["w"], **factors})
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
