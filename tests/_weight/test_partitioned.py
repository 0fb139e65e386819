"""Flax's `Partitioned` boxes: A and B have names of their own, and the rank is never split."""

import pickle

from flax import linen as nn
from flax import nnx, serialization
from flax.core import meta
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from tests.helpers import adapted, array

X = array(3, (2, 8), jnp.float32)


def mesh():
  return jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
  )


def dense(names=("data", "model"), wrapper=nn.with_partitioning, features=16):
  return nn.Dense(features, kernel_init=wrapper(nn.initializers.lecun_normal(), names))


def own_specs(tree):
  return {name: tuple(spec) for name, spec in nn.get_partition_spec(tree)["kernel"].value.parts().items()}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("variant", ["lora", "dora", "lora_fa"])
def test_the_way_of_flaxs_guide(rank, variant):
  """`eval_shape`, `get_sharding`, `jit(out_shardings=)`."""
  model, config = dense(), jaxlora.LoraConfig(rank=rank, variant=variant)
  make = lambda key: jaxlora.adapt(model.init(key, X)["params"], config, key)
  abstract = jax.eval_shape(make, jax.random.key(0))
  tree = jax.jit(make, out_shardings=nn.get_sharding(abstract, mesh()))(jax.random.key(0))
  weight = tree["kernel"].value
  assert weight.base.sharding.spec == P("data", "model")
  assert weight.a.sharding.is_equivalent_to(NamedSharding(mesh(), P(None, "data")), 2)
  assert weight.b.sharding.is_equivalent_to(NamedSharding(mesh(), P(None, "model")), 2)
  if variant == "dora":
    assert weight.extra["magnitude"].sharding.is_equivalent_to(NamedSharding(mesh(), P(None, "model")), 2)
  plain = make(jax.random.key(0))
  assert jax.tree.structure(tree) == jax.tree.structure(plain)
  apply = lambda tree: jaxlora.wrap(model.apply)({"params": tree}, X)
  np.testing.assert_allclose(jax.jit(apply)(tree), apply(plain), rtol=1e-5, atol=1e-5)


def test_names_of_stacked_and_of_turned_axes():
  boxed = lambda shape, names: {"kernel": nn.Partitioned(jnp.ones(shape), names)}
  tree = adapted(boxed((8, 3, 2, 4), ("embed", "layers", "heads")), axes={"kernel": "isoo"})
  assert own_specs(tree) == {
    "base": ("embed", "layers", "heads"), "a": ("layers", None, "embed"), "b": ("layers", None, "heads", None),
  }  # fmt: skip
  tree = adapted(boxed((6, 8), ("out", "in")), axes={"kernel": "oi"}, init="pissa")
  assert own_specs(tree) == {
    "base": ("out", "in"), "a": (None, "in"), "b": (None, "out"), "a0": (None, "in"), "b0": (None, "out"),
  }  # fmt: skip


def test_halves_have_the_same_names():
  frozen, trainable = jaxlora.split(adapted(dense().init(jax.random.key(0), X)["params"]))
  specs = lambda half: nn.get_partition_spec(half)["kernel"].value
  assert (specs(trainable).a, specs(trainable).b, specs(trainable).base) == (P(None, "data"), P(None, "model"), None)
  assert (specs(frozen).base, specs(frozen).a) == (P("data", "model"), None)


def test_logical_names_go_through_the_rules():
  params = dense(("embed", "mlp"), nn.with_logical_partitioning).init(jax.random.key(0), X)["params"]
  specs = nn.get_partition_spec(adapted(params))
  shardings = nn.logical_to_mesh_sharding(specs, mesh(), [("embed", "data"), ("mlp", "model")])
  weight = shardings["kernel"].value
  assert (weight.base.spec, weight.a.spec, weight.b.spec) == (P("data", "model"), P(None, "data"), P(None, "model"))


def test_merged_and_stripped_trees_are_what_they_were():
  params = dense().init(jax.random.key(0), X)["params"]
  tree = adapted(params)
  for plain in (jaxlora.strip(tree), jaxlora.merge(tree)):
    assert jax.tree.structure(plain) == jax.tree.structure(params)
    assert type(plain["kernel"]) is nn.Partitioned
  assert jaxlora.strip(tree)["kernel"].value is params["kernel"].value


def test_boxes_go_wherever_trees_go(tmp_path):
  params = dense().init(jax.random.key(0), X)["params"]
  tree = adapted(params)
  structure = jax.tree.structure(tree)
  assert isinstance(tree["kernel"], nn.Partitioned)
  assert jax.tree.structure(jax.jit(lambda t: t)(tree)) == structure
  assert jax.tree.structure(pickle.loads(pickle.dumps(tree))) == structure
  assert jax.tree.structure(serialization.from_bytes(tree, serialization.to_bytes(tree))) == structure
  assert jax.tree.structure(jaxlora.join(*jaxlora.split(tree))) == structure
  checkpoint.save(tmp_path / "a", tree)
  assert jax.tree.structure(checkpoint.restore(tmp_path / "a", params)) == structure
  assert jax.tree.structure(jaxlora.svd.extract(params, jaxlora.merge(tree), rank=2)) == structure
  assert isinstance(meta.unbox(tree)["kernel"], jaxlora.LoraWeight)


def test_a_scanned_model_of_boxes():
  class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      return jnp.tanh(dense(("embed", "mlp"), features=8)(x)), None

  class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
      scan = nn.scan(
        Layer, variable_axes={"params": 1}, split_rngs={"params": True}, length=3,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )  # fmt: skip
      return scan(name="layers")(x, None)[0]

  model = Model()
  params = model.init(jax.random.key(0), X)["params"]
  apply = lambda p: model.apply({"params": p}, X)
  tree = adapted(params, probe=apply)
  (node,) = [
    box.value
    for box in jax.tree.leaves(nn.get_partition_spec(tree), is_leaf=lambda x: hasattr(x, "value"))
    if hasattr(box, "value")
  ]
  assert (node.base, node.a, node.b) == (
    P("embed", "layers", "mlp"),
    P("layers", None, "embed"),
    P("layers", None, "mlp"),
  )
  np.testing.assert_allclose(jaxlora.wrap(apply)(tree), apply(jaxlora.merge(tree)), rtol=1e-5, atol=1e-5)


def test_nnx_variables_with_names():
  on_mesh = mesh()
  with jax.set_mesh(on_mesh):
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("data", "model"))
    model = nnx.Linear(8, 16, kernel_init=init, rngs=nnx.Rngs(0))
  graph, state = nnx.split(model)
  tree = adapted(state)
  weight = nnx.get_partition_spec(tree)["kernel"].get_raw_value()
  assert (weight.base, weight.a, weight.b) == (P("data", "model"), P(None, "data"), P(None, "model"))
  placed = jax.jit(lambda t: t, out_shardings=nnx.get_named_sharding(tree, on_mesh))(tree)
  assert placed["kernel"].get_raw_value().a.sharding.is_equivalent_to(NamedSharding(on_mesh, P(None, "data")), 2)
  apply = lambda state: nnx.merge(graph, state)(X)
  np.testing.assert_allclose(jaxlora.wrap(apply)(tree), apply(jaxlora.merge(tree)), rtol=1e-5, atol=1e-5)
  for again in (placed, jaxlora.join(*jaxlora.split(tree))):
    assert jax.tree.structure(again) == jax.tree.structure(tree)
  assert jax.tree.structure(pickle.loads(pickle.dumps(tree["kernel"]))) == jax.tree.structure(tree["kernel"])
  for plain in (jaxlora.strip(tree), jaxlora.merge(tree)):
    assert type(plain["kernel"]) is nnx.Param
    assert jax.tree.structure(plain) == jax.tree.structure(state)
  assert type(state["kernel"]) is nnx.Param
