"""Dropout acts on the adapter's input alone, and every use has a mask of its own."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import one_weight, square_weights

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


def test_no_key_means_evaluation():
  tree = one_weight(dropout=0.5)
  fn = lambda p, x: x @ p["w"]
  helpers.assert_close(jaxlora.wrap(fn)(tree, X), fn(jaxlora.merge(tree), X), 1e-5)


def test_dropout_acts_on_the_adapters_input_alone():
  """Every output is base + a combination of kept inputs: solve for the mask and find zeros and 1 / (1 - p)."""
  rate, n = 0.25, 400
  weight = jaxlora.LoraWeight(jnp.ones((n, n)), jnp.eye(n), jnp.eye(n), rank=n, alpha=float(n), dropout=rate)
  wrapped = jaxlora.wrap(lambda p, x: x @ p["w"], dropout_key=jax.random.key(3))
  x = jnp.ones((5, n))
  kept = wrapped({"w": weight}, x) - x @ jnp.ones((n, n))
  values = np.unique(np.round(np.asarray(kept), 3))
  np.testing.assert_allclose(values, [0, 1 / (1 - rate)], atol=1e-3)
  assert float((kept > 0).mean()) == pytest.approx(1 - rate, abs=0.03)


def test_dropout_is_a_function_of_its_key():
  tree, fn = one_weight(dropout=0.5), lambda p, x: x @ p["w"]
  run = lambda key: jaxlora.wrap(fn, dropout_key=key)(tree, X)
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.PRNGKey(1)))
  assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))


def masks_differ(fn, tree):
  outs = jaxlora.wrap(fn, dropout_key=jax.random.key(3), on_materialize="error")(tree, jnp.ones((4, 5)))
  return not np.allclose(outs[0], outs[1])


@pytest.mark.parametrize(
  "fn",
  [
    lambda p, x: (x @ p["w"], x @ p["w"]),
    lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0.0, length=2)[1],
    lambda p, x: lax.scan(lambda w, _: (w, x @ w), p["w"], length=2)[1],
    lambda p, x: lax.fori_loop(
      0, jnp.int32(x[0, 0] * 2), lambda k, out: out.at[k].set(x @ p["w"]), jnp.zeros((2, 4, 7))
    ),
  ],
  ids=["two uses", "scan", "scan carry", "while"],
)
def test_every_use_has_a_mask_of_its_own(fn):
  assert masks_differ(fn, one_weight(dropout=0.5))


def test_scanned_layers_have_masks_of_their_own():
  tree = one_weight((2, 5, 7), dropout=0.5, axes={"w": "sio"})
  same = jax.tree.map(lambda leaf: leaf[:1].repeat(2, axis=0), tree)
  assert masks_differ(lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1], same)


def test_every_leaf_has_masks_of_its_own():
  tree = square_weights(2, dropout=0.5)
  same = dict.fromkeys(tree, tree["layer_0"])
  assert masks_differ(lambda p, x: (x @ p["layer_0"], x @ p["layer_1"]), same)


def test_dropout_under_remat_recomputes_the_same_mask():
  tree = one_weight(dropout=0.5)
  fn = lambda p, x: jnp.tanh(x @ p["w"])
  loss = lambda f: lambda t: jnp.sum(jaxlora.wrap(f, dropout_key=jax.random.key(3))(t, X) ** 2)
  helpers.assert_close(jaxlora.grad(loss(jax.checkpoint(fn)))(tree), jaxlora.grad(loss(fn))(tree), 1e-5)


def test_materialising_says_that_dropout_does_not_act():
  tree = one_weight(dropout=0.5)
  with pytest.warns(jaxlora.MaterializeWarning, match="the adapter's dropout does not act there"):
    jaxlora.wrap(lambda p, x: x @ jnp.sin(p["w"]), dropout_key=KEY)(tree, X)


def test_jitted_layers_have_dropout_masks_of_their_own():
  tree = square_weights(1, dropout=0.5)
  layer = jax.jit(lambda w, x: x @ w)
  assert masks_differ(lambda p, x: (layer(p["layer_0"], x), layer(p["layer_0"], x)), tree)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
def test_dropout_of_integer_activations(dtype):
  tree, x = one_weight(dropout=0.5), jnp.arange(10, dtype=dtype).reshape(2, 5)
  fn = lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
  out = jaxlora.wrap(fn, dropout_key=KEY, on_materialize="error")(tree, x)
  assert bool(jnp.isfinite(out).all())
  assert not np.array_equal(out, jaxlora.wrap(fn)(tree, x))
