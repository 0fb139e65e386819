"""Paths of leaves: boxes are no part of them, and every leaf has one of its own."""

import collections

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import adapted, adapted_paths

KEY = jax.random.key(0)
Projections = collections.namedtuple("Projections", "query key value")


def weight():
  return jnp.ones((6, 4))


def adapt(params, targets=".*", **fields):
  return adapted(params, seed=None, targets=targets, **fields)


@pytest.mark.parametrize("targets", ["attention", ["query", "key", "value"], "layer/.*"])
def test_a_field_named_value_keeps_its_name(targets):
  tree = adapt({"layer": Projections(weight(), weight(), weight())}, targets)
  assert adapted_paths(tree) == ["layer/query", "layer/key", "layer/value"]


def test_a_field_named_value_keeps_its_name_where_it_is_the_only_leaf():
  tree = adapt({"layer": Projections(None, None, weight()), "other": weight()}, ["value"])
  assert adapted_paths(tree) == ["layer/value"]
  mixed = adapt({"layer": Projections(jnp.ones(4), jnp.ones(4), weight())}, ["value"])
  _, trainable = jaxlora.split(mixed)
  with pytest.raises(ValueError, match="layer/value: base missing"):
    jaxlora.merge(trainable)


def test_boxes_are_no_part_of_the_path():
  class Net(nnx.Module):
    def __init__(self, rngs):
      self.value = nnx.Linear(6, 4, rngs=rngs)

  module = Net(nnx.Rngs(0))
  for tree in (module, nnx.state(module)):
    assert adapted_paths(adapt(tree, ["kernel"])) == ["value/kernel"]
  boxed = {"value": nn.Partitioned(weight(), ("in", "out")), "logical": nn.LogicallyPartitioned(weight(), ("a", "b"))}
  assert adapted_paths(adapt(boxed)) == ["logical", "value"]


def colliding():
  return {"a/b": weight(), "a": {"b": weight()}, "c": weight()}


def test_paths_that_collide_are_told_apart_and_others_stay():
  tree = adapt(colliding())
  assert sorted(adapted_paths(tree)) == ["['a']['b']", "['a/b']", "c"]
  np.testing.assert_array_equal(tree["c"].a, adapt({"c": weight()})["c"].a)
  assert not np.array_equal(tree["a/b"].a, tree["a"]["b"].a)
  assert adapted_paths(adapt(colliding(), "c")) == ["c"]


def test_merge_looks_at_every_one_of_colliding_leaves():
  for place in (lambda tree: tree["a"]["b"], lambda tree: tree["a/b"]):
    tree = adapt(colliding())
    poisoned = place(tree)
    tree = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf is poisoned.a else leaf, tree)
    with pytest.raises(ValueError, match=r"NaN or infinite values in \['a"):
      jaxlora.merge(tree)


def test_a_tree_that_is_one_array():
  tree = adapt(weight())
  assert adapted_paths(tree) == ["root"]
  assert adapted_paths(adapt(weight(), "root")) == ["root"]
  assert adapted_paths(adapt(nn.Partitioned(weight(), ("in", "out")), ["root"])) == ["root"]
  with pytest.raises(ValueError, match=r"^root: shape \(4,\) has fewer than two axes"):
    adapt(jnp.ones(4))
  with pytest.raises(ValueError, match=r"'kernel' matches none of the 1 leaves.*Nearest: root"):
    adapt(weight(), ["kernel"])
  assert jaxlora.explain(lambda p, x: x @ p, tree, jnp.ones((2, 6))).uses[0].path == "0"
