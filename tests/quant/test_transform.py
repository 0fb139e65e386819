"""Functions of quantised trees: the same values under every policy, and no floats of a weight's size that are kept."""

import functools
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles
from tests.quant.test_oracle import adapted, quantised

KEY = jax.random.key(0)
FORMATS = ("nf4", "int8", "int4", "q4_0", "fp8")


@pytest.mark.parametrize(("build", "format"), profiles.alternating(["dense", "attention", "conv_1d", "embed"], FORMATS))
def test_every_format_and_no_adapter(build, format):
  """Values, and the gradient of the data, of trees that are codes alone."""
  case = helpers.BUILDERS[build](jnp.float32)
  tree, plain = quantised(case, format), jaxlora.dequantize(quantised(case, format))
  wrapped = jaxlora.wrap(case.fn, on_materialize="error")
  both = [(wrapped, tree), (case.fn, plain)]

  def values(args):
    return [fn(weights, *args) for fn, weights in both]

  def gradients(args):
    return [jax.grad(lambda x, f=fn, w=weights: jnp.sum(jnp.sin(f(w, x))))(*args) for fn, weights in both]

  floats = build != "embed"
  got = jax.jit(lambda args: (values(args), gradients(args) if floats else None))(case.args)
  for pair in got:
    if pair is not None:
      helpers.assert_close(*pair, 1e-5)


@pytest.mark.parametrize(
  ("build", "policy"),
  profiles.alternating(["dense", "scanned_layers", "embed_tied", "conv_1d"], list(helpers.POLICIES)),
)
def test_every_policy(build, policy, x64):
  case = helpers.BUILDERS[build](jnp.float64)
  policies = [helpers.POLICIES[policy]]
  helpers.check(case.fn, adapted(case), case.args, 1e-12, policies=policies, on_materialize="error")


LAYERS, WIDTH, INNER = 3, 96, 160


def block(p, x):
  return x + jnp.tanh(jax.nn.gelu(x @ p["up"]) @ p["down"])


def unrolled(p, x):
  for k in range(LAYERS):
    x = block({"up": p["up"][k], "down": p["down"][k]}, x)
  return x


def scanned(p, x):
  return lax.scan(lambda x, p: (block(p, x), None), x, p)[0]


def shared(p, x):
  """One layer, again and again: nothing in the loop makes its floats anew but codes that wait."""
  first = {name: leaf[0] for name, leaf in p.items()}
  return lax.scan(lambda x, _: (block(first, x), None), x, None, length=LAYERS)[0]


def remat(p, x):
  return lax.scan(lambda x, p: (jax.checkpoint(block)(p, x), None), x, p)[0]


def model(format, adapt=True, **options):
  up, down = (jax.random.normal(KEY, (LAYERS, *shape)) / 10 for shape in ((WIDTH, INNER), (INNER, WIDTH)))
  params = {"up": up, "down": down}
  if format is not None:
    params = jaxlora.quantize(params, format, targets=".*", axes={".*": "sio"}, block_size=32, **options)
  config = jaxlora.LoraConfig(rank=4, targets=".*", axes={".*": "sio"})
  return helpers.trained(jaxlora.adapt(params, config, KEY)) if adapt else params


def step(fn, **options):
  """A training step's loss and gradients, as a function of the halves."""
  wrapped = jaxlora.wrap(fn, on_materialize="error", **options)
  loss = lambda frozen, x, trainable: jnp.mean(jnp.square(wrapped(jaxlora.join(frozen, trainable), x)))
  return lambda frozen, trainable, x: jax.value_and_grad(functools.partial(loss, frozen, x))(trainable)


SHAPES = {(WIDTH, INNER), (INNER, WIDTH), (LAYERS, WIDTH, INNER), (LAYERS, INNER, WIDTH)}


@pytest.mark.parametrize("fn", profiles.halved([unrolled, scanned, remat]))
def test_residuals_are_codes(fn):
  """No float array of a weight's size crosses from the forward to the backward pass."""
  frozen, trainable = jaxlora.split(model("nf4"))
  x = jnp.ones((8, WIDTH))
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  kept = jax.eval_shape(lambda t: jax.vjp(lambda t: wrapped(jaxlora.join(frozen, t), x), t)[1], trainable)
  floats = [leaf.shape for leaf in jax.tree.leaves(kept) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert floats
  assert not SHAPES & set(floats)


def carried(text):
  """The shapes of floats that the loops of a compiled program carry."""
  loops = re.findall(r"= \((.*?)\) while\(", text)
  return {tuple(map(int, sizes.split(","))) for loop in loops for sizes in re.findall(r"f32\[([\d,]+)\]", loop)}


@pytest.mark.parametrize(("fn", "format"), profiles.alternating([scanned, shared, remat], ["nf4", "int8"]))
def test_no_loop_carries_a_weight_in_floats(fn, format):
  """In the compiled program, which moves out of a loop whatever nothing keeps in it."""
  args = (*jaxlora.split(model(format)), jnp.ones((8, WIDTH)))
  text = helpers.optimised(step(fn), *args).as_text()
  assert "while(" in text
  assert not SHAPES & carried(text)


@pytest.mark.parametrize(("fn", "waits"), [(unrolled, 2), (shared, 4)])
def test_programs_for_tpus_form_a_weight_twice(fn, waits):
  """The floats of the forward pass are not there for the backward pass to share, nor those of one step for the next."""
  args = (*jaxlora.split(model("nf4")), jnp.ones((8, WIDTH)))
  text = jax.jit(step(fn, platform="tpu")).lower(*args).as_text()
  waiting = re.findall(r"optimization_barrier.* : (.*)", text)
  assert sum("xui4>" in types for types in waiting) >= waits  # two weights, in both passes where they are in a loop


def test_the_search_in_loops_finds_floats():
  args = (*jaxlora.split(model(None)), jnp.ones((8, WIDTH)))
  assert SHAPES & carried(helpers.optimised(step(scanned), *args).as_text())


@pytest.mark.parametrize("fn", profiles.halved([scanned, unrolled, remat]))
def test_memory_of_a_step(fn):
  """No more beside arguments than the float base's step and its largest weight; less with them."""
  x = jnp.ones((64, WIDTH))
  memory = [
    helpers.optimised(step(fn), *jaxlora.split(model(format)), x).memory_analysis() for format in (None, "int8")
  ]
  floats, codes = ((m.temp_size_in_bytes, m.argument_size_in_bytes) for m in memory)
  assert codes[0] <= floats[0] + 4 * WIDTH * INNER * 1.1
  assert sum(codes) < sum(floats)


@pytest.mark.parametrize("kind", ["frozen codes", "adapted codes", "adapted floats"])
def test_scalars_that_train_have_their_gradient(kind):
  """A weight times a scalar of the function: the base is frozen, and the scalar's gradient has its part along it."""
  case = helpers.BUILDERS["dense"](jnp.float32)
  tree = {"frozen codes": quantised, "adapted codes": adapted, "adapted floats": lambda case: case.adapted()}[kind](
    case
  )
  fn = lambda p, s, x: jnp.sum(jnp.sin(x @ (p["w"] * s)))
  got = jax.grad(jaxlora.wrap(fn), argnums=1)(tree, jnp.float32(2), *case.args)
  want = jax.grad(fn, argnums=1)(jaxlora.dequantize(jaxlora.merge(tree)), jnp.float32(2), *case.args)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_look_ups_out_of_bounds():
  """NaN or the nearest row, as the function says; any other filling is formed, and reported."""
  params = {"w": jax.random.normal(KEY, (12, 8))}
  ids = jnp.array([[0, 11], [-1, 12], [-13, 40]])
  uses = [
    lambda p, i: jnp.take(p["w"], i, axis=0),
    lambda p, i: p["w"].astype(jnp.bfloat16).at[i].get(mode="fill"),
    lambda p, i: jax.vmap(lambda i: p["w"][i])(i),
    lambda p, i: jnp.take(p["w"], i, axis=1, mode="clip"),
  ]
  filled = lambda p, i: (p["w"] * 2.0).at[i].get(mode="fill", fill_value=3.0)
  for axes in ("io", "oi"):
    tree = jaxlora.quantize(params, "nf4", targets="w", axes={"w": axes}, block_size=4)
    plain = jaxlora.dequantize(tree)
    fns = [*(jaxlora.wrap(fn, on_materialize="error") for fn in uses), jaxlora.wrap(filled, on_materialize="ignore")]
    got = jax.jit(lambda tree, ids, fns=fns: [fn(tree, ids) for fn in fns])(tree, ids)
    wanted = jax.jit(lambda plain, ids: [fn(plain, ids) for fn in [*uses, filled]])(plain, ids)
    for found, want in zip(got, wanted, strict=True):
      np.testing.assert_allclose(np.float32(found), np.float32(want), rtol=1e-5)
  with pytest.warns(jaxlora.MaterializeWarning, match=r"w: the quantised weight.*`gather`.*jaxlora.quantize"):
    jaxlora.wrap(filled)(tree, ids)


def test_what_needs_floats_says_so():
  case = helpers.BUILDERS["dense"](jnp.float32)
  fn = lambda p, x: x @ jnp.tanh(p["w"])
  with pytest.warns(jaxlora.MaterializeWarning, match=r"w: the quantised weight was formed as one array of floats at"):
    got = jaxlora.wrap(fn)(quantised(case), *case.args)
  helpers.assert_close(got, fn(jaxlora.dequantize(quantised(case)), *case.args), 1e-5)
  with pytest.raises(jaxlora.MaterializeError, match=r"`tanh`.*exclude= of jaxlora.quantize"):
    jaxlora.wrap(fn, on_materialize="error")(quantised(case), *case.args)
  report = jaxlora.explain(fn, quantised(case), *case.args)
  assert [(use.path, use.primitive) for use in report.materialized] == [("w", "tanh")]
  assert "codes" in str(jaxlora.explain(case.fn, quantised(case), *case.args))


class Halves:
  """Another library's node: what it stands for is twice what it holds."""

  def __init__(self, half):
    self.half = half

  shape = property(lambda self: self.half.shape)
  dtype = property(lambda self: self.half.dtype)
  ndim = property(lambda self: self.half.ndim)

  def dequantize(self):
    return 2 * self.half


jax.tree_util.register_pytree_node(Halves, lambda node: ((node.half,), None), lambda _, parts: Halves(*parts))


@pytest.mark.parametrize("build", profiles.halved(["scanned_layers", "dense", "reshaped", "embed"]))
def test_any_node_that_dequantizes_is_a_base(build):
  case = helpers.BUILDERS[build](jnp.float32)
  is_weight = lambda node: isinstance(node, jaxlora.LoraWeight)
  halve = lambda node: node.with_parts({"base": Halves(node.base / 2)}) if is_weight(node) else node
  tree = jax.tree.map(halve, case.adapted(), is_leaf=is_weight)
  helpers.check(case.fn, tree, case.args, 1e-5, on_materialize="ignore")
  assert jaxlora.summary(tree).total_parameters == jaxlora.summary(case.adapted()).total_parameters


@pytest.mark.parametrize("variant", profiles.halved(["dora", "vera", "lokr", "adalora", "loha", "lora_fa"]))
def test_variants(variant):
  params = jaxlora.quantize({"w": jax.random.normal(KEY, (16, 12))}, "nf4", targets="w", block_size=4)
  config = jaxlora.LoraConfig(rank=2, targets="w", variant=variant, axes={"w": "io"})
  tree = helpers.trained(jaxlora.adapt(params, config, KEY))
  helpers.check(lambda p, x: jnp.tanh(x @ p["w"]), tree, (jnp.ones((3, 16)),), 1e-5)


@pytest.mark.parametrize("init", profiles.halved(["pissa", "olora", "gaussian"]))
def test_inits(init):
  params = jaxlora.quantize({"w": jax.random.normal(KEY, (16, 12))}, "nf4", targets="w", block_size=4)
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w", init=init, axes={"w": "io"}), KEY)
  want = jaxlora.adapt(jaxlora.dequantize(params), jaxlora.LoraConfig(rank=2, targets="w", init=init), KEY)
  helpers.assert_close(tree["w"].a, want["w"].a, 1e-4)
  assert jaxlora.strip(tree)["w"].codes is params["w"].codes


def test_halves_merging_and_reports():
  tree = {**model("nf4"), "head": jaxlora.quantize({"kernel": jnp.ones((64, 4))}, "int8", targets="kernel")}
  frozen, trainable = jaxlora.split(tree)
  assert trainable["head"]["kernel"] is None
  assert isinstance(frozen["head"]["kernel"], jaxlora.QuantizedArray)
  joined = jaxlora.join(frozen, trainable)
  assert jax.tree.structure(joined) == jax.tree.structure(tree)
  merged = jaxlora.merge(tree, dtype=jnp.bfloat16)
  assert merged["up"].dtype == jnp.bfloat16
  want = jaxlora.merge(jaxlora.dequantize(tree))["up"]
  helpers.assert_close(merged["up"].astype(jnp.float32), want, 1e-2)
  assert isinstance(merged["head"]["kernel"], jaxlora.QuantizedArray)
  report = jaxlora.summary(tree)
  assert report.total_parameters == 2 * LAYERS * WIDTH * INNER + 256
  assert report.base_bytes < 0.6 * report.total_parameters + 200
  whole = jaxlora.adapt(tree["head"], jaxlora.LoraConfig(targets="kernel", rank=1, axes={"kernel": "io"}), KEY)
  assert "64x4" in repr(whole["kernel"])


def test_training_moves_the_factors_alone(lenient):
  """A TrainState loop: the optimizer's updates leave codes as they are."""
  import optax

  tree, tx = model("nf4"), jaxlora.optimizer(optax.adam(1e-2))
  apply, x = jaxlora.wrap(scanned), jax.random.normal(KEY, (4, WIDTH))
  state = tx.init(tree)

  @jax.jit
  def train(tree, state):
    value, grads = jaxlora.value_and_grad(lambda tree: jnp.mean(jnp.square(apply(tree, x))))(tree)
    updates, state = tx.update(grads, state, tree)
    return optax.apply_updates(tree, updates), state, value

  losses = []
  new = tree
  for _ in range(5):
    new, state, value = train(new, state)
    losses.append(float(value))
  assert losses[-1] < losses[0]
  jax.tree.map(np.testing.assert_array_equal, jaxlora.strip(new), jaxlora.strip(tree))
