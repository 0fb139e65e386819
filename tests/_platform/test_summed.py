"""Products of layers that a loop goes over, as TPUs are given them: `h B` as a short sum, or as a longer product."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._platform import summed
from tests import helpers

LAYERS, TOKENS, WIDTH, RANK = 2, 5, 4, 3


@pytest.fixture
def scanned(x64):
  """A loop over layers of two products of one input, and one of their result; its adapted tree, and an input."""
  draw = lambda *shape: np.random.default_rng(len(shape)).normal(size=shape) / 2
  params = {
    "gate": draw(LAYERS, WIDTH, 3 * WIDTH),
    "up": draw(LAYERS, WIDTH, 3 * WIDTH),
    "down": draw(LAYERS, 3 * WIDTH, WIDTH),
  }

  def fn(params, x):
    step = lambda x, layer: (x + (jnp.tanh(x @ layer["gate"]) * (x @ layer["up"])) @ layer["down"], None)
    return jax.lax.scan(step, x, params)[0]

  x = draw(2, TOKENS, WIDTH)
  tree = helpers.adapted(jax.tree.map(jnp.asarray, params), rank=RANK, targets=".*", probe=lambda p: fn(p, x))
  return fn, tree, jnp.asarray(x)


@pytest.mark.parametrize("most", [RANK, RANK - 1])
def test_a_loop_over_layers_equals_the_merged_one(scanned, most, monkeypatch):
  monkeypatch.setattr(summed, "MOST_TERMS", most)
  fn, tree, x = scanned
  frozen, half = jaxlora.split(tree)
  wrapped = jaxlora.wrap(fn, platform="tpu", on_materialize="error")
  ours = lambda half, x: jnp.sum(jnp.sin(wrapped(jaxlora.join(frozen, half), x)))
  merged = lambda half, x: jnp.sum(jnp.sin(fn(jaxlora.merge(jaxlora.join(frozen, half)), x)))
  compiled = jax.jit(jax.value_and_grad(ours, (0, 1)))
  joined = f"tensor<{WIDTH + RANK}x{3 * WIDTH}xf64>"  # a weight and its B
  assert (joined in compiled.lower(half, x).as_text()) == (most < RANK)
  helpers.assert_close(compiled(half, x), jax.jit(jax.value_and_grad(merged, (0, 1)))(half, x), 1e-12)


@pytest.mark.parametrize(
  ("options", "joins"), [({"block_size": None, "double": False}, False), ({"block_size": 4}, True)]
)
def test_codes_are_read_in_place_where_they_are_a_number_times_a_scale(scanned, options, joins):
  fn, tree, x = scanned
  _, half = jaxlora.split(tree)
  probe = lambda p: fn(p, x)
  codes = jaxlora.quantize(jaxlora.strip(tree), "int8", targets=".*", probe=probe, **options)
  frozen, _ = jaxlora.split(helpers.adapted(codes, rank=RANK, targets=".*", probe=probe))
  wrapped = jaxlora.wrap(fn, platform="tpu", on_materialize="error")
  ours = lambda half, x: jnp.sum(jnp.sin(wrapped(jaxlora.join(frozen, half), x)))
  merged = lambda half, x: jnp.sum(jnp.sin(fn(jaxlora.merge(jaxlora.join(frozen, half)), x)))
  compiled = jax.jit(jax.value_and_grad(ours, (0, 1)))
  assert (f"tensor<{WIDTH + RANK}x{3 * WIDTH}xf64>" in compiled.lower(half, x).as_text()) == joins
  helpers.assert_close(compiled(half, x), jax.jit(jax.value_and_grad(merged, (0, 1)))(half, x), 1e-12)
