"""Gradients, updates and optimizer state only where they belong."""

import re

import chex
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora

KEY = jax.random.key(0)
# optax promotes dtypes as JAX does by default.
pytestmark = pytest.mark.usefixtures("lenient")
X = jnp.asarray(np.random.default_rng(0).standard_normal((19, 13)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(1).standard_normal((19, 7)), jnp.float32)


@pytest.fixture(autouse=True)
def _fresh_trace_counts():
  chex.clear_trace_counter()


def network(p, x):
  return jnp.tanh(x @ p["up"] + p["bias"][None]) @ p["down"]


def params():
  rng = np.random.default_rng(2)
  made = {"up": rng.standard_normal((13, 17)), "bias": rng.standard_normal(17), "down": rng.standard_normal((17, 7))}
  return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32) * 0.3, made)


def adapted(**fields):
  return jaxlora.adapt(params(), jaxlora.LoraConfig(**{"rank": 3, "targets": "up|down"} | fields), KEY)


apply = jaxlora.wrap(network, on_materialize="error")


def loss(tree, x=X, y=Y):
  return jnp.mean((apply(tree, x) - y) ** 2)


def leaves_like_base(state):
  shapes = {leaf.shape for leaf in jax.tree.leaves(params())}
  return [leaf.shape for leaf in jax.tree.leaves(state) if leaf.shape in shapes and leaf.shape]


@pytest.mark.parametrize("gradient", [jax.grad, jaxlora.grad], ids=["jax.grad", "jaxlora.grad"])
def test_train_state_leaves_the_base_bit_identical(gradient):
  tree = adapted()
  state = TrainState.create(apply_fn=apply, params=tree, tx=jaxlora.optimizer(optax.adamw(1e-2, weight_decay=0.1)))

  @jax.jit
  @chex.assert_max_traces(1)
  def step(state):
    return state.apply_gradients(grads=gradient(loss)(state.params))

  first = loss(state.params)
  assert not leaves_like_base(state.opt_state)
  for _ in range(20):
    state = step(state)
  chex.assert_trees_all_equal(jaxlora.strip(state.params), params())
  assert loss(state.params) < 0.7 * first
  moved = jax.tree.map(lambda a, b: bool((a != b).all()), state.params, tree)
  assert moved["up"].b
  assert moved["up"].a


def test_split_leaves_the_base_bit_identical():
  frozen, trainable = jaxlora.split(adapted())
  tx = optax.adamw(1e-2)
  state = tx.init(trainable)
  assert not leaves_like_base(state)

  @jax.jit
  @chex.assert_max_traces(1)
  def step(frozen, trainable, state):
    value, grads = jax.value_and_grad(lambda t: loss(jaxlora.join(frozen, t)))(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state, value

  values = []
  for _ in range(20):
    trainable, state, value = step(frozen, trainable, state)
    values.append(float(value))
  chex.assert_trees_all_equal(jaxlora.strip(jaxlora.join(frozen, trainable)), params())
  assert values[-1] < 0.7 * values[0]


def compiled_step(gradient):
  """The optimised HLO of a TrainState step."""
  state = TrainState.create(apply_fn=apply, params=adapted(), tx=jaxlora.optimizer(optax.adamw(1e-2)))
  step = jax.jit(lambda state: state.apply_gradients(grads=gradient(loss)(state.params)))
  return step.lower(state).compile().as_text()


@pytest.mark.parametrize("gradient", [jax.grad, jaxlora.grad], ids=["jax.grad", "jaxlora.grad"])
def test_the_compiled_step_computes_nothing_of_the_bases_shape(gradient):
  """What is left of the base in the program: parameters, copies and layout changes of them."""
  text = compiled_step(gradient)
  shaped = re.findall(r"= f32\[(?:13,17|17,13|17,7|7,17)\][^ ]* ([\w-]+)\(", text)
  assert shaped  # the base is there
  assert set(shaped) <= {"parameter", "copy", "bitcast", "transpose", "get-tuple-element", "copy-start", "copy-done"}


def test_the_search_finds_a_full_gradient():
  step = jax.jit(lambda p: jax.tree.map(jnp.subtract, p, jax.grad(lambda p: jnp.mean((network(p, X) - Y) ** 2))(p)))
  text = step.lower(params()).compile().as_text()
  shaped = re.findall(r"= f32\[(?:13,17|17,13|17,7|7,17)\][^ ]* ([\w-]+)\(", text)
  assert set(shaped) & {"dot", "fusion", "subtract", "custom-call"}


def test_labels_and_mask():
  tree = adapted(train="bias")
  labels, mask = jaxlora.labels(tree), jaxlora.mask(tree)
  assert (labels["up"].base, labels["up"].a, labels["up"].b) == ("frozen", "a", "b")
  assert (labels["bias"].base, labels["bias"].value) == ("frozen", "full")
  assert (mask["up"].base, mask["up"].a, mask["bias"].value, mask["bias"].base) == (False, True, True, False)
  assert jaxlora.labels(adapted())["bias"] == "frozen"


def test_labels_make_a_partition():
  """A and B with learning rates of their own, by optax alone."""
  tree = adapted(train="bias")
  rates = {"a": 1.0, "b": 2.0, "full": 3.0}
  tx = optax.partition(
    {name: optax.sgd(rate) for name, rate in rates.items()} | {"frozen": optax.set_to_zero()}, jaxlora.labels
  )
  updates, _ = tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree)
  assert [float(part.ravel()[0]) for part in (updates["up"].base, updates["up"].a, updates["up"].b)] == [0, -1, -2]
  assert float(updates["bias"].value[0]) == -3


def test_masked_alone_is_the_trap_that_optimizer_avoids():
  tree = adapted()
  grads = jax.tree.map(jnp.ones_like, tree)
  trap = optax.masked(optax.sgd(1.0), jaxlora.mask)
  through, _ = trap.update(grads, trap.init(tree), tree)
  assert through["up"].base.all()
  tx = jaxlora.optimizer(optax.sgd(1.0))
  updates, _ = tx.update(grads, tx.init(tree), tree)
  assert not updates["up"].base.any()
  assert not updates["bias"].any()
  assert (updates["up"].a == -1).all()


def test_optimizer_hands_extra_arguments_on():
  seen = {}

  def update(updates, state, params=None, *, value=None, **_):
    seen["value"] = value
    return updates, state

  tx = jaxlora.optimizer(optax.GradientTransformationExtraArgs(lambda params: (), update))
  tree = adapted()
  tx.update(jax.tree.map(jnp.ones_like, tree), tx.init(tree), tree, value=5)
  assert seen == {"value": 5}


def test_weight_decay_and_clipping_see_the_trainable_leaves_alone():
  tree = adapted()
  tx = jaxlora.optimizer(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1.0)))
  updates, _ = tx.update(jax.tree.map(lambda leaf: 100 * jnp.ones_like(leaf), tree), tx.init(tree), tree)
  assert float(optax.global_norm(updates)) == pytest.approx(1.0, rel=1e-5)


def test_value_and_grad_is_jax_value_and_grad_on_the_trainable_half():
  tree = adapted(train="bias")
  value, grads = jaxlora.value_and_grad(loss)(tree)
  frozen, trainable = jaxlora.split(tree)
  expected = jax.value_and_grad(lambda t: loss(jaxlora.join(frozen, t)))(trainable)
  chex.assert_trees_all_close((value, grads), expected)
  assert grads["up"].base is None
  assert jax.tree.structure(grads) == jax.tree.structure(trainable)
  chex.assert_trees_all_close(jaxlora.grad(loss)(tree), grads)


def test_value_and_grad_argnums_and_aux():
  first, second = adapted(), adapted(rank=2)
  both = lambda scale, t, u: (scale * (loss(t) + 2 * loss(u)), {"seen": scale})
  (value, aux), (g_t, g_u) = jaxlora.value_and_grad(both, argnums=(1, 2), has_aux=True)(3.0, first, second)
  assert aux == {"seen": 3.0}
  assert float(value) == pytest.approx(3 * float(loss(first) + 2 * loss(second)))
  chex.assert_trees_all_close(g_t["up"].b, 3 * jaxlora.grad(loss)(first)["up"].b, rtol=1e-5)
  grads, aux = jaxlora.grad(both, argnums=-1, has_aux=True)(3.0, first, second)
  chex.assert_trees_all_close(grads, g_u)
  assert aux == {"seen": 3.0}


def test_the_base_may_hold_integers():
  tree = adapted() | {"step": jnp.arange(3)}
  with_steps = lambda tree: loss(tree) * tree["step"][1]
  grads = jaxlora.grad(with_steps)(tree)
  assert grads["step"] is None
  tx = jaxlora.optimizer(optax.adam(1e-2))
  updates, _ = tx.update(grads, tx.init(tree), tree)
  after = optax.apply_updates(tree, updates)
  np.testing.assert_array_equal(after["step"], tree["step"])
  assert after["step"].dtype == tree["step"].dtype


@pytest.mark.parametrize(("rank", "true_rank"), [(3, 3), (5, 3), (2, 5)])
def test_planted_delta(rank, true_rank, x64):
  """Regression onto W + D, D of rank k: r >= k recovers D; r < k stops at the Eckart-Young floor."""
  rng = np.random.default_rng(3)
  n, m = 12, 9
  base = rng.standard_normal((n, m))
  u, _ = np.linalg.qr(rng.standard_normal((n, true_rank)))
  v, _ = np.linalg.qr(rng.standard_normal((m, true_rank)))
  singular = np.linspace(2.0, 1.0, true_rank)
  target = jnp.asarray(base + (u * singular) @ v.T)
  tree = jaxlora.adapt({"w": jnp.asarray(base)}, jaxlora.LoraConfig(rank=rank, targets="w"), KEY)
  frozen, trainable = jaxlora.split(tree)
  fn = jaxlora.wrap(lambda p, x: x @ p["w"], on_materialize="error")
  data = jnp.eye(n)  # whitened inputs: the loss is the squared Frobenius distance
  objective = lambda t: jnp.sum((fn(jaxlora.join(frozen, t), data) - data @ target) ** 2)
  tx = optax.lbfgs()
  value_and_grad = optax.value_and_grad_from_state(objective)

  def step(carry, _):
    trainable, state = carry
    value, grads = value_and_grad(trainable, state=state)
    updates, state = tx.update(grads, state, trainable, value=value, grad=grads, value_fn=objective)
    return (optax.apply_updates(trainable, updates), state), value

  run = jax.jit(lambda t: jax.lax.scan(step, (t, tx.init(t)), length=150))
  (trainable, _), _ = run(trainable)
  floor = float(np.sum(singular[rank:] ** 2))
  assert float(objective(trainable)) == pytest.approx(floor, abs=1e-6)
  if rank >= true_rank:
    np.testing.assert_allclose(jaxlora.merge(jaxlora.join(frozen, trainable))["w"], target, atol=1e-6)
