"""`wrap` under other transformations, and what of a function it leaves alone."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import one_weight

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


def test_eager_calls_equal_jitted_ones():
  case = helpers.BUILDERS["attention"](jnp.float32)
  tree, wrapped = case.adapted(), jaxlora.wrap(case.fn)
  helpers.assert_close(wrapped(tree, *case.args), jax.jit(wrapped)(tree, *case.args), 1e-5)


def test_vmap_over_data_and_over_trees():
  trees = [one_weight(seed=seed) for seed in (1, 5)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *trees)
  wrapped = jaxlora.wrap(lambda p, x: jnp.tanh(x @ p["w"]), on_materialize="error")
  wanted = [jax.jit(wrapped)(tree, X) for tree in trees]
  helpers.assert_close(jax.vmap(wrapped, in_axes=(0, None))(stacked, X), np.stack(wanted), 1e-5)
  helpers.assert_close(jax.vmap(wrapped, in_axes=(None, 0))(trees[0], X), wanted[0], 1e-5)


def test_second_derivatives_and_forward_mode(x64):
  case = helpers.BUILDERS["dense"](jnp.float64)
  frozen, trainable = jaxlora.split(case.adapted())
  nonlinear = lambda p, x: jnp.sum(jnp.tanh(case.fn(p, x)))
  of = lambda f: lambda t: f(jaxlora.join(frozen, t), *case.args)
  got, want = (jax.jit(jax.hessian(of(f)))(trainable) for f in (jaxlora.wrap(nonlinear), helpers.oracle(nonlinear)))
  helpers.assert_close(got, want, 1e-11)
  got, want = (jax.jit(jax.jacfwd(of(f)))(trainable) for f in (jaxlora.wrap(nonlinear), helpers.oracle(nonlinear)))
  helpers.assert_close(got, want, 1e-12)


@pytest.mark.parametrize("fn", [lambda p, x: x @ p["w"], lambda p, x: p["w"][jnp.array([2, 0])]], ids=["dot", "gather"])
def test_the_base_gets_no_gradient(fn):
  tree = one_weight()
  grads = jax.jit(jax.grad(lambda t: jnp.sum(jnp.tanh(jaxlora.wrap(fn)(t, X)))))(tree)
  assert not np.any(grads["w"].base)
  assert np.any(grads["w"].a)


def test_wrapping_twice_and_plain_trees():
  tree = one_weight()
  fn = lambda p, x: x @ p["w"]
  twice = jaxlora.wrap(jaxlora.wrap(fn))
  helpers.assert_close(twice(tree, X), fn(jaxlora.merge(tree), X), 1e-5)
  np.testing.assert_array_equal(jaxlora.wrap(fn)(jaxlora.strip(tree), X), fn(jaxlora.strip(tree), X))


def test_only_arrays_are_traced():
  """Strings, bools, numbers and callables reach the function as they are, and come back so."""
  tree = one_weight()

  def fn(p, x, mode, *, flip, times, activation):
    assert mode == "train"
    assert flip is True
    return {"y": activation(x @ p["w"]) * times, "mode": mode, "times": times, "none": None}

  out = jaxlora.wrap(fn)(tree, np.asarray(X), "train", flip=True, times=2, activation=jnp.tanh)
  assert (out["mode"], out["times"], out["none"]) == ("train", 2, None)
  helpers.assert_close(out["y"], jnp.tanh(X @ jaxlora.merge(tree)["w"]) * 2, 1e-5)


def test_the_signature_is_kept():
  def documented(p, x):
    """What it does."""

  assert jaxlora.wrap(documented).__name__ == "documented"
  assert jaxlora.wrap(documented).__doc__ == "What it does."


def apply(params, x):
  return x @ params["w"]


class Model:
  scale = 2

  def apply(self, params, x):
    return self.scale * (x @ params["w"])


def test_equal_by_function_and_settings():
  """As a static argument of `jit`, a fresh wrapper is compiled once."""
  model, tree, traced = Model(), one_weight(), []

  def step(fn, tree, x):
    traced.append(fn)
    return fn(tree, x)

  step = jax.jit(step, static_argnums=0)
  for make in (
    lambda: jaxlora.wrap(apply),
    lambda: jaxlora.wrap(model.apply),
    lambda: jaxlora.wrap(jaxlora.wrap(apply)),
  ):
    assert make() == make()
    assert hash(make()) == hash(make())
    traced.clear()
    helpers.assert_close(step(make(), tree, X), step(make(), tree, X), 0)
    assert len(traced) == 1
  wrapped = jaxlora.wrap(apply)
  others = [{"on_materialize": "error"}, {"recompute": False}, {"tuning": "none"}, {"platform": "cpu"}]
  assert len({wrapped, *(jaxlora.wrap(apply, **fields) for fields in others)}) == 5
  with_keys = [jaxlora.wrap(apply, dropout_key=KEY) for _ in range(2)]
  assert with_keys[0] != with_keys[1] == with_keys[1]
  assert jaxlora.wrap(model.apply) != jaxlora.wrap(Model().apply)
  assert wrapped != apply
  held = jax.tree_util.Partial(apply, tree)
  assert jaxlora.wrap(held) != jaxlora.wrap(held)
  hash(jaxlora.wrap(held))


def test_in_a_class_it_is_a_method():
  tree = one_weight()

  class Model:
    scale = 2

    @jaxlora.wrap
    def apply(self, params, x):
      return self.scale * (x @ params["w"])

  helpers.assert_close(Model().apply(tree, X), 2 * jaxlora.wrap(apply)(tree, X), 1e-6)


def test_donation_inside_and_outside():
  tree = one_weight()
  inner = jax.jit(lambda p, x: jnp.tanh(x @ p["w"]), donate_argnums=(0, 1))
  fn = lambda p, x: inner(p, x * 1)
  want = jnp.tanh(X @ jaxlora.merge(tree)["w"])
  helpers.assert_close(jaxlora.wrap(fn, on_materialize="error")(tree, X), want, 1e-5)
  frozen, trainable = jaxlora.split(tree)

  def step(trainable, frozen, x):
    grads = jax.grad(lambda t: jnp.sum(jaxlora.wrap(fn)(jaxlora.join(frozen, t), x)))(trainable)
    return jax.tree.map(jnp.subtract, trainable, grads)

  moved = jax.jit(step, donate_argnums=0)(trainable, frozen, X)
  assert trainable["w"].a.is_deleted()
  assert not frozen["w"].base.is_deleted()
  assert moved["w"].a.shape == (2, 5)


def test_effects_keep_happening(capsys):
  def fn(p, x):
    def body(x, _):
      jax.debug.print("norm {}", jnp.sum(x * 0))
      return jnp.tanh(x @ p["w"]), None

    return lax.scan(body, x, length=2)[0]

  tree = one_weight((5, 5))
  out = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(tree, X)
  jax.effects_barrier()
  assert capsys.readouterr().out.count("norm 0.0") == 2
  assert out.shape == (3, 5)
