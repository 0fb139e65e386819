"""Starts from data: what the walk sees of inputs, EVA and LoRA-GA against their definitions, and what they hold."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora.init._lora_ga import loss_of_factors
from jaxlora.init._sketch import Seen, sketcher
from tests.helpers import BUILDERS, WRAPPERS, adapted, normal, products

KEY = jax.random.key(0)

# ----------------------------------------------------------------------------------------------------------------------
# Sketches of inputs: A (x^T x), in the layout of A.


def sketches(fn, case, rank=3):
  """Random factors, and their sketches."""
  tree = case.adapted()
  weights = {path: tree_leaf(tree, path) for path in case.roles}
  factors = {
    path: jax.device_put(normal(k, tuple(rank if n == "r" else n for n in a_shape(w)), w.a.dtype))
    for k, (path, w) in enumerate(weights.items())
  }
  seen = Seen()
  found = sketcher(lambda p, batch: fn(p, *batch), seen)(factors, tree, case.args)
  return factors, found, seen


def tree_leaf(tree, path):
  for name in path.split("/"):
    tree = tree[name]
  return tree


def a_shape(w):
  stack = w.roles.count("s")
  return (*w.a.shape[:stack], "r", *w.a.shape[stack + 1 :])


def gram(x):
  x = np.asarray(x).reshape(-1, np.shape(x)[-1])
  return x.T @ x


def test_sketch_of_a_matrix(x64):
  for build in ("dense", "left"):
    case = BUILDERS[build](jnp.float64)
    a, found, _ = sketches(case.fn, case)
    np.testing.assert_allclose(found["w"], a["w"] @ gram(case.args[0]), rtol=1e-10)


def test_sketch_sums_every_use(x64):
  case = BUILDERS["used_twice"](jnp.float64)
  a, found, _ = sketches(case.fn, case)
  (x,), w = case.args, case.params["w"]
  np.testing.assert_allclose(found["w"], a["w"] @ (gram(x) + gram(jnp.tanh(x @ w))), rtol=1e-10)


def test_sketch_of_each_slice(x64, lenient):
  """Stacked weights: of scanned layers each slice has the input of its own step."""
  case = BUILDERS["scanned_layers"](jnp.float64)
  a, found, _ = sketches(case.fn, case)
  (x,), layers = case.args, case.params["layers"]
  for k in range(3):
    second, first = ({name: leaf[k] for name, leaf in layers[f"Dense_{n}"].items()} for n in range(2))
    h = x @ first["kernel"] + first["bias"]
    for name, inputs in (("Dense_1", x), ("Dense_0", h)):
      path = f"layers/{name}/kernel"
      np.testing.assert_allclose(found[path][k], a[path][k] @ gram(inputs), rtol=1e-9)
    x = jnp.tanh(h @ second["kernel"] + second["bias"])
  case = BUILDERS["experts_dispatched"](jnp.float64)
  a, found, _ = sketches(case.fn, case)
  for k in range(3):
    np.testing.assert_allclose(found["w"][k], a["w"][k] @ gram(case.args[0][k]), rtol=1e-10)


def test_sketch_of_a_convolution(x64):
  """The inputs of a kernel are the patches."""
  case = BUILDERS["conv_2d_strided"](jnp.float64)
  a, found, _ = sketches(case.fn, case)
  patches = jax.lax.conv_general_dilated_patches(
    case.args[0], (3, 2), (2, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )  # channels lead the window
  order = jnp.moveaxis(a["w"], 3, 1).reshape(3, -1)
  want = jnp.moveaxis((order @ gram(patches)).reshape(3, 4, 3, 2), 1, 3)
  np.testing.assert_allclose(found["w"], want, rtol=1e-10)


COUNTS = {"jit": 1, "scan": 4, "scan_carry": 3, "remat": 1, "cond": 1, "switch": 1, "vmap": 2}


@pytest.mark.parametrize("wrapper", COUNTS)
@pytest.mark.parametrize("build", ["dense", "scanned_layers"])
def test_sketches_in_control_flow(x64, build, wrapper):
  """`scan` runs the function twice over two copies of the data, and so on: as often it is seen."""
  case = BUILDERS[build](jnp.float64)
  _, alone, _ = sketches(case.fn, case)
  _, found, seen = sketches(WRAPPERS[wrapper](case.fn), case)
  chex.assert_trees_all_close(found, {path: COUNTS[wrapper] * x for path, x in alone.items()}, rtol=1e-9)
  assert seen.inputs == set(case.roles)


@pytest.mark.parametrize(
  ("build", "wrapper", "reason", "place"),
  [
    ("dense", "while", "a loop of unknown length", "wrappers.py"),
    ("dense", "shard_map", "a shard_map shows nothing", "wrappers.py"),
    ("embed", "alone", "a lookup", "builders.py"),
  ],
)
def test_what_cannot_be_seen_is_said(build, wrapper, reason, place):
  case = BUILDERS[build](jnp.float32)
  _, found, seen = sketches(WRAPPERS[wrapper](case.fn), case)
  assert not any(x.any() for x in found.values())
  assert not seen.inputs
  assert reason in seen.reasons["w"]
  assert place in seen.reasons["w"]


def test_leaves_without_an_input_may_keep_their_start():
  case = BUILDERS["embed"](jnp.float32)
  fn = lambda p, batch: case.fn(p, *batch)
  tree = jaxlora.adapt(case.params, case.config, KEY)
  with pytest.raises(ValueError, match=r"no product shows the input for w \(a lookup.*builders.py"):
    jaxlora.init_from_data(tree, fn, [case.args], KEY)
  kept = jaxlora.init_from_data(tree, fn, [case.args], KEY, on_missing="keep")
  chex.assert_trees_all_equal(kept, tree)


def layered(depth, scanned):
  """A stack of layers, as shapes alone."""
  width, hidden, tokens, rank = 32, 128, 512, 4
  shape = lambda *sizes: jax.ShapeDtypeStruct(sizes, jnp.float32)
  stack, roles = ((depth,), "sio") if scanned else ((), "io")

  def weight(fan_in, fan_out):
    factors = shape(*stack, rank, fan_in), shape(*stack, rank, fan_out)
    return jaxlora.LoraWeight(shape(*stack, fan_in, fan_out), *factors, roles=roles, rank=rank)

  def block(x, p):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]

  def fn(params, x):
    if scanned:
      return jax.lax.scan(lambda x, p: (block(x, p), None), x, params)[0]
    for p in params:
      x = block(x, p)
    return x

  layer = {"up": weight(width, hidden), "down": weight(hidden, width)}
  tree = layer if scanned else [layer] * depth
  nodes = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda x: isinstance(x, jaxlora.LoraWeight))[0]
  factors = {"/".join(str(getattr(k, "key", getattr(k, "idx", None))) for k in path): w.a for path, w in nodes}
  return fn, tree, factors, shape(tokens, width), 4 * tokens * (width + hidden)


@pytest.mark.parametrize("scanned", [False, True])
def test_sketches_hold_no_inputs(scanned):
  """Compiled: four more layers take their factors' worth more memory, a few times over, and not their inputs'."""
  temp, size = {}, {}
  for depth in (2, 6):
    fn, tree, factors, x, inputs = layered(depth, scanned)
    compiled = jax.jit(sketcher(fn, Seen())).lower(factors, tree, x).compile()
    temp[depth] = compiled.memory_analysis().temp_size_in_bytes
    size[depth] = sum(4 * a.size for a in factors.values())
  more, of_inputs, one_activation = temp[6] - temp[2], 4 * inputs, 4 * x.size
  assert more <= 6 * (size[6] - size[2]) + one_activation  # XLA's scheduling may hold one more
  assert more < 0.1 * of_inputs


# ----------------------------------------------------------------------------------------------------------------------
# EVA.


def two_layers(dtype=np.float64):
  params = {name: jax.device_put(normal(k, (20, 20), dtype)) for k, name in enumerate(("up", "down"))}
  return params, lambda p, x: jnp.tanh(x @ p["up"]) @ p["down"]


def batches(count=3, dtype=np.float64, decay=0.7):
  turn = np.linalg.qr(normal(2, (20, 20), np.float64))[0]
  return [
    jax.device_put(((normal(10 + k, (40, 20), np.float64) * decay ** np.arange(20)) @ turn).astype(dtype))
    for k in range(count)
  ]


def fresh(params, rank=3, **fields):
  return adapted(params, seed=None, rank=rank, alpha=6.0, targets=".*", **fields)


def inputs_of(params, data):
  return {"up": np.concatenate(data), "down": np.concatenate([np.tanh(x @ params["up"]) for x in data])}


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora"])
def test_eva_is_the_svd_of_the_inputs(x64, variant):
  params, fn = two_layers()
  data = batches()
  tree = jaxlora.init_from_data(fresh(params, variant=variant), fn, iter(data), KEY, iterations=4)
  for name, x in inputs_of(params, data).items():
    vt = np.linalg.svd(x)[2][:3]
    np.testing.assert_allclose(np.abs(np.diag(tree[name].a @ vt.T)), 1, atol=1e-6)
    np.testing.assert_allclose(tree[name].a @ tree[name].a.T, np.eye(3), atol=1e-12)
    assert not tree[name].b.any()
    assert (tree[name].rank, tree[name].alpha) == (3, 6.0)
  chex.assert_trees_all_close(jaxlora.merge(tree), params, rtol=1e-12)


def test_eva_is_exact_where_the_sketch_holds_everything(x64):
  params, fn = two_layers()
  data = batches(decay=0.95)
  tree = jaxlora.init_from_data(fresh(params), fn, data, KEY, oversample=20, iterations=0)
  for name, x in inputs_of(params, data).items():
    np.testing.assert_allclose(np.abs(np.diag(tree[name].a @ np.linalg.svd(x)[2][:3].T)), 1, atol=1e-10)


def test_eva_deals_out_ranks(x64):
  """More variance in few directions: the other leaf gets the rank. Sums and scales stay."""
  params, fn = two_layers()
  data = [x.at[:, 1:].multiply(1e-3) for x in batches(decay=1.0)]
  tree = jaxlora.init_from_data(fresh(params), fn, data, KEY, rho=2.0)
  ranks = {name: w.rank for name, w in tree.items()}
  spectra = {name: np.linalg.svd(x, compute_uv=False)[:6] for name, x in inputs_of(params, data).items()}
  assert {name: {"rank": rank} for name, rank in ranks.items()} == jaxlora.allocate(spectra, 6)
  assert ranks["up"] != 3
  assert [w.scale for w in tree.values()] == [2, 2]
  for name, rank in ranks.items():
    np.testing.assert_allclose(tree[name].a @ tree[name].a.T, np.eye(rank), atol=1e-10)
  rslora = jaxlora.init_from_data(fresh(params, scaling="rslora"), fn, data, KEY, rho=2.0)
  np.testing.assert_allclose([w.scale for w in rslora.values()], 6 / 3**0.5)


def test_eva_with_fewer_inputs_than_the_rank(x64):
  """Directions that no input has are any others: A has full rank all the same."""
  params, fn = two_layers()
  tree = jaxlora.init_from_data(fresh(params, rank=4), fn, [batches()[0][:2]], KEY)
  for w in tree.values():
    np.testing.assert_allclose(w.a @ w.a.T, np.eye(4), atol=1e-10)
  x = batches(1)[0][:2]
  np.testing.assert_allclose(np.linalg.norm(x @ tree["up"].a.T), np.linalg.norm(x), rtol=1e-10)


def test_eva_in_half_precision():
  params = {"up": two_layers(jnp.bfloat16)[0]["up"]}
  tree = jaxlora.init_from_data(fresh(params), lambda p, x: x @ p["up"], batches(1, jnp.bfloat16), KEY, iterations=1)
  a = tree["up"].a
  assert a.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.asarray(a @ a.T, np.float32), np.eye(3), atol=0.02)


def test_a_start_that_is_taken_off_goes(x64):
  params, fn = two_layers()
  tree = jaxlora.init_from_data(fresh(params, init="pissa"), fn, batches(), KEY)
  assert all(w.extra == {} for w in tree.values())
  chex.assert_trees_all_equal(jaxlora.merge(tree), params)


# ----------------------------------------------------------------------------------------------------------------------
# LoRA-GA.


def loss_of(fn):
  return lambda p, x: jnp.mean((fn(p, x) - 1) ** 2)


def test_lora_ga_is_the_svd_of_the_gradient(x64):
  """A along the first left singular vectors, B along the second r right ones, both of size out^(1/4) / sqrt(gamma)."""
  params, fn = two_layers()
  data, loss = batches(2), loss_of(fn)
  tree = jaxlora.init_from_data(fresh(params), loss, data, KEY, method="lora_ga", gamma=4.0, iterations=5)
  gradient = jax.grad(lambda p: sum(loss(p, x) for x in data))(params)
  for name, w in tree.items():
    u, _, vt = np.linalg.svd(np.asarray(gradient[name]))
    size = w.base.shape[1] ** 0.25 / 2
    np.testing.assert_allclose(np.abs(np.diag(w.a @ u[:, :3])), size, rtol=1e-5)
    np.testing.assert_allclose(np.abs(np.diag(w.b @ vt[3:6].T)), size, rtol=1e-3)
    np.testing.assert_allclose(w.a @ w.a.T, size**2 * np.eye(3), atol=1e-10)
  chex.assert_trees_all_close(jaxlora.merge(tree), params, rtol=1e-12)
  np.testing.assert_allclose(jaxlora.wrap(fn)(tree, data[0]), fn(params, data[0]), rtol=1e-10)


def test_lora_ga_forms_no_gradient():
  """Its gradients have no product of a weight's shape anywhere inside."""
  params, fn = two_layers(np.float32)
  tree = fresh(params)
  loss = loss_of_factors(loss_of(fn), jax.tree.structure(params), sorted(tree))
  nodes = [tree[name] for name in sorted(tree)]
  factors = {name: {"a": jnp.ones((8, w.shape[0])), "b": jnp.zeros((8, w.shape[1]))} for name, w in params.items()}
  found = products(jax.grad(loss), factors, nodes, batches(1, np.float32)[0])
  shapes = {var.aval.shape for eqn in found for var in eqn.outvars}
  assert (8, 20) in shapes
  assert (20, 20) not in shapes


def test_lora_ga_of_scanned_layers(x64):
  case = BUILDERS["scanned_layers"](jnp.float64)
  loss = lambda p, batch: jnp.mean(case.fn(p, *batch) ** 2)
  tree = jaxlora.adapt(case.params, case.config, KEY, probe=lambda p: case.fn(p, *case.args))
  new = jaxlora.init_from_data(tree, loss, [case.args], KEY, method="lora_ga", oversample=9)
  gradient = jax.grad(loss)(case.params, case.args)["layers"]["Dense_0"]["kernel"]
  w = new["layers"]["Dense_0"]["kernel"]
  for k in range(3):
    u = np.linalg.svd(np.asarray(gradient[k]))[0][:, :2]
    size = 5**0.25 / 4
    np.testing.assert_allclose(np.abs(np.diag(w.a[k] @ u)), size, rtol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Refusals.


@pytest.mark.parametrize(
  ("options", "match"),
  [
    ({"method": "corda"}, "'corda', expected one of 'eva', 'lora_ga'"),
    ({"on_missing": "skip"}, "on_missing is 'skip'"),
    ({"rho": 0.5}, "expected rho >= 1"),
    ({"batches": []}, "batches is empty"),
    ({"method": "lora_ga", "batches": []}, "batches is empty"),
    ({"method": "lora_ga", "batches": iter(())}, "can be gone through once; 'lora_ga' does so 6 times"),
    ({"batches": [jnp.full((40, 20), jnp.nan)]}, "NaN or infinite values in the inputs of"),
    ({"fn": lambda p, x: jnp.sum(x @ p["up"])}, r"no product shows the input for down \(never multiplied by\)"),
    ({"fn": lambda p, x: jnp.sum(x @ p["up"]), "method": "lora_ga"}, r"gradient is of no use for down \(zero\)"),
    ({"fn": lambda p, x: jnp.sum(jnp.sin(p["up"])) + jnp.sum(x @ p["up"][:, :20] @ p["down"])}, None),
    ({"tree": {"rank": 11}, "method": "lora_ga"}, "down: 'lora_ga' takes twice the rank, 22, .* at most 10"),
    ({"tree": {"variant": "vera"}}, "down is of variant 'vera'"),
  ],
)
def test_what_does_not_fit(options, match):
  params, fn = two_layers(np.float32)
  options = {"fn": fn, "batches": batches(1, np.float32)} | options
  tree = fresh(params, **options.pop("tree", {}))
  call = lambda: jaxlora.init_from_data(tree, options.pop("fn"), options.pop("batches"), KEY, **options)
  if match is None:
    call()  # one use that shows the input is enough
    return
  with pytest.raises(ValueError, match=match):
    call()


def test_a_trained_tree_is_not_started_anew():
  params, fn = two_layers(np.float32)
  tree = fresh(params)
  tree["up"] = dataclasses.replace(tree["up"], b=tree["up"].b + 1)
  with pytest.raises(ValueError, match="up has an update already"):
    jaxlora.init_from_data(tree, fn, batches(1, np.float32), KEY)
  with pytest.raises(TypeError, match="expected a function"):
    jaxlora.init_from_data(fresh(params), None, batches(1, np.float32), KEY)
