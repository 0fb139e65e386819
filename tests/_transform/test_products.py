"""Adapted products of one input, in every policy's form: values, derivatives, and what `vmap` makes of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import POLICIES, profiles

ONE_DEVICE = [name for name, policy in POLICIES.items() if policy.devices == 1]
WIDTH = 12


def params_of(*shapes, seed=0):
  width = np.float64 if jax.config.jax_enable_x64 else np.float32
  return {f"w{k}": helpers.array(10 * seed + k, shape, width) for k, shape in enumerate(shapes)}


def norm(x):
  centred = x - jnp.mean(x, -1, keepdims=True)
  return centred * jax.lax.rsqrt(jnp.mean(centred**2, -1, keepdims=True) + 1e-6)


NORMS = {
  "norm": norm,
  "root_mean_square": lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6),
  "norm_with_a_gain": lambda x: norm(x) * jnp.linspace(1, 2, WIDTH)[None, None] + jnp.linspace(0, 1, WIDTH)[None, None],
  "division_by_a_norm": lambda x: x / jnp.sqrt(jnp.sum(x * x, -1, keepdims=True)),
  "activation": jnp.tanh,
  "jitted_norm": jax.jit(norm),
}


def readers(p, x, make=norm):
  """A norm that four weights of other shapes read: one has heads, one is on the left, ranks differ."""
  y = make(x @ p["w4"])  # the derivative along the norm's input is wanted, too
  heads = jnp.einsum("btd,dhk->bthk", y, p["w1"])
  left = jnp.einsum("nd,btd->nbt", p["w2"], y)
  return jnp.sum(jnp.sin(y @ p["w0"])) + jnp.sum(jnp.cos(heads)) + jnp.sum(left**2) + jnp.sum(jnp.tanh(y @ p["w3"]))


def adapted_readers(x, make=norm):
  params = params_of((WIDTH, 7), (WIDTH, 3, 2), (5, WIDTH), (WIDTH, 7), (WIDTH, WIDTH))
  overrides = {"w0": {"rank": 3}, "w1": {"rank": 1}}
  fn = lambda p, x: readers(p, x, make)
  probe = lambda p: fn(p, x)
  return helpers.adapted(params, rank=2, targets=".*", overrides=overrides, probe=probe), fn


# The form for TPUs, which makes norms wider, meets all of them, and the first meets all forms; the others take turns.
OTHERS = [name for name in ONE_DEVICE if name != "tpu"]
IN_TURN = {make: ["tpu", *profiles.in_turn(k, OTHERS, 1 if k else len(OTHERS))] for k, make in enumerate(NORMS)}


@pytest.mark.parametrize(("make", "policies"), IN_TURN.items(), ids=IN_TURN)
def test_norms_that_several_weights_read(make, policies, x64):
  x = helpers.array(3, (2, 4, WIDTH), np.float64)
  tree, fn = adapted_readers(x, NORMS[make])
  helpers.check(fn, tree, (x,), 1e-11, policies=[POLICIES[name] for name in policies])


def alike(p, x):
  """A norm whose readers can be one product of all their weights, as queries, keys and values can."""
  y = norm(x @ p["w3"])
  heads = jnp.einsum("btd,dhk->bthk", y, p["w1"])
  return jnp.sum(jnp.sin(y @ p["w0"])) + jnp.sum(jnp.cos(heads)) + jnp.sum(jnp.tanh(y @ p["w2"]))


def adapted_alike(x, **options):
  params = params_of((WIDTH, 7), (WIDTH, 3, 2), (WIDTH, 5), (WIDTH, WIDTH))
  overrides = {"w0": {"rank": 3}, "w1": {"rank": 1}}
  return helpers.adapted(params, rank=2, targets=".*", overrides=overrides, probe=lambda p: alike(p, x), **options)


MANY_TOKENS = (4, WIDTH, WIDTH)  # so many that GPUs take the weights side by side


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora"])
def test_weights_that_can_lie_side_by_side(variant, x64):
  x = helpers.array(3, MANY_TOKENS, np.float64)
  every = [POLICIES[name] for name in ONE_DEVICE]
  helpers.check(alike, adapted_alike(x, variant=variant), (x,), 1e-10, policies=every)


def layers(p, x):
  """Stacked layers, in a loop; two weights of the second have one input."""

  def layer(x, w):
    y = norm(x)
    x = x + jnp.einsum("bthk,hkd->btd", jnp.einsum("btd,dhk->bthk", y, w["w0"]), w["w1"]) * jnp.tanh(y @ w["w2"])
    return x, None

  return jnp.sum(jnp.sin(jax.lax.scan(layer, x, p)[0]))


@pytest.mark.parametrize("shape", [(2, 4, WIDTH), MANY_TOKENS], ids=["weights as large as results", "smaller weights"])
@pytest.mark.parametrize("policy", ["tpu"])
def test_stacked_weights_in_a_loop(policy, shape, x64):
  x = helpers.array(3, shape, np.float64)
  params = params_of((2, WIDTH, 3, 2), (2, 3, 2, WIDTH), (2, WIDTH, WIDTH))
  tree = helpers.adapted(params, rank=2, targets=".*", probe=lambda p: layers(p, x))
  helpers.check(layers, tree, (x,), 1e-10, policies=[POLICIES[policy]])


def test_the_form_for_gpus_has_one_product_of_all_weights():
  """`x [W_1, W_2, ..]` and `[h_1, h_2, ..] diag(B_1, B_2, ..)`, forwards and back; not where devices may share a W."""
  x = jnp.ones(MANY_TOKENS)
  tree = adapted_alike(x)
  wrapped = jaxlora.wrap(alike, on_materialize="error")
  step = jax.grad(wrapped, argnums=(0, 1))
  together = (f"tensor<{WIDTH}x18xf32>", "tensor<6x18xf32>", "tensor<4x12x18xf32>")
  lower = lambda traced, platform: traced.lower(lowering_platforms=(platform,)).as_text()
  traced = jax.jit(step).trace(tree, x)
  text = {platform: lower(traced, platform) for platform in ("cuda", "rocm", "cpu", "tpu")}
  assert all(shape in text[platform] for shape in together for platform in ("cuda", "rocm"))
  assert not any(shape in text["cpu"] for shape in together)
  assert not any(shape in text["tpu"] for shape in together[:2])
  # There `[x, h_1, h_2, ..]` is one array for all weights, `W` above `B` and zeros.
  assert all(f"tensor<18x{width}xf32>" in text["tpu"] for width in (7, 6, 5))
  assert text["cuda"].count("18xf32>) -> tensor<4x12x12xf32>") == 1  # dx
  mesh = helpers.mesh_of(data=2)
  spread = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data")))
  on_two = lower(jax.jit(step).trace(helpers.place(mesh, tree), spread), "cuda")
  assert not any(shape in on_two for shape in together)


@pytest.mark.parametrize("policies", [ONE_DEVICE], ids=["every policy"])
@pytest.mark.parametrize("case", ["few tokens", "many tokens"])
def test_second_derivatives(case, policies, x64):
  """Along the input and the factors, mixed ones among them."""
  x = helpers.array(3, MANY_TOKENS if case == "many tokens" else (2, 4, WIDTH), np.float64)
  tree, fn = (adapted_alike(x), alike) if case == "many tokens" else adapted_readers(x)
  frozen, trainable = jaxlora.split(tree)
  leaves, treedef = jax.tree.flatten((trainable, x))
  steps = [helpers.normal(k, leaf.shape, np.float64) for k, leaf in enumerate(leaves)]
  wraps = [jaxlora.wrap(fn, on_materialize="error", **POLICIES[name].options) for name in policies]

  def curvature(of, leaves):
    def at(leaves):
      half, x = jax.tree.unflatten(treedef, leaves)
      return of(jaxlora.join(frozen, half), x)

    return jax.jvp(jax.grad(at), (leaves,), (steps,))[1]

  every = [*wraps, helpers.oracle(fn)]
  *found, wanted = jax.jit(lambda leaves: [curvature(of, leaves) for of in every])(leaves)
  for got in found:
    helpers.assert_close(got, wanted, 1e-10)


@pytest.mark.parametrize("policy", ONE_DEVICE)
def test_many_adapters_of_one_base_share_it_under_vmap(policy):
  """No form lays a copy of the base beside each adapter."""
  x = jnp.ones((4, WIDTH))
  tree = helpers.adapted(params_of((WIDTH, 64)), rank=2, targets=".*")
  frozen, trainable = jaxlora.split(tree)
  each = [jax.tree.map(lambda leaf, k=k: np.asarray(leaf) * np.float32(k), trainable) for k in (1, 2, 3)]
  many = jax.tree.map(lambda *leaves: np.stack(leaves), *each)
  wrapped = jaxlora.wrap(lambda p, x: x @ p["w0"], on_materialize="error", **POLICIES[policy].options)
  loss = lambda half: jnp.sum(jnp.sin(wrapped(jaxlora.join(frozen, half), x)))
  one = jax.jit(jax.value_and_grad(loss))
  step = jax.jit(jax.vmap(jax.value_and_grad(loss)))
  assert f"tensor<3x{WIDTH + 2}x64" not in step.lower(many).as_text()
  alone = jax.tree.map(lambda *leaves: np.stack(leaves), *map(one, each))
  helpers.assert_close(step(many), alone, 1e-5)


def test_the_form_for_tpus_has_one_product_each_way():
  """`[x, h] [W; B]` and `[dy, g] [W^T; A]`, lowered for a TPU and for nothing else."""
  x = jnp.ones((2, 4, WIDTH))
  tree = helpers.adapted(params_of((WIDTH, 64)), rank=2, targets=".*")
  wrapped = jaxlora.wrap(lambda p, x: x @ p["w0"], on_materialize="error")
  traced = jax.jit(jax.grad(lambda t, x: jnp.sum(jnp.sin(wrapped(t, x))), argnums=1, allow_int=True)).trace(tree, x)
  joined = (f"tensor<{WIDTH + 2}x64x", f"tensor<{WIDTH}x66x")
  text = {platform: traced.lower(lowering_platforms=(platform,)).as_text() for platform in ("tpu", "cpu", "cuda")}
  assert all(shape in text["tpu"] for shape in joined)
  assert not any(shape in text[platform] for shape in joined for platform in ("cpu", "cuda"))


def test_a_batch_of_nothing():
  tree = helpers.adapted(params_of((WIDTH, 7)), rank=2, targets=".*")
  for policy in POLICIES.values():
    wrapped = jaxlora.wrap(lambda p, x: x @ p["w0"], on_materialize="error", **policy.options)
    value, grads = jax.jit(jax.value_and_grad(lambda t: jnp.sum(wrapped(t, jnp.ones((0, WIDTH))))))(tree)
    assert value == 0
    np.testing.assert_array_equal(grads["w0"].a, np.zeros_like(grads["w0"].a))
