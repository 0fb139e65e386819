"""Banks of adapters whose factors are in shards, and batches whose rows are."""

import jax
import jax.numpy as jnp
from jax.sharding import AxisType
import numpy as np
import pytest

import jaxlora
from tests import helpers

WIDTH, HIDDEN = 8, 16
KERNEL = helpers.normal(0, (WIDTH, HIDDEN), jnp.float32)
X = helpers.normal(1, (8, WIDTH), jnp.float32)
IDS = np.arange(8, dtype=np.int32) % 4 - 1


def adapters(kernel):
  """Three, trained, where the kernel lies."""
  config = jaxlora.LoraConfig(rank=2)
  trees = [jaxlora.adapt({"up": kernel}, config, jax.random.key(k)) for k in range(3)]
  return [
    jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), helpers.trained(tree, seed=k), tree)
    for k, tree in enumerate(trees)
  ]


def routed(p, bank, ids, x):
  return jaxlora.route(lambda p, x: jnp.tanh(x @ p["up"]))(p, bank, ids, x)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_a_bank_lies_as_its_adapters_do_and_rows_in_shards_need_no_ids_in_shards(kind):
  """One adapter comes from elsewhere: it is put where the bank is. Ids lie anywhere."""
  mesh = helpers.mesh_of(kind, data=2, model=2)
  alone = adapters(jnp.asarray(KERNEL))
  plain = jaxlora.stack({"0": alone[0], "1": alone[1]}, capacity=3).put("2", alone[2])
  want = routed({"up": KERNEL}, plain, IDS, X)
  with jax.set_mesh(mesh):
    kernel = helpers.place(mesh, KERNEL, None, "model")
    one, two, _ = adapters(kernel)
    bank = jaxlora.stack({"0": one, "1": two}, capacity=3)
    assert tuple(bank.factors["up"].b.sharding.spec) == (None, None, "model")
    bank = bank.put("2", alone[2])
    assert tuple(bank.factors["up"].b.sharding.spec) == (None, None, "model")
    np.testing.assert_array_equal(bank.factors["up"].b, plain.factors["up"].b)
    x = helpers.place(mesh, X, "data")
    everywhere = (IDS, helpers.place(mesh, IDS), helpers.place(mesh, IDS, "data"))
    for ids in everywhere if kind == AxisType.Explicit else everywhere[:1]:
      got = jax.jit(routed)({"up": kernel}, bank, ids, x)
      np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_an_adapter_in_shards_that_has_diverged_is_named():
  mesh = helpers.mesh_of(data=2, model=2)
  tree = jaxlora.adapt(
    {"up": helpers.place(mesh, KERNEL, None, "model")}, jaxlora.LoraConfig(rank=2), jax.random.key(0)
  )
  broken = jax.tree.map(lambda leaf: leaf * jnp.nan, jaxlora.split(tree)[1])
  with pytest.raises(ValueError, match="'one': up: found NaN or infinite values in a, b"):
    jaxlora.stack({"one": broken})
