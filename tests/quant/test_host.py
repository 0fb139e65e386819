"""Codes that rest in the host's memory: fetched where a product needs them, one layer at a time."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from tests import helpers

KEY, Space = jax.random.key(0), jax.memory.Space
LAYERS, WIDTH = 3, 64
PARAMS = {"w": helpers.array(0, (LAYERS, WIDTH, WIDTH), np.float32, 0.2)}
CODES = jaxlora.quantize(PARAMS, "nf4", targets="w", axes={"w": "sio"})
X = helpers.array(1, (4, WIDTH), np.float32)


def host():
  return jax.sharding.SingleDeviceSharding(jax.devices()[0], memory_kind="pinned_host")


def adapted(base, **fields):
  return jaxlora.adapt(base, jaxlora.LoraConfig(**{"rank": 2, "targets": "w", "axes": {"w": "sio"}} | fields), KEY)


def resting(tree):
  """The tree with its frozen half on the host."""
  frozen, trainable = jaxlora.split(tree)
  return jaxlora.join(jax.device_put(frozen, host()), trainable)


def layer(x, w):
  return x + jnp.tanh(x @ w)


def scanned(p, x):
  return lax.scan(lambda x, w: (layer(x, w), None), x, p["w"])[0]


def fetched(p, x):
  """MaxText's way: each layer is asked for when it is due."""
  return lax.scan(lambda x, w: (layer(x, jax.device_put(w, Space.Device)), None), x, p["w"])[0]


def again(p, x):
  """The same, rematerialised."""
  once_more = jax.checkpoint(lambda x, w: layer(x, jax.device_put(w, Space.Device)))
  return lax.scan(lambda x, w: (once_more(x, w), None), x, p["w"])[0]


def unrolled(p, x):
  for k in range(LAYERS):
    x = layer(x, p["w"][k])
  return x


def counted(p, x):
  """A loop that looks its layer up."""
  return lax.fori_loop(0, LAYERS, lambda k, x: layer(x, p["w"][k]), x)


WAYS = [scanned, fetched, again, unrolled, counted]


def step(fn):
  """The gradients of the factors, and the value."""
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  return lambda tree, x: jaxlora.value_and_grad(lambda t: jnp.sum(jnp.sin(wrapped(t, x))))(tree)


@pytest.mark.parametrize("fn", WAYS)
def test_values_and_gradients(fn):
  tree = helpers.trained(adapted(CODES))
  got, want = (jax.jit(step(fn))(t, X) for t in (resting(tree), tree))
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)
  merged = jaxlora.merge(tree)
  assert float(got[0]) == pytest.approx(float(jnp.sum(jnp.sin(scanned(merged, X)))), rel=1e-4)


def on_the_device(fn, *args):
  """The shapes and dtypes of all arrays in a program's jaxpr that lie on the device."""
  traced = jax.make_jaxpr(fn)(*args)
  types = [var.aval for eqn in helpers.equations(traced) for var in eqn.outvars]
  return {(tuple(t.shape), t.dtype) for t in types if getattr(t, "memory_space", Space.Device) == Space.Device}


@pytest.mark.parametrize("fn", WAYS)
def test_no_stack_is_on_the_device(fn):
  """Neither codes nor floats of all layers are, forwards or backwards; those of one layer are."""
  tree = resting(helpers.trained(adapted(CODES)))
  stacks = {(LAYERS, WIDTH, WIDTH), (LAYERS, 1, WIDTH, WIDTH)}
  found = on_the_device(step(fn), tree, X)
  assert not {shape for shape, _ in found if shape in stacks}
  codes = CODES["w"].codes.dtype
  assert {shape for shape, dtype in found if dtype == codes} & {(WIDTH, WIDTH), (1, WIDTH, WIDTH)}
  ahead = lambda tree, x: step(fn)(jax.device_put(tree, Space.Device), x)
  assert {shape for shape, _ in on_the_device(ahead, tree, X)} & stacks  # which is seen where it is so


def test_floats_are_fetched_layer_by_layer_where_the_function_asks():
  """MaxText's way with a base of floats: rematerialised, no stack of them is on the device."""
  tree = resting(helpers.trained(adapted(PARAMS)))
  found = on_the_device(step(again), tree, X)
  assert (LAYERS, WIDTH, WIDTH) not in {shape for shape, _ in found}
  assert (WIDTH, WIDTH) in {shape for shape, _ in found}


def test_backward_passes_wait_for_their_cotangent():
  """What is fetched for the forward pass of an unrolled layer is not kept: it waits to be fetched again."""
  tree = resting(helpers.trained(adapted(CODES)))
  waiting = [eqn for eqn in helpers.traced(step(unrolled), tree, X) if eqn.primitive.name == "optimization_barrier"]
  on_host = [eqn for eqn in waiting if any(v.aval.memory_space == Space.Host and v.aval.ndim == 2 for v in eqn.invars)]
  assert len(on_host) >= LAYERS - 1  # nothing asks for the gradient of the first layer's input


def kinds(node):
  return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(node)}


WIDE = {"w": helpers.array(0, (LAYERS, 128, 128), np.float32, 0.2), "b": helpers.array(1, (LAYERS, 128), np.float32)}


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_codes_alone_are_put_to_rest(format):
  """Wide ones, too, which programs for a TPU fetch along their rows: a step's values and gradients are the same."""
  codes = jaxlora.quantize(WIDE, format, targets="w", axes={"w": "sio"})
  tree = helpers.trained(adapted(codes))
  rests = jaxlora.quant.rest_on_host(tree)
  assert (kinds(rests["w"].base), kinds((rests["w"].a, rests["w"].b, rests["b"]))) == ({"pinned_host"}, {"device"})
  assert jax.tree.structure(rests) == jax.tree.structure(tree)
  biased = lambda p, x: lax.scan(lambda x, w: (layer(x, w[0]) + w[1][None], None), x, (p["w"], p["b"]))[0]
  x = helpers.array(2, (4, 128), np.float32)
  got, want = (jax.jit(step(biased))(t, x) for t in (rests, tree))
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)


@pytest.mark.parametrize("library", ["ours", "another"])
def test_codes_in_numpy_are_put_to_rest(library):
  """As a file gives them: they are no arrays of a device yet."""
  eighths = helpers.Eighths(np.arange(LAYERS * 128 * 128, dtype=np.int8).reshape(LAYERS, 128, 128) % 8)
  quantised = jaxlora.quantize(WIDE, "int8", targets="w", axes={"w": "sio"})
  codes = {"w": jax.tree.map(np.asarray, quantised["w"]) if library == "ours" else eighths}
  rests = jaxlora.quant.rest_on_host(codes)
  assert kinds(rests) == {"pinned_host"}
  got = jax.jit(step(scanned))(helpers.trained(adapted(rests)), helpers.array(2, (4, 128), np.float32))
  want = step(scanned)(helpers.trained(adapted(jaxlora.dequantize(codes))), helpers.array(2, (4, 128), np.float32))
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-4)


def test_shapes_are_put_to_rest_as_arrays_are():
  codes = jaxlora.quantize(jax.eval_shape(lambda: WIDE), "nf4", targets="w", axes={"w": "sio"})
  rests = jaxlora.quant.rest_on_host(codes)
  assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(rests["w"])} == {"pinned_host"}
  assert rests["b"] is codes["b"]


def test_where_trees_lie():
  tree = helpers.trained(adapted(jax.device_put(CODES, host())))
  assert (kinds(tree["w"].base), kinds((tree["w"].a, tree["w"].b))) == ({"pinned_host"}, {"device"})
  assert kinds(jaxlora.quantize(jax.device_put(PARAMS, host()), "nf4", targets="w", axes={"w": "sio"})) == {
    "pinned_host"
  }
  assert kinds(jaxlora.dequantize(tree)["w"].base) == {"pinned_host"}
  assert kinds(jaxlora.merge(tree)) == {"pinned_host"}
  merged, _ = jaxlora.quant.merge_and_requantize(tree)
  assert kinds(merged) == {"pinned_host"}
  both = jax.device_put({**CODES, "v": CODES["w"]}, host())
  whole = jaxlora.adapt(both, jaxlora.LoraConfig(targets="w", axes={"w": "sio"}, train="v"), KEY)
  assert kinds(whole["v"].value) == {"device"}
  np.testing.assert_array_equal(merged["w"].codes, jaxlora.quant.merge_and_requantize(resting(tree))[0]["w"].codes)


def test_starts_and_checkpoints(tmp_path):
  base, floats = jax.device_put((CODES, PARAMS), host())
  config = jaxlora.LoraConfig(rank=2, targets="w", axes={"w": "sio"}, init="loftq_niter_2", variant="dora")
  tree = jaxlora.adapt(base, config, KEY, floats=floats)
  want = jaxlora.adapt(CODES, config, KEY, floats=PARAMS)
  helpers.assert_close(tree["w"].a, want["w"].a, 1e-5)
  assert (kinds(tree["w"].base), kinds(tree["w"].extra)) == ({"pinned_host"}, {"device"})
  assert checkpoint.fingerprint(base) == checkpoint.fingerprint(CODES)
  checkpoint.save(tmp_path / "adapter", tree)
  loaded = checkpoint.load(tmp_path / "adapter", jaxlora.strip(tree))
  assert (kinds(loaded["w"].base), kinds(loaded["w"].a)) == ({"pinned_host"}, {"device"})
  np.testing.assert_array_equal(loaded["w"].b, tree["w"].b)
  started = jaxlora.init_from_data(adapted(base), scanned, [X], KEY)
  helpers.assert_close(started["w"].a, jaxlora.init_from_data(adapted(CODES), scanned, [X], KEY)["w"].a, 1e-4)


def test_lookups():
  table = jaxlora.quantize({"embed": {"embedding": jax.random.normal(KEY, (11, 64))}}, "nf4", targets=["embed"])
  fn = lambda p, ids: p["embed"]["embedding"][ids]
  got = jax.jit(jaxlora.wrap(fn))(jax.device_put(table, host()), jnp.arange(3))
  np.testing.assert_array_equal(got, jaxlora.dequantize(table)["embed"]["embedding"][:3])
