"""Trees on meshes: where `adapt` puts factors, what `specs` says, and trees that are made where they belong."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import optax
import pytest

import jaxlora
from jaxlora import sharding
from tests import helpers

KEY = jax.random.key(0)
NAMES = {"up": ("data", "model"), "down": ("model", "data"), "stack": (None, "data", "model"), "bias": ()}
ROLES = {"up": "io", "down": "io", "stack": "sio"}
PARAMS = {
  "up": helpers.normal(0, (8, 16), jnp.float32),
  "down": helpers.normal(1, (16, 8), jnp.float32),
  "stack": helpers.normal(2, (3, 8, 16), jnp.float32),
  "bias": np.zeros(8, np.float32),
}


def config(**fields):
  return jaxlora.LoraConfig(**{"rank": 2, "targets": "up|down|stack", "axes": ROLES} | fields)


def params_on(mesh):
  return {name: helpers.place(mesh, leaf, *NAMES[name]) for name, leaf in PARAMS.items()}


def shapes_on(mesh):
  return {
    name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(mesh, P(*NAMES[name])))
    for name, leaf in PARAMS.items()
  }


def spec_of(leaf):
  """The spec without the entries at its end that say nothing."""
  entries = list(leaf.sharding.spec if hasattr(leaf, "sharding") else leaf)
  while entries and entries[-1] is None:
    entries.pop()
  return tuple(entries)


FACTORS = {
  "up": ((None, "data"), (None, "model")),
  "down": ((None, "model"), (None, "data")),
  "stack": ((None, None, "data"), (None, None, "model")),
}


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_factors_lie_as_the_axes_of_their_base_do(kind):
  mesh = helpers.mesh_of(kind, data=2, model=2)
  tree = jaxlora.adapt(params_on(mesh), config(), KEY)
  alone = jaxlora.adapt(PARAMS, config(), KEY)
  for name, specs in FACTORS.items():
    assert tuple(map(spec_of, (tree[name].a, tree[name].b))) == specs
    np.testing.assert_array_equal(tree[name].a, alone[name].a)


@pytest.mark.parametrize(
  "fields",
  [{"variant": name} for name in jaxlora.variants] + [{"init": "pissa"}, {"init": "orthogonal"}, {"train": "bias"}],
  ids=str,
)
def test_abstract_trees_are_made_where_they_belong(fields):
  """Whatever the variant, the init and `train=`: no part is an array, every part has a sharding, and never its rank."""
  mesh = helpers.mesh_of(data=2, model=2)
  abstract = jaxlora.adapt(shapes_on(mesh), config(**fields), KEY)
  leaves = jax.tree.leaves(abstract)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) and leaf.sharding is not None for leaf in leaves)
  placed = jaxlora.adapt(params_on(mesh), config(**fields), KEY)
  assert jax.tree.map(spec_of, abstract) == jax.tree.map(spec_of, placed)


def test_materialize():
  mesh = helpers.mesh_of(data=2, model=2)
  init = lambda key: {
    name: jax.random.normal(jax.random.fold_in(key, k), leaf.shape) for k, (name, leaf) in enumerate(PARAMS.items())
  }
  make = lambda key: jaxlora.adapt(init(key), config(), key)
  abstract = jaxlora.adapt(shapes_on(mesh), config(), KEY)
  tree = sharding.materialize(abstract, make, KEY)
  assert jax.tree.map(spec_of, tree) == jax.tree.map(spec_of, abstract)
  helpers.assert_close(jax.tree.leaves(tree), jax.tree.leaves(make(KEY)), 1e-6)
  with pytest.raises(ValueError, match=r"up/a is float32\[4, 8\], expected float32\[2, 8\]"):
    sharding.materialize(abstract, lambda key: jaxlora.adapt(init(key), config(rank=4), key), KEY)
  with pytest.raises(ValueError, match="bias is missing"):
    sharding.materialize(abstract, lambda key: {n: w for n, w in make(key).items() if n != "bias"}, KEY)
  with pytest.raises(ValueError, match="one config, and with the same probe"):
    sharding.materialize(abstract, lambda key: jaxlora.adapt(init(key), config(alpha=3), key), KEY)


def test_an_optimizers_state_is_on_the_mesh():
  mesh = helpers.mesh_of(data=2, model=2)
  tree = jaxlora.adapt(params_on(mesh), config(), KEY)
  state = jaxlora.optimizer(optax.adam(1e-2)).init(tree)
  assert all(leaf.sharding.mesh == mesh for leaf in jax.tree.leaves(state))
  assert state[0].mu["up"].a.sharding == tree["up"].a.sharding
  alone = optax.adam(1e-2).init(jaxlora.split(jaxlora.adapt(PARAMS, config(), KEY))[1])
  assert sharding.follow(alone, tree)[0].count.sharding.num_devices == 4
  assert sharding.follow(alone, PARAMS)[0].count is alone[0].count


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}], ids=str)
def test_the_second_step_compiles_nothing(fields):
  mesh = helpers.mesh_of(data=2, model=2)
  frozen, trainable = jaxlora.split(jaxlora.adapt(params_on(mesh), config(**fields), KEY))
  tx = optax.adam(1e-2)

  def fn(p, x):
    for k in range(3):
      x = x + jnp.tanh(x @ p["up"] + x @ p["stack"][k]) @ p["down"] + p["bias"]
    return x

  @jax.jit
  def step(trainable, state, x):
    loss = lambda half: jnp.mean(jaxlora.wrap(fn)(jaxlora.join(frozen, half), x) ** 2)
    grads = jax.grad(loss)(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  x, state = helpers.place(mesh, np.ones((4, 8), np.float32), "data"), sharding.follow(tx.init(trainable), trainable)
  before = jax.tree.map(spec_of, trainable)
  for _ in range(3):
    trainable, state = step(trainable, state, x)
  assert step._cache_size() == 1
  assert jax.tree.map(spec_of, trainable) == before


# ----------------------------------------------------------------------------------------------------------------------
# What `specs` says.


def test_specs_of_arrays_and_of_patterns_agree():
  mesh = helpers.mesh_of(data=2, model=2)
  tree = jaxlora.adapt(params_on(mesh), config(train="bias"), KEY)
  patterns = {name: P(*names) for name, names in NAMES.items() if names}
  plain = jaxlora.adapt(PARAMS, config(train="bias"), KEY)
  of_arrays, of_patterns = sharding.specs(tree), sharding.specs(plain, patterns=patterns)
  assert jax.tree.map(spec_of, of_arrays, is_leaf=lambda x: isinstance(x, P)) == jax.tree.map(
    spec_of, of_patterns, is_leaf=lambda x: isinstance(x, P)
  )
  put = jax.device_put(plain, sharding.specs(plain, mesh, patterns=patterns))
  assert jax.tree.map(spec_of, put) == jax.tree.map(spec_of, tree)
  whole = sharding.specs(plain, mesh, patterns=patterns, replicated=True)
  assert spec_of(whole["up"].base.spec) == ("data", "model")
  assert spec_of(whole["up"].a.spec) == spec_of(whole["up"].b.spec) == ()
  _, half = jaxlora.split(plain)
  assert sharding.specs(half, patterns=patterns)["down"].a == P(None, "model")


def test_specs_of_flax_boxes():
  """Logical names by Flax's rules or by the ones that are given, in Linen's boxes and in NNX's variables."""
  rules = (("embed", "data"), ("mlp", "model"))
  mesh = helpers.mesh_of(data=2, model=2)
  init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("embed", "mlp"))
  params = nn.Dense(16, kernel_init=init).init(KEY, jnp.ones((1, 8)))["params"]
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY)
  with nn.logical_axis_rules(rules):
    by_flax = sharding.specs(tree, mesh)
  given = sharding.specs(tree, mesh, rules=dict(rules))
  for found in (by_flax, given):
    weight = found["kernel"].value
    assert [part.spec for part in (weight.base, weight.a, weight.b)] == [
      P("data", "model"),
      P(None, "data"),
      P(None, "model"),
    ]
    assert jax.device_put(tree, found)["kernel"].value.a.sharding.spec == P(None, "data")

  mine = {"kernel": nn.Partitioned(jnp.ones((8, 16)), ("data", "model"))}
  found = sharding.specs(jaxlora.adapt(mine, jaxlora.LoraConfig(rank=2), KEY))
  assert found["kernel"].value.b == P(None, "model")


def test_specs_of_codes():
  mesh = helpers.mesh_of(data=2, model=2)
  params = {"up": helpers.normal(0, (128, 16), jnp.float32)}
  tree = jaxlora.adapt(jaxlora.quantize(params, "nf4"), config(targets="up", axes={"up": "io"}), KEY)
  found = sharding.specs(tree, mesh, patterns={"up": P("data", "model")})
  put = jax.device_put(tree, found)["up"]
  assert put.base.codes.sharding.spec == P("data", "model")
  assert put.a.sharding.spec == P(None, "data")
  np.testing.assert_array_equal(put.base.dequantize(), tree["up"].base.dequantize())


@pytest.mark.parametrize(
  ("patterns", "said"),
  [
    ({"upp": P("data")}, "matches none of the 4 leaves.*Nearest: up"),
    ({"up": P("data", "model", None)}, r"up: .* has 3 entries, and shape \(8, 16\) 2 axes"),
    ({"up": P("batch")}, r"up: .* names \['batch'\], expected axes of the mesh: \['data', 'model'\]"),
    ({"up": P("data", "data")}, r"names \['data'\] twice"),
    ({"stack": P("data")}, r"stack: axis 0 of shape \(3, 8, 16\) does not divide into 2 parts .*Leave that axis whole"),
  ],
)
def test_specs_that_do_not_fit_are_refused(patterns, said):
  tree = jaxlora.adapt(PARAMS, config(), KEY)
  with pytest.raises(ValueError, match=said):
    sharding.specs(tree, helpers.mesh_of(data=2, model=2), patterns=patterns)
  sharding.specs(tree, helpers.mesh_of(data=2, model=2), patterns={"stack": P(None, "data"), "up": P("data", None)})


# ----------------------------------------------------------------------------------------------------------------------
# Trees that cannot lie so.


def test_parts_on_different_devices_are_refused():
  """Factors on another mesh than their base, which JAX's own error names by shapes alone."""
  meshes = [jax.sharding.Mesh(np.array(jax.devices()[k : k + 4]).reshape(2, 2), ("data", "model")) for k in (0, 4)]
  here, there = (jaxlora.adapt(params_on(mesh), config(targets="up", axes=None), KEY) for mesh in meshes)
  tree = jaxlora.join(jaxlora.split(here)[0], jaxlora.split(there)[1])
  fn = lambda p, x: x @ p["up"]
  said = r"up: a lies on devices 4, 5, 6, 7, its base on devices 0, 1, 2, 3, expected the same devices"
  for call in (lambda: jaxlora.wrap(fn)(tree, jnp.ones((4, 8))), lambda: jaxlora.merge(tree)):
    with pytest.raises(ValueError, match=said):
      call()
  for remedy in (sharding.specs(tree, meshes[0]), jax.devices()[0]):
    put = jax.device_put(tree, remedy)
    np.testing.assert_allclose(jaxlora.wrap(fn)(put, jnp.ones((4, 8))), jnp.ones((4, 8)) @ PARAMS["up"], rtol=1e-5)


def test_meshes_without_devices_are_refused():
  tree, mesh = jaxlora.adapt(PARAMS, config(), KEY), helpers.mesh_of(data=2, model=2)
  with pytest.raises(ValueError, match=r"specs: found a mesh without devices.*jax.make_mesh\(\(4, 2\)"):
    sharding.specs(tree, jax.sharding.Mesh(np.empty((0,), object), ("data",)))
  kernel = lambda mesh, size: jax.ShapeDtypeStruct((size, 8), np.float32, sharding=NamedSharding(mesh, P("data")))
  make = lambda key: {"up": jax.random.normal(key, (8, 8))}
  with pytest.raises(ValueError, match=r"materialize: up: .* is of a mesh without devices.*jax.make_mesh"):
    sharding.materialize({"up": kernel(mesh.abstract_mesh, 8)}, make, KEY)
  with pytest.raises(ValueError, match=r"materialize: up: axis 0 of shape \(9, 8\) does not divide into 2 parts"):
    sharding.materialize({"up": kernel(mesh, 9)}, make, KEY)
  remedy = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
  assert sharding.materialize({"up": kernel(remedy, 8)}, make, KEY)["up"].sharding.num_devices == 8
