"""What is made again for the backward pass: the same numbers, less memory, and no product twice."""

import functools
import re

import flax.linen as nn
import jax
from jax import export, lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._jax import by_platform, called, linear_call
from jaxlora._platform import wait
from tests import helpers
from tests.helpers import DEVICES, profiles

KEY = jax.random.key(0)
WIDTH, HIDDEN, TOKENS = 16, 64, 96

ACTIVATIONS = {
  "gelu": nn.gelu,
  "exact gelu": lambda x: nn.gelu(x, approximate=False),
  "silu": nn.silu,
  "relu": nn.relu,
  "softplus": nn.softplus,
  "tanh": jnp.tanh,
  "squared relu": lambda x: jnp.square(nn.relu(x)),
  "gated": lambda x: nn.sigmoid(x) * jnp.roll(x, 1, axis=-1),
  "quotient": lambda x: x / (2 + jnp.roll(x, 1, axis=-1) ** 2),
  "masked": lambda x: jnp.where(x > 0.1, nn.gelu(x), jnp.zeros((), x.dtype)),
}


CONTROL_FLOW = ("jit", "scan", "remat", "cond", "vmap", "shard_map")


class Mlp(nn.Module):
  """Pre-norm blocks with a residual stream."""

  activation: str = "gelu"
  layers: int = 3

  @nn.compact
  def __call__(self, x):
    for k in range(self.layers):
      hidden = nn.Dense(HIDDEN, name=f"up_{k}", param_dtype=x.dtype)(nn.LayerNorm(param_dtype=x.dtype)(x))
      x = x + nn.Dense(WIDTH, name=f"down_{k}", param_dtype=x.dtype)(ACTIVATIONS[self.activation](hidden))
    return x


def case(activation="gelu", dtype=jnp.float64, **fields):
  model, x = Mlp(activation), helpers.array(2, (2, TOKENS // 2, WIDTH), dtype)
  fn = lambda p, x: model.apply({"params": p}, x)
  targets = ["up_0", "up_1", "up_2", "down_0", "down_1", "down_2"]
  return fn, helpers.adapted(params_of(dtype), alpha=4, targets=targets, **fields), x


@functools.cache
def params_of(dtype):
  """Those of all activations."""
  made = jax.jit(Mlp().init)(KEY, jnp.ones((1, 1, WIDTH), dtype))["params"]
  return jax.tree.map(lambda leaf: leaf + 0.1, made)


@pytest.mark.usefixtures("x64", "lenient")
@pytest.mark.parametrize(("activation", "devices"), profiles.alternating(ACTIVATIONS, DEVICES), indirect=["devices"])
def test_gradients_are_the_same(activation, devices):
  fn, tree, x = case(activation)
  tree, x = devices(tree, x)
  got, want = (jax.jit(helpers.sine_step(fn, recompute))(tree, x) for recompute in (True, False))
  helpers.assert_close(got, want, 1e-12)
  helpers.check(fn, tree, (x,), 1e-12)


def derivatives(f, frozen, tangent):
  """Of a loss by the factors `t` and the data `x`."""
  loss = lambda t, x: jnp.sum(jnp.sin(f(jaxlora.join(frozen, t), x)))
  return {
    "jvp": lambda t, x: jax.jvp(lambda t: loss(t, x), (t,), (tangent,)),
    "hessian times tangent": lambda t, x: jax.jvp(lambda t: jax.grad(loss)(t, x), (t,), (tangent,)),
    "gradient of a gradient's norm": jax.grad(
      lambda t, x: sum(jnp.sum(g**2) for g in jax.tree.leaves(jax.grad(loss)(t, x)))
    ),
    "data": jax.grad(loss, argnums=1),
    "both": jax.grad(loss, argnums=(0, 1)),
    "per example": lambda t, x: jax.vmap(lambda x: jax.grad(loss)(t, x[None]))(x),
    "of a vmap": jax.grad(lambda t, x: jnp.sum(jax.vmap(lambda x: loss(t, x[None]))(x))),
    "two steps of vmap": lambda t, x: jax.vmap(jax.vmap(lambda x: jax.grad(loss)(t, x[None, None])))(x),
  }


DERIVATIVES = tuple(derivatives(None, None, None))


@pytest.mark.usefixtures("x64", "lenient")
@pytest.mark.parametrize(("name", "devices"), profiles.alternating(DERIVATIVES, DEVICES), indirect=["devices"])
def test_forward_mode_second_derivatives_and_vmap(name, devices):
  fn, tree, x = case("gelu")
  x = x[:, :3]
  frozen, trainable = jaxlora.split(tree)
  tangent = jax.tree.map(lambda leaf: helpers.array(5, leaf.shape, leaf.dtype), trainable)
  got, want = (
    jax.jit(derivatives(f, frozen, tangent)[name])(*devices(trainable, x))
    for f in (jaxlora.wrap(fn, on_materialize="error"), helpers.oracle(fn))
  )
  helpers.assert_close(got, want, 1e-11)


@pytest.mark.usefixtures("lenient")
def test_dropout_is_made_again_with_the_same_mask():
  fn, tree, x = case(dtype=jnp.float32, dropout=0.5)
  got, want = (jax.jit(helpers.sine_step(fn, recompute, dropout_key=KEY))(tree, x) for recompute in (True, False))
  helpers.assert_close(got, want, 1e-5)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("control", "devices"), profiles.alternating(CONTROL_FLOW, DEVICES), indirect=["devices"])
def test_inside_control_flow(control, devices):
  fn, tree, x = case(dtype=jnp.float32)
  tree, x = devices(tree, x)
  helpers.check(helpers.WRAPPERS[control](fn), tree, (x,), 1e-4)


@pytest.mark.usefixtures("x64", "lenient")
@pytest.mark.parametrize("spec", [(), ("data",), ("data", "time")])
def test_meshes_whose_types_say_how_arrays_are_sharded(spec):
  fn, tree, x = case()
  mesh = helpers.mesh_of(jax.sharding.AxisType.Explicit, data=2, time=2)
  want = jax.jit(helpers.sine_step(fn, False))(tree, x)
  with jax.set_mesh(mesh):
    place = functools.partial(helpers.place, mesh)
    got = jax.jit(helpers.sine_step(fn, True))(jax.tree.map(place, tree), place(x, *spec))
  helpers.assert_close(jax.device_get(got), jax.device_get(want), 1e-12)


@pytest.mark.usefixtures("lenient")
def test_no_more_collectives_than_without():
  fn, tree, x = case(dtype=jnp.float32)
  place = functools.partial(helpers.place, helpers.mesh_of(data=2))
  args = jax.tree.map(place, tree), place(x, "data")
  texts = [jax.jit(helpers.sine_step(fn, recompute)).lower(*args).compile().as_text() for recompute in (True, False)]
  found = [sorted(re.findall(r"(all-\w+|collective-permute)\(", text)) for text in texts]
  assert found[0] == found[1]


NOTHING = {"rows": np.s_[:0], "tokens": np.s_[:, :0]}


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize(("dtype", "axis"), profiles.alternating([jnp.float32, jnp.bfloat16, jnp.float16], NOTHING))
def test_batches_of_nothing(dtype, axis):
  """No rows, or no tokens, in every precision: gradients are zero, whatever waits for a cotangent."""
  fn, tree, x = case(dtype=dtype)
  nothing = np.asarray(x)[NOTHING[axis]]
  for options in ({}, {"platform": "gpu"}, {"tuning": "none"}, {"dropout_key": KEY}):
    value, grads = jax.jit(helpers.sine_step(fn, True, **options))(tree, nothing)
    assert value == 0
    assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(grads))


@pytest.mark.usefixtures("lenient")
def test_a_symbolic_number_of_tokens():
  fn, tree, x = case(dtype=jnp.float32)
  (batch,) = export.symbolic_shape("batch")
  rows = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
  exported = export.export(jax.jit(helpers.sine_step(fn, True)))(tree, rows)
  helpers.assert_close(exported.call(tree, x), jax.jit(helpers.sine_step(fn, False))(tree, x), 1e-5)


@pytest.mark.usefixtures("lenient")
def test_one_device_waits_by_arithmetic_and_several_or_other_platforms_by_a_barrier():
  """On CPUs how a program waits is decided where it is lowered, for as many devices as it runs on."""
  fn, tree, x = case(dtype=jnp.float32)
  step = lambda **options: jax.jit(helpers.sine_step(fn, True, **options))
  lowered = {
    "one device": step().lower(tree, x),
    "several": step().lower(*helpers.on_devices(2, tree, x)),
    "gpu": step(platform="gpu").lower(tree, x),
    "for a tpu": step().trace(tree, x).lower(lowering_platforms=("tpu",)),
  }
  found = {
    name: [word in text.as_text() for word in ("shift_right_logical", "optimization_barrier")]
    for name, text in lowered.items()
  }
  assert found == {
    "one device": [True, False],
    "several": [False, True],
    "gpu": [False, True],
    "for a tpu": [False, True],
  }


def kept_bytes(fn, recompute, tree, x):
  return helpers.temp_bytes(helpers.sine_step(fn, recompute), tree, x)


@pytest.mark.usefixtures("lenient")
def test_memory_stays_at_the_frozen_models():
  """The issue of it all: training the factors holds no more than running the frozen model backwards."""
  fn, tree, _ = case(dtype=jnp.float32)
  x = helpers.array(3, (8, 512, WIDTH), jnp.float32)
  floor = helpers.temp_bytes(helpers.frozen_step(fn), x, jaxlora.merge(tree))
  kept = kept_bytes(fn, True, tree, x)
  assert kept <= floor
  assert kept < 0.75 * kept_bytes(fn, False, tree, x)


@pytest.mark.usefixtures("lenient")
def test_no_product_of_the_base_runs_twice():
  """What is made again is elementwise, or thin: the base's products run as often as without."""
  fn, tree, x = case(dtype=jnp.float32)

  def of_bases(recompute):
    products = helpers.products(helpers.sine_step(fn, recompute), tree, x)
    return sum(all(2 not in var.aval.shape[-2:] for var in (*eqn.invars, *eqn.outvars)) for eqn in products)

  assert of_bases(True) == of_bases(False) == 2 * 6 - 1  # the first one's input has no gradient


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_values_that_pass_through_waiting_are_untouched_bit_for_bit(dtype):
  """The wait computes with a one or a zero made of a cotangent's bits, whatever those bits are."""
  leaf = jnp.asarray([1.5, -0.0, np.inf, np.nan, 6e4, -1.0], dtype)
  bits = lambda value: np.asarray(value).view(f"uint{8 * leaf.dtype.itemsize}")
  for cotangent in (0.0, -1.0, np.inf, -np.inf, np.nan, 3e38, -1e-45):
    (out,) = wait._by_arithmetic([leaf], [jnp.full((2, 3), cotangent, jnp.float32)])
    np.testing.assert_array_equal(bits(out), bits(leaf))


@pytest.mark.usefixtures("lenient")
def test_elementwise_functions_of_a_weight_itself_are_left_to_the_rules():
  weights = {"w": helpers.array(1, (5, 7), jnp.float32)}
  tree = helpers.adapted(weights, rank=2, targets="w")
  fn = lambda p, x: x @ (jnp.exp(-p["w"]) + 1.0)
  helpers.check(fn, tree, (helpers.array(2, (3, 5), jnp.float32),), 1e-5, on_materialize="ignore")
  with pytest.raises(jaxlora.MaterializeError, match="`exp`"):
    jaxlora.wrap(fn, on_materialize="error")(tree, helpers.array(2, (3, 5), jnp.float32))


@pytest.mark.usefixtures("lenient", "fresh_traces")
@pytest.mark.parametrize(
  ("module", "name"), [(linear_call, "Primitive"), (by_platform, "Primitive"), (called, "set_xla_metadata")]
)
def test_without_what_this_version_has_it_is_a_plain_call(module, name, monkeypatch):
  monkeypatch.setattr(module, name, None)
  fn, tree, x = case(dtype=jnp.float32)
  got, want = (jax.jit(helpers.sine_step(fn, recompute))(tree, x) for recompute in (True, False))
  helpers.assert_close(got, want, 1e-5)


@pytest.mark.usefixtures("lenient")
def test_a_scanned_model_keeps_one_array_a_layer_less():
  class Body(nn.Module):
    @nn.compact
    def __call__(self, x, _):
      hidden = nn.Dense(HIDDEN, name="up")(nn.LayerNorm()(x))
      return x + nn.Dense(WIDTH, name="down")(nn.gelu(hidden)), None

  model = nn.scan(Body, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)()
  x = helpers.array(3, (8, 256, WIDTH), jnp.float32)
  params = jax.jit(model.init)(KEY, x, None)["params"]
  fn = lambda p, x: model.apply({"params": p}, x, None)[0]
  tree = helpers.adapted(params, rank=2, probe=lambda p: fn(p, x))
  helpers.check(fn, tree, (x[:1, :8],), 1e-4)
  assert kept_bytes(fn, True, tree, x) < 0.8 * kept_bytes(fn, False, tree, x)


def test_lax_is_enough():
  """No Flax: a layer norm and a gate written out."""

  def fn(p, x):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3)
    gate, value = jnp.split(normed @ p["up"], 2, axis=-1)
    return (lax.logistic(gate) * value) @ p["down"]

  weights = {"up": helpers.array(1, (6, 16), jnp.float32), "down": helpers.array(2, (8, 6), jnp.float32)}
  tree = helpers.adapted(weights, rank=2, targets=".*")
  helpers.check(fn, tree, (helpers.array(3, (2, 5, 6), jnp.float32),), 1e-5)
