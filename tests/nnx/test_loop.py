"""NNX's own loop: the optimizer holds factors alone, and twenty steps are those of the functional loop."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
import jaxlora.nnx
from tests.nnx.models import CONFIG, KEY, Net, X, Y, adapted, merged

pytestmark = pytest.mark.usefixtures("lenient")
Trainable = jaxlora.nnx.Trainable
WRT = nnx.DiffState(0, Trainable)


def transformation():
  """Adam with a schedule, averages of the updates, and steps over two batches."""
  schedule = optax.linear_schedule(1e-2, 1e-3, 10)
  tx = optax.chain(optax.scale_by_adam(), optax.ema(0.9), optax.scale_by_learning_rate(schedule))
  return optax.MultiSteps(tx, 2).gradient_transformation()


def functional(net, steps):
  """The loop of split, join and wrap, on states."""
  graph, params, rest = nnx.split(net, nnx.Param, ...)
  frozen, half = jaxlora.split(jaxlora.adapt(params, CONFIG, KEY))

  def apply(params, rest, x):
    model = nnx.merge(graph, params, rest)
    return model(x), nnx.split(model, nnx.Param, ...)[2]

  def loss(half, frozen, rest, x, y):
    out, rest = jaxlora.wrap(apply)(jaxlora.join(frozen, half), rest, x)
    return jnp.mean((out - y) ** 2), rest

  tx, losses = optax.with_extra_args_support(transformation()), []
  state = tx.init(half)

  @jax.jit
  def step(half, frozen, rest, state, x, y):
    (value, rest), grads = jax.value_and_grad(loss, has_aux=True)(half, frozen, rest, x, y)
    updates, state = tx.update(grads, state, half)
    return optax.apply_updates(half, updates), rest, state, value

  for _ in range(steps):
    half, rest, state, value = step(half, frozen, rest, state, X, Y)
    losses.append(value)
  return np.array(losses), jax.tree.leaves(half), rest


def test_twenty_steps_are_those_of_the_functional_loop_bit_for_bit():
  net = Net(nnx.Rngs(0))
  before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
  model = jaxlora.nnx.adapt(net, CONFIG, KEY)
  optimizer = nnx.Optimizer(model, transformation(), wrt=Trainable)

  @nnx.jit
  def step(model, optimizer, x, y):
    value, grads = nnx.value_and_grad(lambda model: jnp.mean((model(x) - y) ** 2), argnums=WRT)(model)
    optimizer.update(model, grads)
    return value

  losses = np.array([step(model, optimizer, X, Y) for _ in range(20)])
  expected, half, rest = functional(Net(nnx.Rngs(0)), 20)
  np.testing.assert_array_equal(losses, expected)
  tree = jaxlora.split(jaxlora.nnx.to_tree(model))[1]
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(tree), half)
  np.testing.assert_array_equal(model.norm.mean[...], rest["norm"]["mean"][...])
  assert model.drop.rngs.count[...] == 20
  after = nnx.to_pure_dict(nnx.state(model, nnx.Param))
  jax.tree.map(np.testing.assert_array_equal, before, after)
  sizes = {leaf.shape for leaf in jax.tree.leaves(nnx.state(optimizer.opt_state))}
  assert sizes <= {(), (6,), (2, 5), (2, 6), (2, 3)}


@pytest.mark.nightly  # seconds
def test_gradients_are_those_of_the_merged_module_and_operation_by_operation_too():
  model = adapted()
  model.eval()
  loss = lambda model: jnp.mean((model(X) - Y) ** 2)
  graph, half, rest = nnx.split(model, Trainable, ...)
  of_merged = jax.grad(lambda half: loss(merged(nnx.merge(graph, half, rest))))(half)
  grads = nnx.grad(loss, argnums=WRT)(model)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), grads, of_merged)
  tree_mode = nnx.grad(lambda half: loss(nnx.merge(graph, half, rest)), graph=False)(half)
  jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(tree_mode), jax.tree.leaves(grads))


@pytest.mark.parametrize("grad", [nnx.grad, lambda loss: nnx.grad(loss, argnums=nnx.DiffState(0, nnx.Param))])
def test_a_frozen_base_is_not_differentiated_unnoticed(grad):
  model = adapted()
  model.eval()
  with pytest.raises(ValueError, match=r"(down/|)kernel: .*DiffState\(0, jaxlora.nnx.Trainable\)"):
    grad(lambda model: jnp.sum(model.down(model.layers[0](X[:, :1] * jnp.ones(6)))))(model)
