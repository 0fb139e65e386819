"""Muon on factors: what it makes of each matrix by itself is what it makes of the tree."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles

pytestmark = pytest.mark.usefixtures("lenient")
KEY = jax.random.key(0)
PARAMS = {
  "dense": helpers.array(1, (12, 5), jnp.float32),
  "heads": helpers.array(2, (8, 3, 5), jnp.float32),
  "layers": helpers.array(3, (2, 8, 6), jnp.float32),
  "bias": helpers.array(4, (5,), jnp.float32),
}
AXES = {"dense": "io", "heads": "ioo", "layers": "sio"}


def adapted(**fields):
  config = jaxlora.LoraConfig(rank=2, targets="dense|heads|layers", axes=AXES, train="bias", **fields)
  return helpers.trained(jaxlora.adapt(PARAMS, config, KEY))


def updates_of(tx, tree, grads):
  return jax.jit(lambda tree, grads: tx.update(grads, tx.init(tree), tree)[0])(tree, grads)


def as_matrices(path, part, value):
  """What Muon is made for: (inputs, outputs) matrices, one by one."""
  slices = value if path == "layers" else value[None]
  flat = [x.reshape(x.shape[0], -1) for x in slices]
  return {f"{path} {part} {k}": x.T if part == "a" else x for k, x in enumerate(flat)}


@pytest.mark.parametrize(
  ("variant", "rms"), profiles.alternating(["lora", "dora", "lora_fa", "adalora", "loha"], [None, 0.2])
)
def test_each_factor_is_the_matrix_that_it_is(variant, rms):
  tree = adapted(variant=variant)
  grads = jax.tree.map(lambda x: helpers.array(x.size, x.shape, x.dtype), jaxlora.split(tree)[1])
  muon = lambda **more: optax.contrib.muon(1e-2, consistent_rms=rms, **more)
  got = updates_of(jaxlora.optimizer(muon(muon_weight_dimension_numbers=jaxlora.muon_dimensions)), tree, grads)
  for path in AXES:
    factors = {name: label for name, label in tree[path].kind.trains.items() if label in ("a", "b")}
    for name, label in factors.items():
      of = lambda node, path=path, name=name, label=label: as_matrices(path, label, node[path].parts()[name])
      want = updates_of(muon(), of(tree), of(grads))
      chex.assert_trees_all_close(of(got), want, rtol=1e-4, atol=1e-7)
    for name in set(tree[path].kind.trains) - set(factors):
      want = updates_of(
        optax.adamw(1e-2, weight_decay=0.0, nesterov=True), tree[path].parts()[name], grads[path].parts()[name]
      )
      np.testing.assert_allclose(got[path].parts()[name], want, rtol=1e-4)
  assert not got["dense"].base.any()
  assert float(jnp.abs(got["bias"].value).max()) > 0


def test_muon_by_itself_takes_factors_for_other_matrices():
  """Why the dimension numbers are needed: A's update is sqrt(in / rank) times as large, heads and stacks go to Adam."""
  tree = adapted()
  grads = jax.tree.map(lambda x: helpers.array(x.size, x.shape, x.dtype), jaxlora.split(tree)[1])
  alone = updates_of(jaxlora.optimizer(optax.contrib.muon(1e-2)), tree, grads)
  told = updates_of(
    jaxlora.optimizer(optax.contrib.muon(1e-2, muon_weight_dimension_numbers=jaxlora.muon_dimensions)), tree, grads
  )
  np.testing.assert_allclose(alone["dense"].a, told["dense"].a * np.sqrt(12 / 2), rtol=1e-4)
  np.testing.assert_allclose(alone["dense"].b, told["dense"].b, rtol=1e-4)
  assert not np.allclose(alone["layers"].a, told["layers"].a)


def test_numbers_of_a_half_are_those_of_the_tree():
  tree = adapted()
  whole, half = jaxlora.muon_dimensions(tree), jaxlora.muon_dimensions(jaxlora.split(tree)[1])
  assert whole == half
  assert whole["layers"].a == optax.contrib.MuonDimensionNumbers((2,), (1,))
  assert whole["bias"].value is None
  _, half = jaxlora.split(tree)
  tx = optax.contrib.muon(1e-2, muon_weight_dimension_numbers=jaxlora.muon_dimensions)
  assert tx.init(half)
