"""Meshes of Explicit axes, where types carry shardings: every variant, with factors placed as their base is."""

import itertools

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxlora
from jaxlora._weight.placement import beside_base, factor_spec
from tests import helpers

KEY = jax.random.key(0)
SPECS = {"up": ("data", "model"), "query": ("data", "model", None), "out": ("model", None, "data")}
AXES = {"up": "io", "query": "ioo", "out": "iio"}
SHAPES = {"up": (8, 8), "query": (8, 4, 2), "out": (4, 2, 8)}
LAYERS = 2
FORMS = ("unrolled", "scanned", "scanned, remat")


# A second each: by default the one whose gradient passes every sum that has to say how it lies.
BY_DEFAULT = (("dora_exact", "scanned, remat"),)
CASES = [
  pytest.param(*case, marks=() if case in BY_DEFAULT else pytest.mark.nightly)
  for case in itertools.product(jaxlora.variants, FORMS)
]


def explicit():
  return helpers.mesh_of(AxisType.Explicit, data=2, model=4)


def layer(p, x):
  """Column-parallel products, then row-parallel ones, which have to say how their sums are sharded, as JAX asks."""
  h = jnp.einsum("bi,io->bo", x, p["up"], out_sharding=P("data", "model"))
  heads = jnp.einsum("bi,inh->bnh", x, p["query"], out_sharding=P("data", "model", None))
  y = jnp.einsum("bnh,nho->bo", jnp.tanh(heads), p["out"], out_sharding=P("data", None))
  return x + y + jnp.einsum("bo,io->bi", jnp.sin(h), p["up"], out_sharding=P("data", None))


def model(form):
  """The layers, and their parameters: one leaf for each layer, or stacked."""
  if form == "unrolled":
    params = {
      f"{name}_{k}": helpers.normal(3 * k, SHAPES[name], jnp.float32, 0.3) for name in AXES for k in range(LAYERS)
    }

    def fn(p, x):
      for k in range(LAYERS):
        x = layer({name: p[f"{name}_{k}"] for name in AXES}, x)
      return x

    return fn, params, {rf"{name}_\d": axes for name, axes in AXES.items()}

  one = jax.checkpoint(layer) if form == "scanned, remat" else layer
  stacked = {name: helpers.normal(3, (LAYERS, *SHAPES[name]), jnp.float32, 0.3) for name in AXES}
  fn = lambda p, x: lax.scan(lambda x, p: (one(p, x), None), x, p)[0]
  return fn, stacked, {name: "s" + axes for name, axes in AXES.items()}


def spec_of(name, params):
  stack = (None,) if name in AXES else ()
  return (*stack, *SPECS[name.split("_")[0]])


def step(fn, trainable, frozen, x):
  loss = lambda half: jnp.mean(jnp.square(fn(jaxlora.join(frozen, half), x)))
  return jax.value_and_grad(loss)(trainable)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("variant", "form"), CASES)
def test_every_variant_on_explicit_axes(variant, form):
  """Values and gradients are the merged tree's, and gradients are sharded as what they are of."""
  fn, params, axes = model(form)
  config = jaxlora.LoraConfig(rank=2, alpha=3, targets="|".join(axes), axes=axes, variant=variant)
  x = helpers.normal(9, (4, 8), jnp.float32)
  mesh = explicit()
  with jax.set_mesh(mesh):
    on_mesh = {name: helpers.place(mesh, leaf, *spec_of(name, params)) for name, leaf in params.items()}
    frozen, trainable = jaxlora.split(moved(jaxlora.adapt(on_mesh, config, KEY)))
    wrapped = jaxlora.wrap(fn, on_materialize="error")
    both = lambda *args: [step(f, *args) for f in (wrapped, helpers.oracle(fn))]  # one program, compiled once
    got, merged = jax.jit(both)(trainable, frozen, helpers.place(mesh, x, "data"))
  for grad, of in zip(jax.tree.leaves(got[1]), jax.tree.leaves(trainable), strict=True):
    assert grad.sharding.is_equivalent_to(of.sharding, of.ndim)
  helpers.assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, merged), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Starts, and arithmetic of adapters.


def both_ways(fn):
  """What `fn` gives of parameters on an Explicit mesh, and of the same on one device."""
  params = {
    name: helpers.normal(k, tuple(2 * n for n in shape), jnp.float32) for k, (name, shape) in enumerate(SHAPES.items())
  }
  mesh = explicit()
  with jax.set_mesh(mesh):
    there = fn({name: helpers.place(mesh, leaf, *SPECS[name]) for name, leaf in params.items()})
  return there, fn(jax.tree.map(jnp.asarray, params))


def adapter(params, seed=0, **fields):
  config = jaxlora.LoraConfig(**{"rank": 2, "targets": "up|query|out", "axes": AXES} | fields)
  return jaxlora.adapt(params, config, jax.random.key(seed))


def moved(tree):
  """The tree as if after training, where it was."""
  return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), helpers.trained(tree), tree)


@pytest.mark.parametrize(
  "init",
  ["pissa", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("olora", "pissa_niter_4", "orthogonal"))],
)
def test_starts_from_the_weight(init):
  """Decompositions of split weights, eagerly and traced; factors lie as those that are drawn do."""
  there, alone = both_ways(lambda params: jax.jit(lambda params: adapter(params, init=init))(params))
  helpers.assert_close(
    jax.tree.map(np.asarray, jaxlora.merge(there)), jax.tree.map(np.asarray, jaxlora.merge(alone)), 1e-5
  )
  for name, spec in SPECS.items():
    assert there[name].a.sharding.spec == factor_spec(P(*spec), AXES[name], "i")
    assert there[name].b.sharding.spec == factor_spec(P(*spec), AXES[name], "o")


CONFIG = jaxlora.LoraConfig(rank=2, targets="up|query|out", axes=AXES)
ARITHMETIC = {
  "compress": lambda one, two, _: jaxlora.compress(one, rank=1),
  "svd": lambda one, two, _: jaxlora.combine([one, two], [0.5, 0.7], "svd", rank=2),
  "ties": lambda one, two, _: jaxlora.combine([one, two], [0.5, 0.7], "ties", density=0.5),
  "dare": lambda one, two, _: jaxlora.combine([one, two], [0.5, 0.7], "dare", density=0.5, key=KEY),
  "svd of dora": lambda one, two, dora: jaxlora.combine([dora], [1.0], "svd", rank=2),
  "extract": lambda one, two, dora: jaxlora.extract(jaxlora.strip(one), jaxlora.merge(dora), config=CONFIG),
  "cosine": lambda one, two, _: (jaxlora.cosine(one, two), jaxlora.norms(one), jaxlora.spectrum(two)),
}


@pytest.mark.nightly
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic(name):
  """Sums, decompositions and measures of adapters are those of one device, and new factors lie beside their base."""

  def fn(params):
    return ARITHMETIC[name](
      *(moved(adapter(params, seed, variant=v)) for seed, v in enumerate(("lora", "lora", "dora")))
    )

  there, alone = both_ways(fn)
  whole = lambda tree: jax.tree.map(np.asarray, tree if name == "cosine" else jaxlora.merge(tree))
  helpers.assert_close(whole(there), whole(alone), 1e-5)
  for weight in [] if name == "cosine" else there.values():
    assert weight.a.sharding.is_equivalent_to(beside_base(weight.base.sharding, weight.roles, "i"), weight.a.ndim)


# ----------------------------------------------------------------------------------------------------------------------
# Other ways to spread a step.


def step_of(fn, tree, x):
  frozen, trainable = jaxlora.split(tree)
  loss = lambda half, x: jnp.mean(jnp.square(fn(jaxlora.join(frozen, half), x)))
  return jax.value_and_grad(loss), trainable, x


def one_layer(**fields):
  """A product of one weight, its tree, and eight rows."""
  tree = moved(helpers.one_weight((8, 16), **fields))
  return lambda p, x: jnp.tanh(x @ p["w"]), tree, helpers.normal(5, (8, 8), jnp.float32)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit])
def test_training_under_shard_map(kind):
  """Data parallel by hand: gradients of shards, averaged, are those of the batch."""
  fn, tree, x = one_layer(variant="dora")
  mesh = helpers.mesh_of(kind, data=4)
  step, trainable, x = step_of(jaxlora.wrap(fn, on_materialize="error"), tree, x)

  def local(half, x):
    half = jax.tree.map(lambda leaf: lax.pcast(leaf, "data", to="varying"), half)  # each device's own gradient
    return jax.tree.map(lambda leaf: lax.pmean(leaf, "data"), step(half, x))

  with jax.set_mesh(mesh):
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    whole = jax.tree.map(lambda leaf: helpers.place(mesh, leaf), trainable)
    got = jax.jit(mapped)(whole, helpers.place(mesh, x, "data"))
  want = jax.jit(step_of(helpers.oracle(fn), tree, x)[0])(trainable, x)
  helpers.assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want), 1e-5)


@pytest.mark.filterwarnings("ignore:.*pmap.*:DeprecationWarning")
def test_pmap():
  fn, tree, x = one_layer()
  step, trainable, x = step_of(jaxlora.wrap(fn, on_materialize="error"), tree, x)
  average = lambda half, x: jax.tree.map(lambda leaf: lax.pmean(leaf, "data"), step(half, x))
  got = jax.pmap(average, "data", in_axes=(None, 0), devices=jax.devices()[:4])(trainable, x.reshape(4, 2, 8))
  want = jax.jit(step_of(helpers.oracle(fn), tree, x)[0])(trainable, x)
  helpers.assert_close(jax.tree.map(lambda leaf: np.asarray(leaf)[3], got), jax.tree.map(np.asarray, want), 1e-5)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("spec", [P("model"), P(None, "model"), P()])
def test_a_weight_is_sent_elsewhere_in_factored_form(spec):
  """`reshard` and `device_put` to other axes of an Explicit mesh."""
  mesh = helpers.mesh_of(AxisType.Explicit, data=2, model=4)
  with jax.set_mesh(mesh):
    params = {"w": helpers.place(mesh, helpers.normal(1, (8, 16), jnp.float32), "data")}
    frozen, trainable = jaxlora.split(moved(jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY)))
    x = helpers.place(mesh, helpers.normal(5, (4, 8), jnp.float32))
    product = lambda x, w: jnp.einsum("bi,io->bo", x, w, out_sharding=P())
    fn = lambda p, x: product(x, jax.sharding.reshard(p["w"], spec)) + product(x, jax.device_put(p["w"], spec))
    both = lambda *args: [step(f, *args) for f in (jaxlora.wrap(fn, on_materialize="error"), helpers.oracle(fn))]
    got, want = jax.jit(both)(trainable, frozen, x)
  helpers.assert_close(jax.tree.map(np.asarray, got), jax.tree.map(np.asarray, want), 1e-5)
