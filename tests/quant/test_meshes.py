"""Codes on meshes: values and gradients as on one device, parts along the axes of the floats, no block cut."""

import functools
import math
import re

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles

KEY, P = jax.random.key(0), PartitionSpec
WIDTH, INNER, LAYERS = 64, 128, 2
PARAMS = {
  "up": helpers.array(0, (LAYERS, WIDTH, INNER), np.float32, 0.2),
  "down": helpers.array(1, (LAYERS, INNER, WIDTH), np.float32, 0.2),
}
AXES = dict.fromkeys(PARAMS, "sio")
EMBEDDED = jaxlora.LoraConfig(rank=2, targets="table", axes={"table": "oi"})
X = helpers.array(2, (8, WIDTH), np.float32)
# Each with the specs of `up` and of `down`: batches alone, weights in shards that are gathered, and Megatron's way.
LAYOUTS = {
  "data": (P(), P()),
  "fsdp": (P(None, "data"), P(None, "data")),
  "tensor": (P(None, None, "model"), P(None, "model")),
  "both": (P(None, "data", "model"), P(None, "model", "data")),
}


def mesh():
  return helpers.mesh_of(data=4, model=2)


def put(tree, layout):
  specs = dict(zip(("up", "down"), LAYOUTS[layout], strict=True))
  return {name: jax.device_put(leaf, NamedSharding(mesh(), specs[name])) for name, leaf in tree.items()}


def codes(params, format="nf4", **options):
  options = {"targets": ".*", "axes": dict.fromkeys(params, "sio"), "block_size": 16} | options
  return jaxlora.quantize(params, format, **options)


def scanned(p, x):
  layer = lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None)
  return lax.scan(layer, x, p)[0]


def unrolled(p, x):
  for k in range(LAYERS):
    x = x + jnp.tanh(x @ p["up"][k]) @ p["down"][k]
  return x


def adapted(base):
  return helpers.trained(jaxlora.adapt(base, jaxlora.LoraConfig(rank=2, targets=".*", axes=AXES), KEY))


def step(fn):
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  return jax.jit(lambda tree, x: jaxlora.value_and_grad(lambda t: jnp.sum(jnp.sin(wrapped(t, x))))(tree))


@pytest.fixture(scope="module")
def alone():
  """The tree on one device, and what each function's step gives of it."""
  tree = adapted(codes(PARAMS))
  return tree, {fn: jax.device_get(step(fn)(tree, X)) for fn in (scanned, unrolled)}


@pytest.mark.parametrize(
  ("layout", "fn"),
  [("data", unrolled), ("fsdp", scanned), ("tensor", unrolled), ("tensor", scanned), ("both", scanned)],
)
def test_steps_are_those_of_one_device(alone, layout, fn):
  """The batch in shards, too. Every part of the codes lies along the axes of its weight."""
  base = codes(put(PARAMS, layout))
  tree, want = alone
  for name, spec in zip(("up", "down"), LAYOUTS[layout], strict=True):
    node = base[name]
    np.testing.assert_array_equal(node.codes, tree[name].base.codes)
    assert node.codes.sharding.is_equivalent_to(NamedSharding(mesh(), spec), 3)
    local = node.scales.codes.addressable_shards[0].data.shape
    whole = node.codes.addressable_shards[0].data.shape
    assert tuple(n // k for n, k in zip(whole, local, strict=True)) == (1, 16, 1)
  placed = jax.tree.map(lambda node, base: node.with_parts({"base": base}), tree, base, is_leaf=is_leaf)
  got = step(fn)(placed, jax.device_put(X, NamedSharding(mesh(), P("data"))))
  helpers.assert_close(jax.tree.leaves(jax.device_get(got)), jax.tree.leaves(want[fn]), 1e-4)


def is_leaf(node):
  return isinstance(node, jaxlora.LoraWeight | jaxlora.QuantizedArray)


def gathered_floats(fn, *args):
  """The most elements that one collective of a step brings together as floats."""
  text = step(fn).lower(*args).compile().as_text()
  found = re.findall(r"= (?:f32|bf16)\[([\d,]*)\]\S* all-gather", text)
  return max((math.prod(map(int, shape.split(","))) for shape in found), default=0)


def test_codes_are_sent_where_a_weight_is_to_be_whole(alone):
  """All parts follow the constraint. By itself a compiler forms the shards, and sends floats."""
  whole = NamedSharding(mesh(), P())

  def fn(p, x, constrained=True):
    @jax.checkpoint
    def layer(x, w):
      w = {name: lax.with_sharding_constraint(leaf, whole) if constrained else leaf for name, leaf in w.items()}
      return x + jnp.tanh(x @ w["up"]) @ w["down"], None

    return lax.scan(layer, x, p)[0]

  tree = jax.tree.map(
    lambda node, base: node.with_parts({"base": base}), alone[0], codes(put(PARAMS, "fsdp")), is_leaf=is_leaf
  )
  x = jax.device_put(X, NamedSharding(mesh(), P("data")))
  got = jax.device_get(step(fn)(tree, x))
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(alone[1][scanned]), 1e-4)
  assert gathered_floats(functools.partial(fn, constrained=False), tree, x) >= WIDTH * INNER
  assert gathered_floats(fn, tree, x) <= WIDTH * INNER // 16  # scales, and factors


def test_tensor_parallelism_by_hand(alone):
  """In `shard_map` each device forms its own part of a weight."""
  tree, want = alone

  def fn(p, x):
    local = lambda p, x: lax.scan(lambda x, w: (x + lax.psum(jnp.tanh(x @ w["up"]) @ w["down"], "model"), None), x, p)[
      0
    ]
    specs = {"up": LAYOUTS["tensor"][0], "down": LAYOUTS["tensor"][1]}
    return jax.shard_map(local, mesh=mesh(), in_specs=(specs, P("data")), out_specs=P("data"), check_vma=False)(p, x)

  value = jax.jit(lambda tree, x: jnp.sum(jnp.sin(jaxlora.wrap(fn, on_materialize="ignore")(tree, x))))(tree, X)
  assert float(value) == pytest.approx(float(want[scanned][0]), rel=1e-4)


def test_blocks_are_not_cut():
  """128 inputs over eight devices are 16 for each; the error's remedies work."""
  match = (
    r"down: axis 1 of 128 is split over 'data', 'model', 16 for each of 8 devices, and blocks of 64 .*block_size=16"
  )
  spec = NamedSharding(mesh(), P(None, ("data", "model")))
  params = {"down": jax.device_put(PARAMS["down"], spec)}
  with pytest.raises(ValueError, match=match):
    codes(params, block_size=64)
  assert codes(params, block_size=16)["down"].block == (1, 16, 1)
  elsewhere = jax.device_put(PARAMS["down"], NamedSharding(mesh(), P(None, None, ("data", "model"))))
  assert codes({"down": elsewhere}, block_size=64)["down"].codes.sharding.spec == P(None, None, ("data", "model"))
  before = codes({"down": PARAMS["down"]}, block_size=64)
  sharded = jax.device_put(before, NamedSharding(mesh(), P()))
  np.testing.assert_array_equal(jaxlora.dequantize(sharded)["down"], jaxlora.dequantize(before)["down"])


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_codes_of_shapes_lie_as_those_of_arrays(kind):
  """So that a tree of codes and factors that no host can hold is planned, too: every part says where it belongs."""
  there = NamedSharding(helpers.mesh_of(kind, data=4, model=2), LAYOUTS["both"][1])
  down = jax.device_put(PARAMS["down"], there)
  shape = jax.ShapeDtypeStruct(down.shape, down.dtype, sharding=there)
  config = jaxlora.LoraConfig(rank=2, targets="down", axes={"down": "sio"})
  tree, abstract = (jaxlora.adapt(codes({"down": leaf}), config, KEY) for leaf in (down, shape))
  told = lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding)
  assert jax.tree.map(told, abstract) == jax.tree.map(told, tree)
  assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(abstract))


def test_what_is_written_again_stays_where_it_was(alone):
  base = codes(put(PARAMS, "both"))
  tree = jax.tree.map(lambda node, base: node.with_parts({"base": base}), alone[0], base, is_leaf=is_leaf)
  merged, _ = jaxlora.quant.merge_and_requantize(tree)
  same_places(merged, base)
  want, _ = jaxlora.quant.merge_and_requantize(alone[0])
  for name in PARAMS:
    assert (np.asarray(merged[name].codes) != np.asarray(want[name].codes)).mean() < 1e-3


def test_explicit_meshes(alone):
  """Where types say how arrays are sharded, those of codes do."""
  with jax.set_mesh(helpers.mesh_of(jax.sharding.AxisType.Explicit, data=4, model=2)):
    down = jax.device_put(PARAMS["down"], LAYOUTS["both"][1])
    base = codes({"down": down})["down"]
    assert jax.typeof(base.codes).sharding == jax.typeof(down).sharding
    assert jax.typeof(base.scales.codes).sharding == jax.typeof(down).sharding
    np.testing.assert_array_equal(jax.device_get(base.codes), alone[0]["down"].base.codes)


def dot(x, w, *spec):
  """`x w`, which says how it lies where types do: of split inputs JAX asks."""
  on_mesh = not jax.sharding.get_abstract_mesh().empty
  return jnp.dot(x, w, out_sharding=P(*spec) if on_mesh else None)


def explicit_layers(p, x):
  layer = lambda x, w: (x + dot(jnp.tanh(dot(x, w["up"], "data", "model")), w["down"], "data"), None)
  return lax.scan(layer, x, p)[0]


def explicit_unrolled(p, x):
  for k in range(LAYERS):
    x = explicit_layers({name: w[k : k + 1] for name, w in p.items()}, x)
  return x


def on_explicit_axes(make, fn, specs, x):
  """A step of a tree on one device, and the same on a mesh of Explicit axes with its parameters so."""
  want = jax.device_get(step(fn)(make(PARAMS), x))
  with jax.set_mesh(helpers.mesh_of(jax.sharding.AxisType.Explicit, data=4, model=2)):
    there = {name: jax.device_put(leaf, spec) for (name, leaf), spec in zip(PARAMS.items(), specs, strict=True)}
    got = jax.device_get(step(fn)(make(there), jax.device_put(x, P("data"))))
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-4)


@pytest.mark.parametrize("fn", [explicit_layers, explicit_unrolled])
@pytest.mark.parametrize("layout", profiles.some([*LAYOUTS], "both", "fsdp"))
def test_steps_on_explicit_axes_are_those_of_one_device(layout, fn):
  on_explicit_axes(lambda params: adapted(codes(params)), fn, LAYOUTS[layout], X)


@pytest.mark.parametrize("format", profiles.some(["nf4", "int8", "int4", "q4_0", "fp8"], "int8", "q4_0"))
def test_formats_on_explicit_axes(format):
  make = lambda params: adapted(codes(params, format, double=False))
  on_explicit_axes(make, explicit_layers, LAYOUTS["both"], X)


def test_codes_without_an_adapter_on_explicit_axes():
  config = jaxlora.LoraConfig(rank=2, targets="up", axes={"up": "sio"})
  make = lambda params: helpers.trained(jaxlora.adapt(codes(params), config, KEY))
  on_explicit_axes(make, explicit_layers, LAYOUTS["tensor"], X)


def test_an_embedding_of_codes_that_is_the_head_too_on_explicit_axes():
  """Its rows are looked up, and it is met transposed."""
  table = {"table": helpers.array(0, (32, WIDTH), np.float32, 0.2)}
  tokens = jnp.arange(8)

  def fn(p, tokens):
    on_mesh = not jax.sharding.get_abstract_mesh().empty
    rows = p["table"].at[tokens].get(out_sharding=P("data") if on_mesh else None)
    return dot(jnp.tanh(rows), p["table"].T, "data", "model")

  make = lambda params: helpers.trained(jaxlora.adapt(codes(params, axes={"table": "oi"}), EMBEDDED, KEY))
  want = jax.device_get(step(fn)(make(table), tokens))
  with jax.set_mesh(helpers.mesh_of(jax.sharding.AxisType.Explicit, data=4, model=2)):
    there = {"table": jax.device_put(table["table"], P("model"))}
    got = jax.device_get(step(fn)(make(there), jax.device_put(tokens, P("data"))))
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-4)


@pytest.mark.nightly
def test_starts_from_floats_on_a_mesh():
  """Nightly: every device decomposes every weight."""
  base, floats = codes(put(PARAMS, "both"), double=False), put(PARAMS, "both")
  config = jaxlora.LoraConfig(rank=2, targets=".*", axes=AXES, init="loftq_niter_2")
  tree = jaxlora.adapt(base, config, KEY, floats=floats)
  same_places(jaxlora.strip(tree), base)
  alone = jaxlora.adapt(codes(PARAMS, double=False), config, KEY, floats=PARAMS)
  helpers.assert_close(jax.device_get(jaxlora.merge(tree)), jax.device_get(jaxlora.merge(alone)), 0.05)


def same_places(tree, other):
  for leaf, same in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
    assert leaf.sharding.is_equivalent_to(same.sharding, leaf.ndim)
