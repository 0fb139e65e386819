"""What devices send each other, in compiled programs: things of the size of factors, and never a base."""

import math
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

import jaxlora
from tests import helpers

KEY = jax.random.key(0)
SPECS = {"up": P("data"), "down": P(None, "data"), "experts": P("data")}
AXES = {"up": "io", "down": "io", "experts": "sio"}
SHAPES = {"up": (64, 256), "down": (256, 64), "experts": (8, 64, 128)}
RANK = 4
THIN = 2 * RANK * 256  # elements: two factors of the longest side
COLLECTIVE = re.compile(r"= (.*?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")


def sent(fn, *args, **options):
  """The sizes of what a compiled function's collectives give, in elements."""
  text = jax.jit(fn, **options).lower(*args).compile().as_text()
  return [
    math.prod(int(size) for size in shape.split(",") if size)
    for result in COLLECTIVE.findall(text)
    for shape in re.findall(r"\[([\d,]*)\]", result)
  ]


def params_on(mesh, names=tuple(SHAPES)):
  return {name: helpers.place(mesh, helpers.normal(1, SHAPES[name], jnp.float32), *SPECS[name]) for name in names}


def adapter(params, seed=0, **fields):
  axes = {name: AXES[name] for name in params}
  config = jaxlora.LoraConfig(rank=RANK, targets="|".join(params), axes=axes, **fields)
  return jaxlora.adapt(params, config, jax.random.key(seed))


def by_default(names, *chosen):
  return [pytest.param(name, marks=() if name in chosen else pytest.mark.nightly) for name in names]


@pytest.mark.parametrize("variant", by_default(jaxlora.variants))
def test_merging_sends_no_base(variant):
  """Every device merges its own shard: sums for norms are of the rank's size."""
  params = params_on(helpers.mesh_of(data=8))
  lies = jax.tree.map(lambda leaf: leaf.sharding, params)
  assert sum(sent(jaxlora.merge, adapter(params, variant=variant), out_shardings=lies)) <= THIN


ARITHMETIC = {
  "compress": lambda one, two: jaxlora.compress(one, rank=2),
  "combine": lambda one, two: jaxlora.combine([one, two], [0.5, 0.5]),
  "svd": lambda one, two: jaxlora.combine([one, jaxlora.compress(two, rank=2)], [0.5, 0.5], "svd", rank=4),
  "norms": lambda one, two: jaxlora.norms(one),
  "cosine": jaxlora.cosine,
}


@pytest.mark.parametrize("name", by_default(ARITHMETIC, "norms"))
def test_arithmetic_sends_no_base(name):
  params = params_on(helpers.mesh_of(data=8), ("up", "down"))
  assert max(sent(ARITHMETIC[name], adapter(params), adapter(params, 1)), default=0) <= THIN


@pytest.mark.parametrize("variant", by_default(jaxlora.variants, "lora"))
def test_experts_on_devices_of_their_own_send_nothing(variant):
  """Factors of an expert lie where it does; but for the loss, what vectors over the rank or blocks of LoKr have."""
  mesh = helpers.mesh_of(data=8)
  frozen, trainable = jaxlora.split(adapter(params_on(mesh, ("experts",)), variant=variant))
  x = helpers.place(mesh, helpers.normal(2, (8, 16, 64), jnp.float32), "data")
  fn = jaxlora.wrap(lambda p, x: jnp.einsum("etd,edf->etf", x, p["experts"]), on_materialize="error")
  step = jax.value_and_grad(lambda half, x: jnp.sum(jnp.sin(fn(jaxlora.join(frozen, half), x))))
  lies = NamedSharding(mesh, P()), jax.tree.map(lambda leaf: leaf.sharding, trainable)
  sizes = sent(step, trainable, x, out_shardings=lies)
  assert max(sizes) <= (1 if variant in ("lora", "lora_fa", "dora", "dora_exact", "loha") else 8 * RANK * 16)


def test_groups_of_rows_beside_their_experts_send_nothing():
  """`ragged_dot` under `shard_map`, as after an exchange of tokens: but for the loss, which is one number."""
  mesh = helpers.mesh_of(data=8)
  frozen, trainable = jaxlora.split(adapter(params_on(mesh, ("experts",))))
  x = helpers.place(mesh, helpers.normal(2, (128, 64), jnp.float32), "data")
  sizes = helpers.place(mesh, np.full(8, 16, np.int32), "data")
  each = lambda p, x, sizes: jax.lax.ragged_dot(x, p["experts"], sizes)
  fn = jaxlora.wrap(jax.shard_map(each, mesh=mesh, in_specs=P("data"), out_specs=P("data")), on_materialize="error")
  loss = lambda half, x, frozen, sizes: jnp.sum(jnp.sin(fn(jaxlora.join(frozen, half), x, sizes)))
  lies = NamedSharding(mesh, P()), (jax.tree.map(lambda leaf: leaf.sharding, trainable), x.sharding)
  step = jax.value_and_grad(loss, argnums=(0, 1))
  assert sent(step, trainable, x, frozen, sizes, out_shardings=lies) == [1]


@pytest.mark.parametrize("variant", ["lora", "dora_exact"])
@pytest.mark.parametrize("rows", by_default([(), ("data",)], ()))
def test_experts_that_a_compiler_splits_send_what_the_floor_does_and_thin_factors(rows, variant):
  """Of rows that are whole on each device its outputs are summed over the devices: the thin products add nothing."""
  mesh = helpers.mesh_of(data=8)
  params = params_on(mesh, ("experts",))
  frozen, trainable = jaxlora.split(adapter(params, variant=variant))
  x, sizes = helpers.place(mesh, helpers.normal(2, (128, 64), jnp.float32), *rows), np.full(8, 16, np.int32)
  each = lambda p, x: jax.lax.ragged_dot(x, p["experts"], sizes)
  fn = jaxlora.wrap(each, on_materialize="error")
  sine = lambda y: jnp.sum(jnp.sin(y))
  loss = lambda half, x, frozen: sine(fn(jaxlora.join(frozen, half), x))
  lies = jax.tree.map(lambda leaf: leaf.sharding, (trainable, x))
  floor = jax.grad(lambda x, params: sine(each(params, x)))
  large = lambda sizes: sorted(size for size in sizes if size > 8)
  factors = [leaf.size for leaf in jax.tree.leaves(trainable)]
  gradients = factors if rows else []
  assert large(sent(jax.grad(loss, argnums=(0, 1)), trainable, x, frozen, out_shardings=lies)) == sorted(
    [*large(sent(floor, x, params, out_shardings=x.sharding)), *factors, *gradients]
  )


def mlp(p, x):
  return jnp.tanh(x @ p["up"]) @ p["down"]


@pytest.mark.nightly
def test_a_bank_on_a_mesh_sends_what_the_base_does():
  """Rows of several adapters, tensor-parallel: the base's own sum of activations."""
  mesh = helpers.mesh_of(data=2, model=4)
  specs = {"up": (None, "model"), "down": ("model",)}
  params = {name: helpers.place(mesh, helpers.normal(1, SHAPES[name], jnp.float32), *specs[name]) for name in specs}
  bank = jaxlora.stack({"one": helpers.trained(adapter(params)), "two": helpers.trained(adapter(params, 1))})
  x = helpers.place(mesh, helpers.normal(2, (16, 64), jnp.float32), "data")
  ids = helpers.place(mesh, np.arange(16) % 3 - 1, "data")
  routed = jaxlora.route(mlp)
  assert (
    sum(sent(routed, params, bank, ids, x)) <= sum(sent(mlp, params, x)) + 2 * 8 * RANK
  )  # what `h` of both adapters has
  plain = jax.tree.map(np.asarray, params)
  helpers.assert_close(
    np.asarray(jax.jit(routed)(params, bank, ids, x)),
    np.asarray(routed(plain, bank, np.asarray(ids), np.asarray(x))),
    1e-5,
  )


@pytest.mark.nightly
@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_starts_from_data_lie_beside_their_base(method):
  mesh = helpers.mesh_of(data=8)
  fn = (lambda p, x: jnp.sum(mlp(p, x) ** 2)) if method == "lora_ga" else mlp
  x = helpers.normal(2, (16, 64), jnp.float32)
  start = lambda params, x: jaxlora.init_from_data(adapter(params), fn, [x], KEY, method=method)
  params = params_on(mesh, ("up", "down"))
  there = start(params, helpers.place(mesh, x, "data"))
  alone = start(jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), params), jnp.asarray(x))
  for name in params:
    assert there[name].a.sharding == adapter(params)[name].a.sharding
    one, other = (np.asarray(jnp.abs(tree[name].a)) for tree in (there, alone))  # directions have no sign
    np.testing.assert_allclose(one, other, rtol=0, atol=1e-3 * other.max())
