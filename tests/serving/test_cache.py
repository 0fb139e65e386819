"""Decoding beside a cache."""

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers
from tests.serving.banks import adapters, bank_of, close, data, mlp, one_by_one, params_of


class Decoder(nn.Module):
  """A layer of attention with a cache of keys and values."""

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2, decode=True, name="attention")(x) + nn.Dense(8, name="mlp")(x)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("capacity", [2, 40])  # few enough for a wide product, and not
def test_decoding_with_a_cache(capacity):
  model = Decoder()
  whole = jnp.zeros((1, 5, 8))
  variables = jax.jit(model.init)(jax.random.key(0), whole)
  params, steps = variables["params"], 4
  probe = lambda p: model.apply({"params": p, "cache": variables["cache"]}, whole[:, :1], mutable=["cache"])[0]
  trees = [helpers.adapted(params, k, probe=probe, seed=k, targets=".*kernel") for k in range(2)]
  bank, ids, x = bank_of(trees, capacity=capacity), (1, -1, 0), helpers.array(1, (3, 1, 8), jnp.float32)

  def cache_of(rows):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((rows, 5, 8)))["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def step(p, cache, x):
    y, new = model.apply({"params": p, "cache": cache}, x, mutable=["cache"])
    return new["cache"], jnp.tanh(y)

  def generate(p, cache, x):
    """All steps in one loop."""
    body = lambda state: (state[0] + 1, *step(p, *state[1:]))
    return lax.while_loop(lambda state: state[0] < steps, body, (0, cache, x))[1:]

  def alone(p, x):
    return generate(p, cache_of(1), x)[1]

  want = one_by_one(alone, params, trees, ids, x)
  cache, y = jax.jit(jaxlora.route(generate))(params, bank, jnp.asarray(ids), cache_of(3), x)
  close(y, want)
  assert cache["attention"]["cache_index"].shape == ()  # shared by all rows
  stepped = jax.jit(jaxlora.route(step))
  state = cache_of(3), x
  for _ in range(steps):
    state = stepped(params, bank, jnp.asarray(ids), *state)
  close(state, (cache, y))
  text = stepped.lower(params, bank, jnp.asarray(ids), *state).as_text()
  assert "scatter" not in text  # rows write to one place of their caches


def test_rows_that_write_to_one_place_write_together():
  def fn(p, cache, x, place):
    return lax.dynamic_update_slice(cache, mlp(p, x), (0, place, 0))

  params, trees, ids, x = params_of(), adapters(), (2, -1, 0), data(3)
  args = helpers.array(6, (3, 9, 5), jnp.float32), x, jnp.asarray(2)
  routed = jax.jit(jaxlora.route(fn, in_axes=(0, 0, None)))
  close(
    routed(params, bank_of(trees), jnp.asarray(ids), *args),
    one_by_one(lambda p, *rows: fn(p, *rows, args[2]), params, trees, ids, *args[:2]),
  )
  assert "scatter" not in routed.lower(params, bank_of(trees), jnp.asarray(ids), *args).as_text()
