"""`wrap(fn, adapters=False)`: the base by itself, as the reference of preference training; two adapters on one base."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

PARAMS = {"w": helpers.array(1, (64, 32), jnp.float32), "bias": helpers.array(3, (32,), jnp.float32)}
X = helpers.array(2, (3, 64), jnp.float32)


def fn(params, x):
  return jnp.tanh(x @ params["w"] + params["bias"][None])


def moved(params=PARAMS, **fields):
  """A tree no part of which is at its start."""
  config = jaxlora.LoraConfig(2, targets=["w"], train="bias", **fields)
  frozen, trainable = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(0)))
  return jaxlora.join(frozen, jax.tree.map(lambda leaf: leaf + 0.5, trainable))


off = jaxlora.wrap(fn, adapters=False)


@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.nightly)])
def test_values_are_the_bases_to_the_bit(variant):
  tree = moved(variant=variant)
  np.testing.assert_array_equal(off(tree, X), fn(PARAMS, X))
  np.testing.assert_array_equal(off(tree, X), fn(jaxlora.strip(tree), X))
  assert not np.allclose(jaxlora.wrap(fn)(tree, X), fn(PARAMS, X))
  np.testing.assert_array_equal(off(jaxlora.split(tree)[0], X), fn(PARAMS, X))  # the frozen half is enough


@pytest.mark.nightly
@pytest.mark.parametrize("variant", [*jaxlora.variants])
def test_every_variant_can_be_off(variant):
  np.testing.assert_array_equal(off(moved(variant=variant), X), fn(PARAMS, X))


def test_a_base_of_codes_stays_codes():
  codes = jaxlora.quantize(PARAMS, "int8", targets=["w"])
  strict = jaxlora.wrap(fn, adapters=False, on_materialize="error")
  np.testing.assert_array_equal(strict(moved(codes), X), jaxlora.wrap(fn)(codes, X))


def test_it_costs_what_the_base_costs_and_differentiates_all_else():
  tree = moved()
  assert str(jax.make_jaxpr(off)(tree, X)).count("dot_general") == 1
  flops = lambda f, tree: jax.jit(f).lower(tree, X).compile().cost_analysis()["flops"]
  assert flops(off, tree) == flops(fn, PARAMS)
  by_tree, by_x = jax.grad(lambda *args: off(*args).sum(), (0, 1))(tree, X)
  assert not any(leaf.any() for leaf in jax.tree.leaves(by_tree))
  np.testing.assert_array_equal(by_x, jax.grad(lambda x: fn(PARAMS, x).sum())(X))


def test_it_is_a_setting_of_its_own():
  assert jaxlora.wrap(fn, adapters=False) == off != jaxlora.wrap(fn)
  with pytest.raises(TypeError, match=r"wrap: adapters is None, expected True, or False for the base alone\."):
    jaxlora.wrap(fn, adapters=None)
  with pytest.raises(ValueError, match="w: base missing"):
    off({"w": jaxlora.split(moved())[1]["w"], "bias": PARAMS["bias"]}, X)


def test_policy_critic_and_reference_share_one_base():
  """One step of all three takes the base as one argument, and holds no other array of its size."""
  size = 512
  params = {"w": jax.ShapeDtypeStruct((size, size), jnp.float32)}
  make = lambda key: jaxlora.adapt(params, jaxlora.LoraConfig(4, targets=["w"]), jax.random.key(key))
  (frozen, policy), (_, critic) = jaxlora.split(make(0)), jaxlora.split(make(1))
  apply = lambda params, x: jnp.tanh(x @ params["w"])
  x = jax.ShapeDtypeStruct((8, size), jnp.float32)

  def step(frozen, policy, critic, x):
    def loss(policy, critic):
      reference = jaxlora.wrap(apply, adapters=False)(frozen, x)
      value = jaxlora.wrap(apply)(jaxlora.join(frozen, critic), x)
      ratio = jaxlora.wrap(apply)(jaxlora.join(frozen, policy), x) - reference
      return (ratio * jax.lax.stop_gradient(value)).sum() + jnp.square(value - 1).sum()

    return jax.grad(loss, (0, 1))(policy, critic)

  memory = jax.jit(step).lower(frozen, policy, critic, x).compile().memory_analysis()
  base, factors = 4 * size * size, 4 * 2 * 2 * 4 * size
  assert memory.argument_size_in_bytes == base + factors + 4 * 8 * size
  assert memory.output_size_in_bytes < factors + 1024
  assert memory.temp_size_in_bytes < base / 2


@pytest.mark.parametrize(("adapted", "once"), [(1, 4), (2, 3), (4, 1)])
def test_what_no_adapter_has_changed_yet_is_computed_once(adapted, once):
  """Of four layers with two adapters: those below the first adapted one, and its base's own product."""
  size = 128
  params = {f"layer_{k}": jax.ShapeDtypeStruct((size, size), jnp.float32) for k in range(4)}
  x = jax.ShapeDtypeStruct((64, size), jnp.float32)
  config = jaxlora.LoraConfig(2, targets=[f"layer_{k}" for k in range(4 - adapted, 4)])
  frozen, factors = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(0)))

  def deep(params, x):
    for k in range(4):
      x = jnp.tanh(x @ params[f"layer_{k}"])
    return x

  policy, reference = jaxlora.wrap(deep), jaxlora.wrap(deep, adapters=False)
  with_critic = lambda frozen, a, b, x: (policy(jaxlora.join(frozen, a), x), policy(jaxlora.join(frozen, b), x))
  with_reference = lambda frozen, a, x: (policy(jaxlora.join(frozen, a), x), reference(frozen, x))
  for both, trees in ((with_critic, (factors, factors)), (with_reference, (factors,))):
    flops = jax.jit(both).lower(frozen, *trees, x).compile().cost_analysis()["flops"]
    products = flops / (2 * 64 * size * size)
    assert 8 - once <= products < 8.5 - once
