"""Sharded weights and data: meshes of every kind of axis, `shard_map`, and shardings that the user wrote down."""

import dataclasses
import functools

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
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


@pytest.mark.parametrize("spec", [("model", None), (None, "model"), (None, None)])
@pytest.mark.parametrize("build", ["dense", "attention"])
def test_sharded_bases_and_batches(spec, build):
  mesh = helpers.mesh_of(data=2, model=2)
  place = functools.partial(helpers.place, mesh)
  tree = one_weight((6, 8))
  x = helpers.array(2, (4, 3, 6), jnp.float32)
  fn = lambda p, x: jnp.tanh(x @ p["w"])
  expected = fn(jaxlora.merge(tree), x)
  placed = {"w": dataclasses.replace(tree["w"], base=place(tree["w"].base, *spec))}
  got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(placed, place(x, "data"))
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
