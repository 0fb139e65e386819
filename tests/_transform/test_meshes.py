"""Sharded weights and data: meshes of every kind of axis, `shard_map`, and shardings that the user wrote down."""

import dataclasses
import functools

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._jax import trace_cache
from tests import helpers
from tests.helpers import one_weight, square_weights

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


def test_name_stacks_and_shardings_of_inner_jits_survive():
  mesh = helpers.mesh_of(data=8)
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  inner = jax.jit(lambda p, x: jnp.tanh(x @ p["w"]), in_shardings=(None, sharding), out_shardings=sharding)

  def fn(p, x):
    with jax.named_scope("my_layer"):
      return inner(p, x)

  tree, x = one_weight(), helpers.array(3, (16, 5), jnp.float32)
  compiled = jax.jit(jaxlora.wrap(fn, on_materialize="error")).lower(tree, x).compile()
  assert "my_layer" in compiled.as_text()
  out = compiled(tree, x)
  assert out.sharding.is_equivalent_to(sharding, out.ndim)
  helpers.assert_close(np.asarray(out), np.asarray(fn(jaxlora.merge(tree), x)), 1e-5)


def model_of(build):
  """A function, its adapted tree, and data of four rows."""
  x = helpers.array(2, (4, 3, 6), jnp.float32)
  if build == "dense":
    return lambda p, x: jnp.tanh(x @ p["w"]), one_weight((6, 8)), x
  module = nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8, out_features=6)
  params = jax.jit(module.init)(KEY, x)["params"]
  fn = lambda p, x: module.apply({"params": p}, x)
  return fn, helpers.adapted(params, rank=2, targets=".*/kernel", probe=lambda p: fn(p, x)), x


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("role", ["i", "o", None])
@pytest.mark.parametrize("build", ["dense", "attention"])
def test_sharded_bases_and_batches(role, build):
  """Every base is split along its first axis of a role, heads among them, or not at all; the batch along its rows."""
  mesh = helpers.mesh_of(data=2, model=2)
  place = functools.partial(helpers.place, mesh)
  fn, tree, x = model_of(build)
  expected = fn(jaxlora.merge(tree), x)

  def placed(node):
    if not isinstance(node, jaxlora.LoraWeight):
      return node
    names = ["model" if role is not None and d == node.roles.index(role) else None for d in range(node.ndim)]
    return dataclasses.replace(node, base=place(node.base, *names))

  sharded = jax.tree.map(placed, tree, is_leaf=lambda node: isinstance(node, jaxlora.LoraWeight))
  bases = [weight.base for weight in helpers.lora_weights(sharded)]
  assert len(bases) == {"dense": 1, "attention": 4}[build]
  assert all(base.sharding.is_fully_replicated == (role is None) for base in bases)
  got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(sharded, place(x, "data"))
  helpers.assert_close(np.asarray(got), np.asarray(expected), 1e-5)


@pytest.mark.parametrize("spec", [("model", None), (None, "model")])
def test_shard_map_over_the_weights_own_axes(spec):
  """Tensor parallelism by hand: the base split along inputs or outputs, the factors along what they hold of it."""
  mesh = helpers.mesh_of(model=2)
  partition = jax.sharding.PartitionSpec
  over_inputs = spec[0] == "model"

  def local(p, x):
    y = x @ p["w"]
    return lax.psum(y, "model") if over_inputs else y

  def fn(p, x):
    data, out = (partition(None, "model"), partition()) if over_inputs else (partition(), partition(None, "model"))
    return jax.shard_map(local, mesh=mesh, in_specs=({"w": partition(*spec)}, data), out_specs=out)(p, x)

  tree = one_weight((6, 8))
  helpers.check(fn, tree, (helpers.array(2, (4, 6), jnp.float32),), 1e-5)


def test_explicit_sharding():
  mesh = helpers.mesh_of(jax.sharding.AxisType.Explicit, data=2, time=2)
  with jax.set_mesh(mesh):
    tree = one_weight()
    x = jax.device_put(helpers.array(2, (4, 6, 5), jnp.float32), jax.sharding.PartitionSpec("data", "time", None))
    fn = lambda p, x: x @ p["w"]
    got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(tree, x)
    helpers.assert_close(np.asarray(got), np.asarray(fn(jaxlora.merge(tree), x)), 1e-5)


def test_jits_of_one_function_keep_their_own_shardings():
  mesh = helpers.mesh_of(data=8)
  place = lambda *names: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
  layer = lambda w, x: jnp.tanh(x @ w)
  apart, together = (jax.jit(layer, out_shardings=sharding) for sharding in (place("data"), place()))
  fn = lambda p, x: (apart(p["layer_0"], x), together(p["layer_1"], x))
  outs = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(square_weights(2), helpers.array(3, (16, 5), jnp.float32))
  assert [
    out.sharding.is_equivalent_to(place(*names), 2) for out, names in zip(outs, (("data",), ()), strict=True)
  ] == [
    True,
    True,
  ]


def test_shards_of_data_have_dropout_masks_of_their_own():
  mesh = helpers.mesh_of(data=2)
  spec = jax.sharding.PartitionSpec
  local = lambda p, x: x @ p["w"]
  fn = lambda p, x: jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))(p, x)
  out = jaxlora.wrap(fn, dropout_key=KEY)(one_weight(dropout=0.5), jnp.ones((2, 5)))
  assert not np.allclose(out[0], out[1])


def test_explicit_sharding_of_results():
  """A lookup and a row-parallel product that say how their results are sharded."""
  mesh = helpers.mesh_of(jax.sharding.AxisType.Explicit, data=2, model=2)
  spec = jax.sharding.PartitionSpec
  with jax.set_mesh(mesh):
    put = functools.partial(helpers.place, mesh)
    w = one_weight((6, 8), alpha=None)["w"]
    rows = jaxlora.LoraWeight(put(w.base, "model"), put(w.a, None, "model"), put(w.b), rank=2, alpha=w.alpha)
    whole = jaxlora.LoraWeight(put(w.base), put(w.a), put(w.b), rank=2, alpha=w.alpha)
    take = lambda p, ids: p["w"].at[ids].get(out_sharding=spec("data", None))
    product = lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=spec("data", None))
    x = helpers.array(2, (4, 6), jnp.float32)
    merged = jaxlora.merge({"w": w})["w"]
    for fn, weight, data, want in (
      (take, whole, put(jnp.arange(4), "data"), merged[:4]),
      (product, rows, put(x, "data", "model"), x @ merged),
    ):
      got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))({"w": weight}, data)
      assert jax.typeof(got).sharding.spec == spec("data", None)
      helpers.assert_close(np.asarray(got), np.asarray(want), 1e-5)


@pytest.mark.usefixtures("fresh_traces")
def test_layers_that_are_alike_share_a_trace_on_explicit_meshes():
  """How a product is sharded is a value: equal for layers that are alike."""
  mesh = helpers.mesh_of(jax.sharding.AxisType.Explicit, data=2)
  misses = []
  with jax.set_mesh(mesh):
    x = jax.device_put(helpers.array(3, (4, 5), jnp.float32), jax.sharding.PartitionSpec("data", None))
    for layers in (2, 4):
      tree = square_weights(layers)

      def fn(p, x, layers=layers):
        for k in range(layers):
          x = x @ p[f"layer_{k}"]
        return x

      trace_cache._once.cache_clear()
      jax.jit(jaxlora.wrap(fn, on_materialize="error")).trace(tree, x)
      misses.append(trace_cache._once.cache_info().misses)
  assert misses[0] == misses[1] > 0
