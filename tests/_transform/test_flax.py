"""Linen and NNX: `apply` with all of its options, states, modules, and their serialization."""

from flax import nnx, serialization
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxlora
from tests import helpers

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(6, name="first")(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(4, name="last")(x)

  def first_only(self, x):
    return x.sum()


def test_linen_apply_with_mutable_rngs_and_method():
  model = Net()
  x = helpers.array(2, (64, 5), jnp.float32)  # enough for the batch's statistics to be well conditioned
  variables = jax.jit(lambda key: model.init(key, x, train=False))(KEY)
  tree = helpers.adapted(variables, rank=2, targets=["first", "last"])
  plain, wrapped = jaxlora.merge(tree), jaxlora.wrap(model.apply, on_materialize="error")
  options = {"train": True, "rngs": {"dropout": jax.random.key(5)}, "mutable": ["batch_stats"]}
  got, want = wrapped(tree, x, **options), model.apply(plain, x, **options)
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)
  assert set(got[1]) == {"batch_stats"}
  helpers.assert_close(wrapped(tree, x, train=False), model.apply(plain, x, train=False), 1e-5)
  np.testing.assert_array_equal(wrapped(tree, x, method="first_only"), x.sum())


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs), nnx.Linear(5, 5, rngs=rngs)])
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(self.norm(x))


@pytest.mark.usefixtures("lenient")
def test_nnx_states():
  graph, state, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

  def fn(state, rest, x):
    model = nnx.merge(graph, state, rest, copy=True)  # the probe closes over `rest`
    y = model(x)
    return y, nnx.state(model, nnx.BatchStat)

  config = jaxlora.LoraConfig(rank=2, train=["head"])
  tree = jaxlora.adapt(state, config, KEY, probe=lambda s: fn(s, rest, X)[0])
  assert {leaf.path for leaf in jaxlora.summary(tree).leaves} == {
    "layers/0/kernel", "layers/1/kernel", "head/kernel", "head/bias"
  }  # fmt: skip
  tree = helpers.trained(tree)
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  want = jax.tree.leaves(jax.jit(helpers.oracle(fn))(tree, rest, X))
  helpers.assert_close(jax.tree.leaves(wrapped(tree, rest, X)), want, 1e-5)
  helpers.assert_close(jax.tree.leaves(nnx.jit(wrapped)(tree, rest, X)), want, 1e-5)
  grads = jax.jit(jaxlora.grad(lambda t: wrapped(t, rest, X)[0].sum()))(tree)
  assert jax.tree.structure(grads) == jax.tree.structure(jaxlora.split(tree)[1])


@pytest.mark.usefixtures("lenient")
def test_nnx_modules_are_trees_themselves():
  class WithRngs(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(5, 4, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)  # its random keys are leaves, too

    def __call__(self, x):
      return self.dropout(self.layer(x), deterministic=True)

  module, call = WithRngs(nnx.Rngs(0)), lambda module, x: module(x)
  tree = jaxlora.adapt(module, jaxlora.LoraConfig(rank=2), KEY, probe=lambda module: module(X))
  assert [leaf.path for leaf in jaxlora.summary(tree).leaves] == ["layer/kernel"]
  np.testing.assert_array_equal(jaxlora.wrap(call, on_materialize="error")(tree, X), module(X))
  np.testing.assert_array_equal(nnx.jit(jaxlora.wrap(call))(tree, X), nnx.jit(call)(module, X))


def test_flax_serialization_and_orbax_round_trips(tmp_path):
  model = Net()
  variables = jax.jit(lambda key: model.init(key, X, train=False))(KEY)
  tree = helpers.adapted(variables, targets=["first"], train=["last"])
  blank = jax.tree.map(jnp.zeros_like, tree)
  back = serialization.from_bytes(blank, serialization.to_bytes(tree))
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  helpers.assert_close(back, tree, 0)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "tree", tree)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(tmp_path / "tree", blank)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  helpers.assert_close(back, tree, 0)
