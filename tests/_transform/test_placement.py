"""Weights that rest in the host's memory, that are sent elsewhere, and that come together from shards."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from tests import helpers
from tests.helpers import profiles

P, Space = jax.sharding.PartitionSpec, jax.memory.Space
pytestmark = pytest.mark.usefixtures("lenient")
X = helpers.normal(0, (4, 8), jnp.float32)
PARAMS = {"w": helpers.normal(1, (3, 8, 8), jnp.float32, 0.3), "b": helpers.normal(2, (8,), jnp.float32)}


def host():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def on_device():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0])


def each_layer(p, x):
  """MaxText's way: a scan over layers that rest on the host, each fetched when it is due."""
  layer = lambda x, w: (x + jnp.tanh(x @ jax.device_put(w, Space.Device)), None)
  return lax.scan(layer, x, p["w"])[0]


def each_layer_again(p, x):
  layer = jax.checkpoint(lambda x, w: x + jnp.tanh(x @ jax.device_put(w, Space.Device)))
  return lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0]


def all_at_once(p, x):
  p = jax.device_put(p, on_device())
  for k in range(3):
    x = x + jnp.tanh(x @ p["w"][k] + p["b"])
  return x


def there_and_back(p, x):
  doubled = jax.device_put(p["w"], Space.Device) * 2
  return x @ jax.device_put(jax.device_put(doubled, Space.Host, src=Space.Device), Space.Device)[0]


def formed_on_the_host(p, x):
  return x @ jax.device_put(jnp.tanh(p["w"]), Space.Device)[0]


named = lambda value: getattr(value, "__name__", str(value))
FROM_THE_HOST = (each_layer, each_layer_again, all_at_once, there_and_back, formed_on_the_host)
FIELDS = ({}, {"variant": "dora"}, {"init": "pissa"}, {"variant": "lokr"})


@pytest.mark.parametrize(("fn", "fields"), profiles.alternating(FROM_THE_HOST, FIELDS, each=2), ids=named)
def test_bases_in_the_hosts_memory(fn, fields):
  config = jaxlora.LoraConfig(rank=2, targets="w", axes={"w": "sio"}, **fields)
  resting = jaxlora.adapt(jax.device_put(PARAMS, host()), config, jax.random.key(0))
  tree = helpers.trained(jax.device_put(resting, on_device()))
  frozen, trainable = jaxlora.split(tree)
  resting = jaxlora.join(jax.device_put(frozen, host()), trainable)
  spaces = {name: jax.typeof(part).memory_space for name, part in resting["w"].parts().items() if name in "ab"}
  assert spaces == {"a": Space.Device, "b": Space.Device}
  assert jax.typeof(jaxlora.merge(resting)["w"]).memory_space == Space.Host
  helpers.assert_close(jax.device_put(jaxlora.merge(resting), on_device()), jaxlora.merge(tree), 1e-6)

  allowed = "ignore" if fn is formed_on_the_host else "error"
  wrapped = jaxlora.wrap(fn, on_materialize=allowed)
  plain = lambda p, x: all_at_once(p, x) if fn is all_at_once else fn(jax.device_put(p, host(), src=on_device()), x)
  want = jax.jit(fn)(jax.device_put(jaxlora.merge(tree), host()), X)
  of_merged = jax.jit(jaxlora.grad(lambda t: jnp.sum(plain(jaxlora.merge(t), X) ** 2)))(tree)
  both = jax.jit(lambda t: (wrapped(t, X), jaxlora.grad(lambda t: jnp.sum(wrapped(t, X) ** 2))(t)))
  for given in (resting, jax.device_put(resting, host())):
    value, grads = both(given)
    helpers.assert_close(value, want, 1e-5)
    got, expected = (jax.tree.leaves(jax.device_put(tree, on_device())) for tree in (grads, of_merged))
    helpers.assert_close(got, expected, 1e-4)


@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}, {"init": "pissa"}, {"train": "b"}], ids=str)
def test_adapters_of_bases_in_the_hosts_memory_are_on_the_device(fields):
  config = jaxlora.LoraConfig(rank=2, targets="w", axes={"w": "sio"}, **fields)
  tree = jaxlora.adapt(jax.device_put(PARAMS, host()), config, jax.random.key(0))
  same = jaxlora.adapt(PARAMS, config, jax.random.key(0))
  for name, part in tree["w"].parts().items():
    assert jax.typeof(part).memory_space == (Space.Host if name == "base" else Space.Device), name
    np.testing.assert_array_equal(part, same["w"].parts()[name])


def test_checkpoints_and_mixed_batches_of_bases_in_the_hosts_memory(tmp_path):
  resting = jax.device_put(PARAMS, host())
  config = jaxlora.LoraConfig(rank=2, targets="w", axes={"w": "sio"})
  tree = jaxlora.adapt(resting, config, jax.random.key(0))
  assert checkpoint.fingerprint(resting) == checkpoint.fingerprint(PARAMS)
  checkpoint.save(tmp_path / "adapter", tree)
  loaded = checkpoint.load(tmp_path / "adapter", resting)
  assert jax.typeof(loaded["w"].a).memory_space == Space.Device
  tuned = jax.device_put({**PARAMS, "w": PARAMS["w"] * 2, "b": PARAMS["b"] + 1}, host())
  extracted = jaxlora.extract(
    resting, tuned, config=jaxlora.LoraConfig(rank=8, targets="w", axes={"w": "sio"}, train="b")
  )
  helpers.assert_close(jax.device_put(jaxlora.merge(extracted), on_device()), jax.device_put(tuned, on_device()), 1e-5)
  assert jax.typeof(extracted["w"].a).memory_space == Space.Device
  routed = jax.jit(jaxlora.route(each_layer))
  bank = jaxlora.stack({"one": tree})
  helpers.assert_close(routed(resting, bank, np.array([0, -1, 0, 0]), X), each_layer(resting, X), 1e-5)


def test_a_tree_is_sent_to_another_device():
  """Outside of `jit`, where arrays on two devices do not meet: the factors follow."""
  second = jax.devices()[1]
  fn = lambda p, x: jax.device_put(x, second) @ jax.device_put(p, second)["w"]
  tree = helpers.adapted({"w": PARAMS["w"][0]}, rank=2, targets="w")
  tree = jax.device_put(tree, jax.devices()[0])
  out = jaxlora.wrap(fn, on_materialize="error")(tree, jnp.asarray(X))
  assert out.devices() == {second}
  helpers.assert_close(out, X @ np.asarray(jaxlora.merge(tree)["w"]), 1e-5)


def test_a_tree_is_spread_over_a_mesh():
  mesh = helpers.mesh_of(data=2, model=2)
  place = jax.sharding.NamedSharding(mesh, P("data", "model"))
  tree = helpers.adapted({"w": PARAMS["w"][0]}, rank=2, targets="w")
  fn = lambda p, x: x @ jax.device_put(p["w"], place)
  helpers.assert_close(jax.jit(jaxlora.wrap(fn, on_materialize="error"))(tree, X), fn(jaxlora.merge(tree), X), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Shards.


def sharded(body, spec, x_spec, out_spec):
  return jax.shard_map(body, mesh=helpers.mesh_of(data=2), in_specs=({"w": spec}, x_spec), out_specs=out_spec)


def gathered_inputs(p, x):
  """Fully sharded data parallelism by hand: every device has a part of the weight's inputs, and of the batch."""
  return x @ lax.all_gather(p["w"], "data", axis=0, tiled=True)


def gathered_outputs(p, x):
  return x @ lax.all_gather(p["w"], "data", axis=1, tiled=True)


def stacked_inputs(p, x):
  return x @ lax.all_gather(p["w"], "data").reshape(8, 8)


def stacked_outputs(p, x):
  parts = lax.all_gather(p["w"], "data")
  return jnp.concatenate([x @ parts[0], x @ parts[1]], 1)


def handed_on(p, x):
  """Each device has some layers, and hands them on."""
  w = lax.ppermute(p["w"], "data", [(0, 1), (1, 0)])
  return x @ w[0]


def handed_on_in_part(p, x):
  return x @ lax.ppermute(p["w"], "data", [(0, 1)])[0]


SHARDS = {
  gathered_inputs: ("io", P("data"), P("data"), P("data")),
  gathered_outputs: ("io", P(None, "data"), P("data"), P("data")),
  stacked_inputs: ("io", P("data"), P("data"), P("data")),
  stacked_outputs: ("io", P(None, "data"), P("data"), P("data")),
  handed_on: ("sio", P("data"), P("data"), P("data")),
  handed_on_in_part: ("sio", P("data"), P("data"), P("data")),
}


@pytest.mark.parametrize(("body", "variant"), profiles.alternating(SHARDS, ["lora", "dora"]))
def test_shards_come_together_by_factors(body, variant):
  roles, spec, x_spec, out_spec = SHARDS[body]
  params = {"w": PARAMS["w"][:2] if roles == "sio" else PARAMS["w"][0]}
  config = jaxlora.LoraConfig(rank=2, targets="w", axes={"w": roles}, variant=variant)
  tree = helpers.trained(jaxlora.adapt(params, config, jax.random.key(0)))
  helpers.check(sharded(body, spec, x_spec, out_spec), tree, (X,), 1e-4, on_materialize="error")
  found = jaxlora.adapt(
    params,
    jaxlora.LoraConfig(rank=2, targets="w"),
    jax.random.key(0),
    probe=lambda p: sharded(body, spec, x_spec, out_spec)(p, X),
  )
  assert found["w"].roles == roles


def test_shards_whose_factors_are_not_told_apart_are_formed():
  """Without `check_vma` no type says which factor has shards: right all the same, and reported."""
  fn = jax.shard_map(
    gathered_inputs,
    mesh=helpers.mesh_of(data=2),
    in_specs=({"w": P("data")}, P("data")),
    out_specs=P("data"),
    check_vma=False,
  )
  tree = helpers.adapted({"w": PARAMS["w"][0]}, rank=2, targets="w")
  helpers.check(fn, tree, (X,), 1e-4, on_materialize="ignore")
  assert "do not say which" in str(jaxlora.explain(fn, tree, X))
