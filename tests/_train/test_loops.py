"""The loops that people write: TrainState, `nnx.Optimizer`, Equinox, line searches, optax's own ways into a state."""

import functools

import chex
import equinox as eqx
from flax import nnx
from flax.training.train_state import TrainState
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles

KEY = jax.random.key(0)
# optax, flax and equinox promote dtypes as JAX does by default.
pytestmark = pytest.mark.usefixtures("lenient")
X = helpers.normal(0, (8, 5), jnp.float32)
Y = helpers.normal(1, (8, 3), jnp.float32)
CONFIG = jaxlora.LoraConfig(rank=2, train=[r"bias"])


def params():
  return {"up": helpers.normal(2, (5, 6), jnp.float32), "down": helpers.normal(3, (6, 3), jnp.float32)}


def network(p, x):
  return jnp.tanh(x @ p["up"]) @ p["down"]


apply = jaxlora.wrap(network, on_materialize="error")


def loss(tree):
  return jnp.mean((apply(tree, X) - Y) ** 2)


def adapted(**fields):
  return helpers.adapted(params(), seed=None, **{"rank": 2, "targets": "up|down"} | fields)


def half_steps(tx, tree, steps, jit=jax.jit, **functions):
  """What `tx` makes of the trainable half by itself: the values of the loss, the tree and the state."""
  frozen, half = jaxlora.split(tree)
  of_half = lambda t: loss(jaxlora.join(frozen, t))
  values, half, state = _steps(
    optax.with_extra_args_support(tx), jax.value_and_grad, of_half, half, steps, jit, functions
  )
  return values, jaxlora.join(frozen, half), state


def whole_steps(tx, tree, steps, gradient=jaxlora.value_and_grad, jit=jax.jit, **functions):
  """The same by `jaxlora.optimizer`, on the whole tree."""
  return _steps(jaxlora.optimizer(tx), gradient, loss, tree, steps, jit, functions)


def _steps(tx, gradient, loss, tree, steps, jit, functions):
  @jit
  def step(tree, state):
    value, grads = gradient(loss)(tree)
    extra = {"value": value, "grad": grads, "value_fn": loss} if functions else {}
    updates, state = tx.update(grads, state, tree, **extra)
    return value, optax.apply_updates(tree, updates), state

  state, values = tx.init(tree), []
  for _ in range(steps):
    value, tree, state = step(tree, state)
    values.append(float(value))
  return values, tree, state


# ----------------------------------------------------------------------------------------------------------------------
# Optax's own ways.

SGD = optax.sgd(1.0)
STATES = {
  "adam": lambda: optax.adamw(1e-2),
  "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.scale(-1e-2)),
  "hyperparams": lambda: optax.inject_hyperparams(optax.adam)(1e-2),
  "MultiSteps": lambda: optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
  "finite": lambda: optax.apply_if_finite(optax.adam(1e-2), 3),
  "partition": lambda: optax.partition({"a": optax.adam(0.1), "b": SGD, "magnitude": SGD}, jaxlora.labels),
  "masked": lambda: optax.masked(optax.adam(1e-2), lambda tree: jax.tree.map(lambda x: x.shape[-1] == 3, tree)),
  "schedule_free": lambda: optax.contrib.schedule_free_adamw(1e-2),
  "mechanize": lambda: optax.contrib.mechanize(optax.adam(1e-2)),
  "prodigy": lambda: optax.contrib.prodigy(),
  "muon": lambda: optax.contrib.muon(1e-2),
}  # fmt: skip


@pytest.mark.parametrize("name", STATES)
def test_the_state_is_that_of_the_trainable_half(name):
  """To the bit, operation by operation: XLA may sum two programs' terms in two orders."""
  tree, by_operation = adapted(variant="dora"), {"jit": lambda fn: fn}
  of_half, of_whole = (run(STATES[name](), tree, 3, **by_operation) for run in (half_steps, whole_steps))
  chex.assert_trees_all_equal(of_half, of_whole)


def test_the_learning_rate_is_where_optax_keeps_it():
  tree, tx = adapted(), jaxlora.optimizer(optax.inject_hyperparams(optax.sgd)(learning_rate=1.0))
  grads, state = jaxlora.grad(loss)(tree), tx.init(tree)
  state.hyperparams["learning_rate"] = jnp.asarray(0.5)
  by_hand, _ = tx.update(grads, state, tree)
  by_name, _ = tx.update(grads, optax.tree_utils.tree_set(tx.init(tree), learning_rate=0.5), tree)
  chex.assert_trees_all_close(by_hand["up"].b, -0.5 * grads["up"].b)
  chex.assert_trees_all_equal(by_hand["up"].b, by_name["up"].b)
  assert float(optax.tree_utils.tree_get(state, "learning_rate")) == 0.5
  assert optax.tree_utils.tree_get(jaxlora.optimizer(optax.adam(1.0)).init(tree), "mu")["up"].a.shape == (2, 5)


def test_schedule_frees_parameters_for_evaluation():
  _, tree, state = whole_steps(optax.contrib.schedule_free_adamw(1e-1), adapted(), 4)
  frozen, half = jaxlora.split(tree)
  evaluated = jaxlora.join(frozen, optax.contrib.schedule_free_eval_params(state, half))
  assert not np.array_equal(evaluated["up"].b, tree["up"].b)
  chex.assert_trees_all_close(evaluated["up"].b, (tree["up"].b - 0.1 * state.z["up"].b) / 0.9, rtol=1e-5)
  chex.assert_trees_all_equal(jaxlora.strip(evaluated), params())


def test_states_are_mapped_over_as_optax_does():
  """`tree_map_params`, which gives the optimizer state the shardings of the parameters."""
  tree = adapted()
  tx = jaxlora.optimizer(optax.adam(1e-2))
  marked = optax.tree_utils.tree_map_params(
    tx,
    lambda _, place: place,
    tx.init(tree),
    jaxlora.labels(jaxlora.split(tree)[1]),
    transform_non_params=lambda _: "count",
  )
  assert sorted({*jax.tree.leaves(marked)}) == ["a", "b", "count"]


SEARCHES = {
  "lbfgs": optax.lbfgs,
  "backtracking": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20, store_grad=True)),
  "zoom": lambda: optax.chain(optax.sgd(1.0), optax.scale_by_zoom_linesearch(20)),
  "polyak": lambda: optax.polyak_sgd(1.0),
}


@pytest.mark.parametrize(
  ("name", "gradient"), profiles.alternating(SEARCHES, [jax.value_and_grad, jaxlora.value_and_grad])
)
def test_line_searches_go_inside(name, gradient):
  tree = adapted()
  values, end, _ = half_steps(SEARCHES[name](), tree, 4, search=True)
  found, tree, _ = whole_steps(SEARCHES[name](), tree, 4, gradient, search=True)
  np.testing.assert_allclose(found, values, rtol=1e-4)
  assert values[-1] < 0.8 * values[0]
  chex.assert_trees_all_close(tree, end, rtol=1e-3, atol=1e-5)
  chex.assert_trees_all_equal(jaxlora.strip(tree), params())


def test_a_line_searchs_function_takes_its_own_arguments_as_they_are():
  """What `value_fn` has beside the parameters goes to it by name, another adapted tree among it."""
  tree, other = adapted(), helpers.trained(adapted())

  def distance(t, reference, x):
    return jnp.mean((apply(t, x) - apply(reference, x)) ** 2)

  tx = jaxlora.optimizer(optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(20)))
  value, grads = jaxlora.value_and_grad(distance)(tree, other, X)
  updates, _ = tx.update(
    grads, tx.init(tree), tree, value=value, grad=grads, value_fn=jax.tree_util.Partial(distance), reference=other, x=X
  )
  assert distance(optax.apply_updates(tree, updates), other, X) < value


@pytest.mark.parametrize("name", ["sam", "sophia"])
def test_functions_that_transformations_call_see_whole_trees(name):
  tree, steps = adapted(), 3
  if name == "sam":
    tx = optax.contrib.sam(optax.adam(1e-2), optax.sgd(1e-2), sync_period=2, opaque_mode=True)
    extra = {"grad_fn": lambda p, _: jaxlora.grad(loss)(p)}
  else:
    tx, extra = optax.contrib.sophia(1e-2), {"obj_fn": loss}
  tx = jaxlora.optimizer(tx)
  state, first = tx.init(tree), loss(tree)
  for _ in range(steps):
    updates, state = tx.update(jaxlora.grad(loss)(tree), state, tree, **extra)
    tree = optax.apply_updates(tree, updates)
  assert loss(tree) < first
  chex.assert_trees_all_equal(jaxlora.strip(tree), params())


def test_gradients_of_another_tree_are_refused():
  tree, tx = adapted(), jaxlora.optimizer(optax.sgd(1.0))
  grads = {"up": jaxlora.grad(loss)(tree)["up"]}
  with pytest.raises(ValueError, match="found 1 leaves in the gradients, expected the 2 of params"):
    tx.update(grads, tx.init(tree), tree)


# ----------------------------------------------------------------------------------------------------------------------
# NNX.


class Net(nnx.Module):
  def __init__(self, rngs):
    self.up, self.norm, self.down = (
      nnx.Linear(5, 6, rngs=rngs),
      nnx.BatchNorm(6, rngs=rngs),
      nnx.Linear(6, 3, rngs=rngs),
    )
    self.dropout = nnx.Dropout(0.1, rngs=rngs)

  def __call__(self, x):
    return self.down(self.dropout(nnx.relu(self.norm(self.up(x)))))


call = jaxlora.wrap(lambda model, x: model(x), on_materialize="error")


def net():
  model = Net(nnx.Rngs(0))
  model.eval()
  return model


OPTIMIZERS = {
  "adam": lambda: optax.adamw(1e-2),
  "multi": lambda: optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2)), 2),
}


LOOPS = [("adam", False), ("multi", True), ("adam", True), ("multi", False)]  # an optimizer, and whether in nnx.jit


@pytest.mark.parametrize(("variant", "loop"), profiles.alternating(["lora", "vera", "dora"], LOOPS))
def test_nnx_optimizer_trains_a_module(variant, loop):
  """The loop of flax's documentation, beside the same steps by optax on the trainable half."""
  tx, jitted = loop
  plain = net()
  config = jaxlora.LoraConfig(rank=2, targets=r"(up|down)/kernel", train=["bias"], variant=variant)
  model = jaxlora.adapt(plain, config, KEY)
  before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(jaxlora.strip(model), nnx.Param)))
  objective = lambda model: jnp.mean((call(model, X) - Y) ** 2)

  frozen, half = jaxlora.split(model)
  inner = optax.with_extra_args_support(
    made.gradient_transformation() if isinstance(made := OPTIMIZERS[tx](), optax.MultiSteps) else made
  )
  state, expected = inner.init(half), []
  for _ in range(5):
    value, grads = jax.value_and_grad(lambda t: objective(jaxlora.join(frozen, t)))(half)
    updates, state = inner.update(grads, state, half)
    half = optax.apply_updates(half, updates)
    expected.append(float(value))

  optimizer = nnx.Optimizer(model, jaxlora.optimizer(OPTIMIZERS[tx]()), wrt=nnx.Param)

  def step(model, optimizer):
    value, grads = nnx.value_and_grad(objective)(model)
    optimizer.update(model, grads)
    return value

  step = nnx.jit(step) if jitted else step
  found = [float(step(model, optimizer)) for _ in range(5)]
  np.testing.assert_allclose(found, expected, rtol=1e-4)
  chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(jaxlora.strip(model), nnx.Param)), before)
  assert isinstance(model.up.kernel.get_value(), jaxlora.LoraWeight)


@pytest.mark.parametrize("gradient", [nnx.value_and_grad, jaxlora.value_and_grad], ids=["nnx", "jaxlora"])
def test_nnx_optimizer_takes_either_gradient(gradient):
  model = jaxlora.adapt(net(), CONFIG, KEY, probe=lambda m: m(X))
  optimizer = nnx.Optimizer(model, jaxlora.optimizer(optax.adam(1e-2)), wrt=nnx.Param)
  values = []
  for _ in range(4):
    value, grads = gradient(lambda m: jnp.mean((call(m, X) - Y) ** 2))(model)
    optimizer.update(model, grads)
    values.append(float(value))
  assert values == sorted(values, reverse=True)


def test_nnx_optimizer_trains_a_half():
  frozen, half = jaxlora.split(jaxlora.adapt(net(), CONFIG, KEY, probe=lambda m: m(X)))
  optimizer = nnx.Optimizer(half, jaxlora.optimizer(optax.adam(1e-2)), wrt=nnx.Param)
  before = jax.tree.map(jnp.copy, nnx.to_pure_dict(nnx.state(frozen)))

  @nnx.jit
  def step(half, optimizer):
    value, grads = nnx.value_and_grad(lambda t: jnp.mean((call(jaxlora.join(frozen, t), X) - Y) ** 2))(half)
    optimizer.update(half, grads)
    return value

  values = [float(step(half, optimizer)) for _ in range(4)]
  assert values == sorted(values, reverse=True)
  assert len({*values}) == 4
  chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(frozen)), before)


def test_nnx_optimizer_takes_a_line_search():
  """As flax documents it: `value_fn` is a function of the state."""
  model = jaxlora.adapt(net(), CONFIG, KEY, probe=lambda m: m(X))
  objective = lambda m: jnp.mean((call(m, X) - Y) ** 2)
  optimizer = nnx.Optimizer(model, jaxlora.optimizer(optax.lbfgs()), wrt=nnx.Param)
  values = []
  for _ in range(3):
    graph, rest = nnx.split(model, nnx.Param, ...)[::2]
    value, grads = nnx.value_and_grad(objective)(model)
    value_fn = lambda state, graph=graph, rest=rest: objective(nnx.merge(graph, state, rest))
    optimizer.update(model, grads, value=value, grad=grads, value_fn=value_fn)
    values.append(float(value))
  assert values[2] < values[1] < values[0]


# ----------------------------------------------------------------------------------------------------------------------
# Equinox.


class Module(eqx.Module):
  mlp: eqx.nn.MLP
  dropout: eqx.nn.Dropout
  scale: float
  offset: jax.Array
  steps: jax.Array
  name: str

  def __call__(self, x):
    return self.mlp(self.dropout(x)) * self.scale + self.offset


def module():
  mlp = eqx.nn.MLP(5, 3, 6, 1, key=KEY)
  return Module(mlp, eqx.nn.Dropout(0.1, inference=True), 0.5, jnp.ones(3), jnp.arange(2), "name")


@pytest.mark.parametrize("gradient", [jaxlora.grad, eqx.filter_grad], ids=["jaxlora", "equinox"])
def test_equinox_modules_with_functions_as_leaves(gradient):
  each = lambda m, x: jax.vmap(m)(x)
  wrapped = jaxlora.wrap(each, on_materialize="error")
  objective = lambda m: jnp.mean((wrapped(m, X) - Y) ** 2)
  tree = jaxlora.adapt(module(), CONFIG, KEY, probe=lambda m: each(m, X))
  tx = jaxlora.optimizer(optax.adamw(1e-2))
  state, values = tx.init(tree), []

  @eqx.filter_jit
  def step(tree, state):
    updates, state = tx.update(gradient(objective)(tree), state, tree)
    return eqx.apply_updates(tree, updates), state, objective(tree)

  for _ in range(4):
    tree, state, value = step(tree, state)
    values.append(float(value))
  assert values == sorted(values, reverse=True)
  after, before = jaxlora.strip(tree), module()
  assert eqx.tree_equal(after, before, typematch=True)
  assert after.dropout.inference is True
  assert type(after.scale) is float


def test_equinox_filters_give_a_tree_of_arrays_alone():
  """`eqx.partition` first: the loop of its documentation."""
  each = lambda m, x: jax.vmap(m)(x)
  wrapped = jaxlora.wrap(each)
  tree = jaxlora.adapt(module(), CONFIG, KEY, probe=lambda m: each(m, X))
  arrays, rest = eqx.partition(tree, eqx.is_array)
  tx = jaxlora.optimizer(optax.adam(1e-2))
  state = tx.init(arrays)
  values = []
  for _ in range(3):
    value, grads = jaxlora.value_and_grad(lambda a: jnp.mean((wrapped(eqx.combine(a, rest), X) - Y) ** 2))(arrays)
    updates, state = tx.update(grads, state, arrays)
    arrays = eqx.apply_updates(arrays, updates)
    values.append(float(value))
  assert values == sorted(values, reverse=True)


# ----------------------------------------------------------------------------------------------------------------------
# Donated states.


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora", "vera", "adalora", "loha", "lokr"])
def test_a_train_state_is_donated(variant):
  """The loop's state gives its buffers away; no buffer is in it twice."""
  same = {name: jnp.ones((6, 6)) * 0.1 for name in ("up", "down")}
  tree = jaxlora.adapt(same, jaxlora.LoraConfig(rank=2, targets="up|down", variant=variant), KEY)
  fn = jaxlora.wrap(lambda p: jnp.mean(jnp.ones((4, 6)) @ p["up"] @ p["down"]))
  state = TrainState.create(apply_fn=fn, params=tree, tx=jaxlora.optimizer(optax.adam(1e-2)))

  @functools.partial(jax.jit, donate_argnums=0)
  def step(state):
    return state.apply_gradients(grads=jaxlora.grad(fn)(state.params))

  for _ in range(2):
    state = step(state)
  assert np.isfinite(fn(state.params))
