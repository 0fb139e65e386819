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
from tests import helpers

KEY = jax.random.key(0)
# optax promotes dtypes as JAX does by default.
pytestmark = pytest.mark.usefixtures("lenient")
X = helpers.array(0, (19, 13), np.float32)
Y = helpers.array(1, (19, 7), np.float32)


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
  return helpers.adapted(params(), seed=None, **{"rank": 3, "targets": "up|down"} | fields)


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


def train_state_step(gradient):
  """A TrainState step and its arguments."""
  state = TrainState.create(apply_fn=apply, params=adapted(), tx=jaxlora.optimizer(optax.adamw(1e-2)))
  return lambda state: state.apply_gradients(grads=gradient(loss)(state.params)), state


def split_step():
  """A step on the trainable half and its arguments."""
  frozen, trainable = jaxlora.split(adapted())
  tx = optax.adamw(1e-2)

  def step(frozen, trainable, state):
    grads = jax.grad(lambda t: loss(jaxlora.join(frozen, t)))(trainable)
    updates, state = tx.update(grads, state, trainable)
    return optax.apply_updates(trainable, updates), state

  return step, frozen, trainable, tx.init(trainable)


@pytest.mark.parametrize(
  "make",
  [lambda: train_state_step(jax.grad), lambda: train_state_step(jaxlora.grad), split_step],
  ids=["jax.grad", "jaxlora.grad", "split"],
)
def test_the_compiled_step_computes_nothing_of_the_bases_shape(make):
  """What is left of the base in the program: parameters, copies and layout changes of them."""
  step, *args = make()
  text = jax.jit(step).lower(*args).compile().as_text()
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


def test_value_and_grad_hands_keywords_on_and_keeps_the_name():
  def documented(tree, *, scale):
    """What it does."""
    return scale * loss(tree)

  value, grads = jaxlora.value_and_grad(documented)(adapted(), scale=3.0)
  expected_value, expected = jaxlora.value_and_grad(loss)(adapted())
  assert float(value) == pytest.approx(3 * float(expected_value))
  chex.assert_trees_all_close(grads, jax.tree.map(lambda leaf: 3 * leaf, expected), rtol=1e-5)
  for made in (jaxlora.grad(documented), jaxlora.value_and_grad(documented)):
    assert (made.__name__, made.__doc__) == ("documented", "What it does.")


def test_argnums_may_be_numpys():
  chex.assert_trees_all_close(jaxlora.grad(loss, argnums=np.int64(0))(adapted()), jaxlora.grad(loss)(adapted()))


@pytest.mark.parametrize("transform", [jaxlora.grad, jaxlora.value_and_grad])
@pytest.mark.parametrize(
  ("argnums", "args", "kwargs", "message"),
  [
    (3, 2, {}, r": argnums has 3, but the call has 2 positional arguments; expected a number from -2 to 1"),
    (-3, 2, {}, r": argnums has -3"),
    (0, 0, {}, r": argnums has 0, but the call has 0 positional arguments\. Pass the tree by position"),
    (0, 0, {"tree": None}, r": .*Pass the tree by position, not by keyword"),
    ((0, 0), 2, {}, r": argnums \(0, 0\) names an argument twice"),
    ((0, -2), 2, {}, r": argnums \(0, -2\) names an argument twice"),
    (1, 2, {}, r": argument 1: the tree has no adapted leaf.*jaxlora\.adapt"),
  ],
)
def test_argnums_must_name_adapted_arguments_once(transform, argnums, args, kwargs, message):
  given = (adapted(), X)[:args]
  with pytest.raises(ValueError, match=f"^{transform.__name__}{message}"):
    transform(loss, argnums=argnums)(*given, **{name: adapted() for name in kwargs})
  with pytest.raises(TypeError, match=f"^{transform.__name__}: argnums is 0.5, expected the number"):
    transform(loss, argnums=0.5)


@pytest.mark.parametrize("gradient", [jax.grad, jaxlora.grad], ids=["jax.grad", "jaxlora.grad"])
@pytest.mark.parametrize(
  "inner",
  [
    lambda: optax.partition(
      {"a": optax.sgd(1.0), "b": optax.sgd(2.0), "full": optax.sgd(3.0), "frozen": optax.set_to_zero()}, jaxlora.labels
    ),
    lambda: optax.MultiSteps(optax.sgd(2.0), 1),
    lambda: optax.apply_if_finite(optax.sgd(2.0), 3),
  ],
  ids=["partition", "MultiSteps", "apply_if_finite"],
)
def test_other_transformations_go_inside_optimizer(gradient, inner):
  tree = adapted(train="bias")
  tx = jaxlora.optimizer(inner())
  grads = gradient(loss)(tree)
  updates, _ = tx.update(grads, tx.init(tree), tree)
  chex.assert_trees_all_equal(jaxlora.strip(optax.apply_updates(tree, updates)), params())
  chex.assert_trees_all_close(updates["up"].b, -2 * grads["up"].b)


def test_gradients_with_nothing_in_them_need_the_parameters():
  tree, tx = adapted(), jaxlora.optimizer(optax.sgd(1.0))
  with pytest.raises(
    ValueError, match=r"optimizer: update found None in the gradients of down.*tx\.update\(gradients, "
  ):
    tx.update(jaxlora.grad(loss)(tree), tx.init(tree))
  updates, _ = tx.update(jax.grad(loss)(tree), tx.init(tree))
  assert not updates["up"].base.any()


@pytest.mark.parametrize("tx", [3, None, optax.adamw])
def test_optimizer_takes_optax_transformations(tx):
  with pytest.raises(TypeError, match=r"optimizer: found .*, expected an optax transformation"):
    jaxlora.optimizer(tx)


def test_one_optimizer_inside_another_is_one():
  tree = adapted(train="bias")
  grads = jaxlora.grad(loss)(tree)
  once, twice = (jaxlora.optimizer(tx) for tx in (optax.adam(1.0), jaxlora.optimizer(optax.adam(1.0))))
  chex.assert_trees_all_equal(once.update(grads, once.init(tree), tree), twice.update(grads, twice.init(tree), tree))


def test_gradients_of_integers_become_zeros():
  tree = adapted() | {"step": jnp.arange(3)}
  grads = jax.grad(lambda tree: loss(tree) * tree["step"][1], allow_int=True)(tree)
  assert grads["step"].dtype == jax.dtypes.float0
  tx = jaxlora.optimizer(optax.adam(1e-2))
  updates, _ = tx.update(grads, tx.init(tree), tree)
  after = optax.apply_updates(tree, updates)
  np.testing.assert_array_equal(after["step"], tree["step"])
  assert (after["up"].b != tree["up"].b).all()


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
