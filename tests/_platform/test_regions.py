"""Norms, softmaxes and activations as one: the same numbers, and of each at most one array is kept."""

import functools
import re

import flax.linen as nn
import jax
from jax import lax
from jax.ad_checkpoint import checkpoint_name, print_saved_residuals
import jax.numpy as jnp
import pytest

import jaxlora
from jaxlora._jax import called, trace_cache
from jaxlora._platform import regions
from tests import helpers
from tests.helpers import DEVICES, profiles

KEY = jax.random.key(0)
WIDTH, HIDDEN = 12, 24


def layer_norm(x, scale):
  centred = x - x.mean(-1, keepdims=True)
  return centred * lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3) * scale


def fast_layer_norm(x, scale):
  mean, square = x.mean(-1, keepdims=True), jnp.square(x).mean(-1, keepdims=True)
  return (x - mean) * (lax.rsqrt(jnp.maximum(square - mean**2, 0) + 1e-3) * scale)


def rms_norm(x, scale):
  return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * scale


def masked_softmax(x, scale):
  return jax.nn.softmax(jnp.where(x > -1.0, x * scale, -1e9), axis=-1)


def softmax_by_hand(x, scale):
  powers = jnp.exp(x * scale - lax.stop_gradient(x.max(-1, keepdims=True)))
  return powers / powers.sum(-1, keepdims=True)


def softmax_with_a_spare_row(x, scale):
  """Attention that may look at nothing: the denominator is one more than the sum."""
  powers = jnp.exp(x * scale)
  return powers / (1.0 + 0.5 * powers.sum(-1, keepdims=True))


def exponential_over_its_norm(x, scale):
  """No softmax: the derivative of the denominator has values in it."""
  powers = jnp.exp(x * scale)
  return powers / jnp.sqrt(jnp.square(powers).sum(-1, keepdims=True))


def exponential_used_twice(x, scale):
  powers = jnp.exp(-jnp.abs(x * scale))
  return powers / powers.sum(-1, keepdims=True) + 0.1 * powers


def norm_of_what_is_used_beside_it(x, scale):
  """As in a model's first block, whose residual stream is one array and something added to it."""
  stream = x + scale
  return stream + layer_norm(stream, scale)


def dead_end(x, scale):
  powers = jnp.exp(-jnp.square(x))
  _ = jnp.log(powers.sum(-1)) * 2
  return powers * scale


def statistics_used_outside(x, scale):
  spread = jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3)
  return jnp.tanh(x / spread) * scale + jnp.concatenate([spread] * x.shape[-1], -1)


def along_tokens(x, scale):
  return jnp.exp(x - x.max(1, keepdims=True)) / (1.0 + jnp.abs(x).sum(1, keepdims=True)) * scale


def gate(x, scale):
  return jax.nn.silu(x) * scale * jnp.roll(x, 1, -1)


FUNCTIONS = {
  fn.__name__: fn
  for fn in (
    layer_norm, fast_layer_norm, rms_norm, masked_softmax, softmax_by_hand, softmax_with_a_spare_row,
    exponential_over_its_norm, exponential_used_twice, norm_of_what_is_used_beside_it, dead_end,
    statistics_used_outside, along_tokens, gate,
  )
}  # fmt: skip


def case(name, dtype=jnp.float64):
  """A product, a function, two products that share its result, and the function again."""

  def fn(p, x):
    middle = FUNCTIONS[name](x @ p["up"], p["scale"])
    both = middle @ p["left"] + jnp.sin(middle @ p["right"])
    return FUNCTIONS[name](both + x, jnp.ones((), x.dtype)) @ p["out"]

  shapes = {"up": (WIDTH, HIDDEN), "left": (HIDDEN, WIDTH), "right": (HIDDEN, WIDTH), "out": (WIDTH, 5)}
  weights = {name: helpers.array(k, shape, dtype) for k, (name, shape) in enumerate(shapes.items())}
  weights["scale"] = 1 + helpers.array(9, (HIDDEN,), dtype)
  tree = helpers.adapted(weights, alpha=4, targets=list(shapes), train=["scale"])
  return fn, tree, helpers.array(10, (2, 12, WIDTH), dtype)


@pytest.mark.usefixtures("x64", "lenient")
@pytest.mark.parametrize(("name", "devices"), profiles.alternating(FUNCTIONS, DEVICES), indirect=["devices"])
def test_gradients_are_the_same(name, devices):
  fn, tree, x = case(name)
  tree, x = devices(tree, x)
  got, want = (jax.jit(helpers.sine_step(fn, recompute))(tree, x) for recompute in (True, False))
  helpers.assert_close(got, want, 1e-12)
  helpers.check(fn, tree, (x,), 1e-12)


@pytest.mark.usefixtures("x64", "lenient")
@pytest.mark.parametrize("name", profiles.halved(FUNCTIONS))
def test_gradients_outside_of_jit_are_the_same(name):
  """There nothing is traced ahead."""
  fn, tree, x = case(name)
  got, want = (helpers.sine_step(fn, recompute)(tree, x) for recompute in (True, False))
  helpers.assert_close(got, want, 1e-12)


EVERY_WAY = [
  pytest.param(name, device, marks=() if k % 4 == 2 * j + 1 else pytest.mark.nightly)
  for k, name in enumerate(FUNCTIONS)
  for j, device in enumerate(DEVICES)
]


@pytest.mark.usefixtures("x64", "lenient")
@pytest.mark.parametrize(("name", "devices"), EVERY_WAY, indirect=["devices"])
def test_every_way_to_differentiate(name, devices):
  """Forward, forward over reverse, and vmap of it, by the inputs and by the factors.

  By default of every second function, as outside of jit of the others; all are differentiated once, above.
  """
  fn, tree, x = case(name)
  tree, x = devices(tree, x)
  frozen, trainable = jaxlora.split(tree)
  along = jax.tree.map(lambda leaf: jnp.sin(leaf + 1), (trainable, x))

  def loss(recompute):
    wrapped = jaxlora.wrap(fn, recompute=recompute)
    return lambda factors, x: jnp.sum(jnp.sin(wrapped(jaxlora.join(frozen, factors), x)))

  def every(recompute):
    f = loss(recompute)
    forward = jax.jvp(f, (trainable, x), along)
    second = jax.jvp(jax.grad(f, (0, 1)), (trainable, x), along)
    many = jax.vmap(jax.grad(f, (0, 1)), (None, 0))(trainable, jnp.stack([x, -x]))
    return forward, second, many

  helpers.assert_close(jax.jit(every, static_argnums=0)(True), jax.jit(every, static_argnums=0)(False), 1e-11)


@pytest.mark.usefixtures("lenient")
def test_what_is_found():
  """Each norm, softmax and activation is one region; what is used outside of one, too, stays out of them."""
  found = {}
  for name in FUNCTIONS:
    jaxpr = jax.make_jaxpr(FUNCTIONS[name])(jnp.ones((4, 8, 64)), jnp.ones(64)).jaxpr
    found_here = {region.members: region for region in regions.find_regions(jaxpr).values()}
    found[name] = [(len(region.members) > 3, region.softmax() is not None) for region in found_here.values()]
  one, softmax = [(True, False)], [(True, True)]
  assert found["layer_norm"] == found["fast_layer_norm"] == found["rms_norm"] == one
  assert found["masked_softmax"] == found["softmax_by_hand"] == found["softmax_with_a_spare_row"] == softmax
  assert found["norm_of_what_is_used_beside_it"] == one
  assert found["exponential_over_its_norm"] == found["exponential_used_twice"] == one


def test_regions_that_differ_are_told_apart():
  def signature(fn):
    jaxpr = jax.make_jaxpr(fn)(jnp.ones((2, 3, 64))).jaxpr
    return next(iter(regions.find_regions(jaxpr).values())).signature()

  assert signature(lambda x: jnp.exp(x * 2.0)) == signature(lambda y: jnp.exp(y * 2.0))
  different = (
    lambda x: jnp.exp(x * 2.0),
    lambda x: jnp.exp(x * 3.0),
    lambda x: jnp.exp(x * -0.0),
    lambda x: jnp.exp(x * 0.0),
    lambda x: jnp.exp(2.0 - x),
    lambda x: jnp.exp(x - 2.0),
    lambda x: jnp.exp(x - x.sum(-1, keepdims=True)),
    lambda x: jnp.exp(x - x.sum(0, keepdims=True)),
    lambda x: jnp.exp(x - x.max(-1, keepdims=True)),
  )
  assert len({signature(fn) for fn in different}) == len(different)


@pytest.mark.usefixtures("x64", "lenient")
def test_regions_whose_operands_trade_places_are_told_apart():
  """The same equations on the same shapes, once the left operand is the large one, once the right."""

  def fn(p, x, scale):
    left, right = jnp.exp(x @ p["a"] * scale), jnp.exp(scale * (x @ p["b"]))
    return left @ p["c"] + right @ p["d"]

  shapes = {"a": (6, 16), "b": (6, 16), "c": (16, 4), "d": (16, 4)}
  weights = {name: helpers.array(k, shape, jnp.float64) for k, (name, shape) in enumerate(shapes.items())}
  tree = helpers.adapted(weights, targets=list(shapes))
  args = helpers.array(5, (3, 8, 6), jnp.float64), helpers.array(6, (1, 1, 16), jnp.float64)
  helpers.check(fn, tree, args, 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# What it is for, in compiled figures.


class Block(nn.Module):
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x):
    options = {"dtype": self.dtype, "param_dtype": self.dtype}
    hidden = nn.LayerNorm(**options)(x)
    mask = nn.make_causal_mask(x[..., 0])
    x = x + nn.MultiHeadDotProductAttention(2, name="attention", **options)(hidden, mask=mask)
    hidden = nn.gelu(nn.Dense(4 * x.shape[-1], name="up", **options)(nn.LayerNorm(**options)(x)))
    return x + nn.Dense(x.shape[-1], name="down", **options)(hidden)


class Stack(nn.Module):
  layers: int
  dtype: object = jnp.float32

  @nn.compact
  def __call__(self, x):
    for k in range(self.layers):
      x = Block(self.dtype, name=f"block_{k}")(x)
    return x


RANK = 3


@functools.cache
def stack(layers, tokens=64, dtype=jnp.float32, width=32, rank=RANK):
  model, x = Stack(layers, dtype), helpers.array(3, (4, tokens, width), dtype)
  params = jax.jit(model.init)(KEY, x)["params"]
  fn = lambda p, x: model.apply({"params": p}, x)
  return fn, helpers.adapted(params, probe=lambda p: fn(p, x), rank=rank, targets="all-linear"), x


@pytest.mark.usefixtures("lenient")
def test_less_is_kept_than_by_the_frozen_models_own_step():
  fn, tree, x = stack(3, tokens=32)
  floor = helpers.temp_bytes(helpers.frozen_step(fn), x, jaxlora.merge(tree))
  temp = [helpers.temp_bytes(helpers.sine_step(fn, recompute), tree, x) for recompute in (True, False)]
  assert temp[0] < 0.95 * floor
  assert temp[0] < 0.7 * temp[1]


@pytest.mark.usefixtures("lenient", "fresh_traces")
def test_a_loop_keeps_one_array_of_a_softmax():
  """Its result, which what reads it keeps anyway."""
  tokens, layers = 40, 3
  params = {name: jnp.zeros((layers, WIDTH, WIDTH)) for name in ("query", "value")}

  def fn(p, x):
    def layer(x, w):
      weights = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x @ w["query"], x))
      return jnp.einsum("bts,bsd->btd", weights, x @ w["value"]), None

    return jnp.sum(lax.scan(layer, x, p)[0])

  x = jnp.zeros((2, tokens, WIDTH))
  tree = helpers.adapted(params, rank=2, targets=".*", seed=None, probe=lambda p: fn(p, x))
  frozen, trainable = jaxlora.split(tree)
  step = jax.grad(lambda half: jaxlora.wrap(fn)(jaxlora.join(frozen, half), x))
  stacks = re.findall(rf"(\w+):f32\[{layers},2,{tokens},{tokens}\]", str(jax.make_jaxpr(step)(trainable)))
  assert len(set(stacks)) == 1


def test_of_the_two_products_their_sum_is_kept(monkeypatch):
  fn, tree, x = stack(1, tokens=32)
  at_inference = helpers.optimised(jaxlora.wrap(fn), tree, x).as_text()
  fn, tree, x = stack(2, tokens=32)
  together = helpers.temp_bytes(helpers.sine_step(fn, True), tree, x)
  assert " call(" not in at_inference  # it is part of what reads it
  monkeypatch.setattr(called, "set_xla_metadata", None)
  trace_cache._once.cache_clear()
  assert together < 0.9 * helpers.temp_bytes(helpers.sine_step(fn, True), tree, x)


@pytest.mark.usefixtures("lenient")
def test_a_step_computes_the_floor_and_the_factors_own():
  """At real sizes: forward and input gradient of the frozen model, and three thin products for each factor."""
  width, tokens, rank = 512, 64, 8
  fn, tree, x = stack(1, tokens, width=width, rank=rank)
  floor = helpers.product_flops(jax.grad(lambda x, p: jnp.sum(fn(p, x))), x, jaxlora.merge(tree))
  factors = 3 * 2 * 4 * tokens * rank * (4 * (width + width) + 2 * (width + 4 * width))
  assert helpers.product_flops(helpers.sine_step(fn, True), tree, x) <= 1.005 * (floor + factors)


@pytest.mark.usefixtures("lenient")
def test_one_trace_for_all_steps_and_all_adapters_of_one_shape():
  fn, tree, x = stack(1)
  traces = 0

  def counted(p, x):
    nonlocal traces
    traces += 1
    return fn(p, x)

  step = jax.jit(helpers.sine_step(counted, True))
  for other in (tree, jax.tree.map(lambda leaf: leaf + 1, tree), helpers.trained(tree, seed=5)):
    step(other, x)
    step(other, x + 1)
  assert traces == 1


@pytest.mark.usefixtures("lenient")
def test_no_array_shaped_like_a_base_is_transposed_or_made():
  """In the optimised program: no transposed copy, gradient or delta of a weight."""
  fn, tree, x = stack(2)
  text = helpers.optimised(helpers.sine_step(fn, True), tree, x).as_text()
  made = (
    r"= f32\[(?:32,128|128,32|32,32|32,2,16|2,16,32)\]\S* (?!parameter|bitcast|get-tuple-element|reshape)([\w-]+)\("
  )
  assert re.findall(made, text) == []


@pytest.mark.usefixtures("lenient")
def test_an_activation_is_made_again_once():
  """The gradient of the next A and that of the activation itself share it."""
  fn, tree, x = stack(2)
  text = helpers.optimised(helpers.sine_step(fn, True), tree, x).as_text()
  assert len(re.findall(r" tanh\(", text)) == 2 * 2


@pytest.mark.usefixtures("lenient")
def test_weights_that_share_an_input_meet_it_in_one_product():
  """Query, key and value: forward, and for the gradients of their A's and of the input."""
  fn, tree, x = stack(1)
  shapes = [eqn.outvars[0].aval.shape for eqn in helpers.products(helpers.sine_step(fn, True), tree, x)]
  tokens = (4, 64)
  assert shapes.count((*tokens, 3 * RANK)) == 1
  assert shapes.count((3 * RANK, 32)) == 1
  assert shapes.count((*tokens, RANK)) == 3 + 6  # h of the other three weights, and the cotangents of all six


@pytest.mark.usefixtures("lenient")
def test_layers_that_are_alike_are_traced_and_lowered_once():
  misses, functions = [], []
  for layers in (2, 3):
    fn, tree, x = stack(layers)
    trace_cache._once.cache_clear()
    lowered = jax.jit(helpers.sine_step(fn, True)).lower(tree, x)
    misses.append(trace_cache._once.cache_info().misses)
    functions.append(lowered.as_text().count("func.func"))
  assert misses[0] == misses[1] > 0
  assert functions[0] == functions[1]


@pytest.mark.usefixtures("lenient")
def test_half_precision_weights_are_not_kept_in_a_wider_copy():
  fn, tree, x = stack(2, dtype=jnp.bfloat16)
  copies = 4 * sum(leaf.size for leaf in jax.tree.leaves(jaxlora.strip(tree)))
  got, want = (helpers.temp_bytes(helpers.sine_step(fn, recompute), tree, x) for recompute in (True, False))
  assert got < want - copies / 2
  loss = lambda recompute: lambda x: jnp.sum(jaxlora.wrap(fn, recompute=recompute)(tree, x).astype(jnp.float32))
  forward = [jax.jit(lambda x, r=r: jax.jvp(loss(r), (x,), (x,)))(x) for r in (True, False)]
  helpers.assert_close(*forward, 0.05)


@pytest.mark.usefixtures("lenient")
def test_a_policy_of_checkpoint_finds_the_users_names(capsys):
  """Around an activation, inside of a norm, and of a softmax."""

  def fn(p, x):
    named = checkpoint_name(nn.gelu(x @ p["w"]), "seen")
    normed = checkpoint_name(named - named.mean(-1, keepdims=True), "seen")
    normed = normed * lax.rsqrt(jnp.square(normed).mean(-1, keepdims=True) + 1e-3)
    return checkpoint_name(nn.softmax(normed @ p["w"]), "seen")

  weights = {"w": helpers.array(1, (WIDTH, WIDTH), jnp.float32)}
  tree = helpers.adapted(weights, rank=RANK)
  x = helpers.array(2, (5, WIDTH), jnp.float32)
  helpers.check(fn, tree, (x,), 1e-5)
  policy = jax.checkpoint_policies.save_only_these_names("seen")
  saved = []
  for f, parameters in ((fn, jaxlora.merge(tree)), (jaxlora.wrap(fn), tree)):
    print_saved_residuals(jax.checkpoint(lambda p, f=f: jnp.sum(jnp.sin(f(p, x))), policy=policy), parameters)
    saved.append(capsys.readouterr().out.count("named 'seen'"))
  assert saved[0] == saved[1] > 0


@pytest.mark.usefixtures("lenient")
def test_names_in_profiles_are_the_layers_own():
  fn, tree, x = stack(2)
  text = helpers.optimised(helpers.sine_step(fn, True), tree, x).as_text()
  for layer in ("block_0", "block_1"):
    assert re.search(rf'op_name="[^"]*{layer}/(?:[\w()]+/)*rsqrt"', text), layer
