"""Control flow that hides what it does with a weight, and control flow of a JAX to come."""

import jax
from jax import lax
import jax.numpy as jnp
import pytest

import jaxlora
from jaxlora._jax import control_flow
from tests import helpers
from tests.helpers import one_weight, square_weights

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


@pytest.mark.parametrize("wrap", ["scan", "cond", "jit", "remat", "shard_map", "while"])
def test_control_flow_of_an_unknown_form_materialises_instead_of_crashing(wrap, monkeypatch):
  """A JAX to come may name the parameters of its control flow otherwise."""
  unknown = lambda params: params["unheard_of"]
  monkeypatch.setattr(control_flow, "_READERS", dict.fromkeys(control_flow._READERS, unknown))
  case = helpers.BUILDERS["dense"](jnp.float32)
  fn = helpers.WRAPPERS[wrap](case.fn)
  tree = case.adapted()
  with pytest.raises(jaxlora.MaterializeError, match="this version of JAX describes"):
    jaxlora.wrap(fn, on_materialize="error")(tree, *case.args)
  got = jax.jit(jaxlora.wrap(fn, on_materialize="ignore"))(tree, *case.args)
  helpers.assert_close(got, jax.jit(helpers.oracle(fn))(tree, *case.args), 1e-5)


def test_a_batched_predicate_of_a_loop(x64):
  """A loop under vmap whose length is data: every element stops when it is through."""

  def fn(p, x):
    grow = lambda x: jnp.tanh(x @ p["w"]) * 2 + x
    return jax.vmap(lambda x: lax.while_loop(lambda x: jnp.sum(jnp.abs(x @ p["w"])) < 30, grow, x))(x)

  tree = helpers.adapted({"w": helpers.array(1, (5, 5), jnp.float64)}, alpha=3, targets="w")
  helpers.check(fn, tree, (helpers.array(2, (3, 5), jnp.float64),), 1e-11, reverse=False)


@pytest.mark.parametrize("boundary", [jax.checkpoint, jax.jit], ids=["remat", "jit"])
def test_weights_that_a_body_hands_on_through_a_call_stay_factored(boundary):
  """As `nnx.scan` with `nnx.remat` does: the state of a module comes out of the loop, and is used after it."""
  body = boundary(lambda x, w: (jnp.tanh(x @ w), w))

  def through_xs(p, x):
    x, stack = lax.scan(body, x, p["w"])
    return lax.scan(body, x, stack)[0]

  def through_carry(p, x):
    step = boundary(lambda state: (jnp.tanh(state[0] @ state[1]), state[1]))
    (x, w), _ = lax.scan(lambda state, _: (step(state), None), (x, p["w"][0]), length=2)
    return x @ w

  def through_cond(p, x):
    one, other = boundary(lambda x, w: (x @ w, w)), boundary(lambda x, w: (x, w))
    x, w = lax.cond(x[0, 0] > 0, one, other, x, p["w"][1])
    return x @ w

  for fn in (through_xs, through_carry, through_cond):
    helpers.check(fn, one_weight((3, 5, 5), axes={"w": "sio"}), (X,), 1e-5)


@pytest.mark.parametrize("loop", [lax.scan, lax.fori_loop], ids=["scan", "fori_loop"])
def test_carries_of_one_type_keep_their_places(loop):
  """Beside a weight that rides along: carries that trade places are wrong in values alone."""

  def step(carry):
    x, w, y = carry
    return jnp.tanh(x @ w) + 1, w, y / 2 + x

  def fn(p, x):
    start = x, p["w"], 2 * x
    if loop is lax.scan:
      x, w, y = lax.scan(lambda carry, _: (step(carry), None), start, length=3)[0]
    else:
      x, w, y = lax.fori_loop(0, 3, lambda _, carry: step(carry), start)
    return x, y @ w

  helpers.check(fn, one_weight((5, 5)), (X,), 1e-5)


def test_branches_hand_on_several_weights_in_their_places():
  def fn(p, x):
    branches = (jax.checkpoint(lambda w, v, x, k=k: (w, v, x * k)) for k in (2, 3))  # JAX looks through plain ones
    w, v, x = lax.cond(x[0, 0] > 0, *branches, p["layer_0"], p["layer_1"], x)
    return jnp.tanh(x @ w) @ v

  helpers.check(fn, square_weights(2), (X,), 1e-5)


def test_a_scan_over_an_axis_of_one():
  fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][None])[0]
  helpers.check(fn, one_weight((5, 5)), (X,), 1e-5)


@pytest.mark.parametrize(
  "pick",
  [
    lambda w, k: w[k],
    lambda w, k: lax.dynamic_index_in_dim(w, k, 0, keepdims=False),
    lambda w, k: lax.dynamic_slice(w, (k, 0, 0), (1, 5, 5))[0],
  ],
  ids=["index", "dynamic_index", "dynamic_slice"],
)
def test_an_expert_for_each_example_under_vmap(pick):
  fn = lambda p, x: jax.vmap(lambda x, k: x @ pick(p["w"], k))(x, jnp.array([2, 0, 1]))
  helpers.check(fn, one_weight((3, 5, 5), axes={"w": "sio"}), (X,), 1e-5)


def test_platform_dependent_branches():
  def fn(p, x):
    return lax.platform_dependent(p["w"], x, cpu=lambda w, x: x @ w, default=lambda w, x: x @ w * 2)

  helpers.check(fn, one_weight(), (X,), 1e-5)
