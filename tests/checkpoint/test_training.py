"""Training state: runs that go on where they stopped, bit for bit."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from jaxlora.checkpoint import CheckpointError, Manager
from tests.checkpoint.trees import assert_same, matrix_tree
from tests.helpers import array


class Small(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(jnp.tanh(nn.Dense(8)(x)))


def training(tx):
  """A loop with dropout whose key is carried along, over data whose position is."""
  apply = lambda params, x, key: jaxlora.wrap(Small().apply, dropout_key=key)({"params": params}, x)

  @jax.jit
  def step(trainable, opt_state, key, frozen, x):
    key, now = jax.random.split(key)
    loss = lambda t: jnp.mean(apply(jaxlora.join(frozen, t), x, now) ** 2)
    value, grads = jax.value_and_grad(loss)(trainable)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return optax.apply_updates(trainable, updates), opt_state, key, value

  def loop(steps, state, frozen, data):
    *state, index = state
    losses = []
    for _ in range(steps):
      *state, loss = step(*state, frozen, data[index : index + 4])
      index += 4
      losses.append(float(loss))
    return (*state, index), losses

  return loop


@pytest.mark.usefixtures("lenient")  # optax.add_noise promotes
def test_20_steps_are_10_and_10_bit_for_bit(tmp_path):
  data = np.random.default_rng(0).standard_normal((80, 5)).astype(np.float32)
  weights = lambda seed, *shape: {"kernel": array(seed, shape, jnp.float32), "bias": jnp.zeros(shape[-1])}
  params = {"Dense_1": weights(1, 5, 8), "Dense_0": weights(2, 8, 3)}
  config = jaxlora.LoraConfig(rank=2, dropout=0.3, targets=["Dense_0", "Dense_1"], train=["bias"])
  frozen, trainable = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(1)))
  tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2), optax.add_noise(1e-3, 0.5, jax.random.key(3)))
  train = training(tx)
  start = (trainable, tx.init(trainable), jax.random.key(2), 0)
  straight, losses = train(20, start, frozen, data)

  half, first = train(10, start, frozen, data)
  with Manager(tmp_path / "run", max_to_keep=2, save_interval_steps=10) as manager:
    assert manager.latest_step() is None
    assert manager.save(10, jaxlora.join(frozen, half[0]), half[1], data={"index": half[3]}, key={"dropout": half[2]})
    assert not manager.save(11, jaxlora.join(frozen, half[0]), half[1])
  with Manager(tmp_path / "run") as manager:
    state = manager.restore(params, lambda tree: tx.init(jaxlora.split(tree)[1]))
  assert (state.step, state.data) == (10, {"index": 40})
  frozen, trainable = jaxlora.split(state.tree)
  end, second = train(10, (trainable, state.opt_state, state.key["dropout"], state.data["index"]), frozen, data)
  assert_same(end[:3], straight[:3])
  assert first + second == losses
  assert len(set(losses)) == 20


def test_saving_goes_on_behind_while_the_state_is_donated(tmp_path):
  base, tree = matrix_tree(5.0)
  base, tree = jax.tree.map(jnp.asarray, (base, tree))
  own = np.full(1000, 7.0, np.float32)
  spoil = jax.jit(lambda leaves: jax.tree.map(lambda x: x * 0 - 1, leaves), donate_argnums=0)
  with Manager(tmp_path / "run") as manager:
    manager.save(1, tree, {"own": own, "count": 3})
    spoil((tree["w"].a, tree["w"].b))
    own[:] = -1
    state = manager.restore(base, {"own": own, "count": 0})
  assert (np.asarray(state.tree["w"].a) == 5).all()
  assert (state.opt_state["own"] == 7).all()
  assert state.opt_state["count"] == 3


def test_manager_keeps_the_latest_and_says_what_is_wrong(tmp_path):
  base, tree = matrix_tree()
  with Manager(tmp_path / "run", max_to_keep=2) as manager:
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
      manager.restore(base)
    for step in (1, np.int32(2), jnp.int32(5)):
      assert manager.save(
        step, tree, {"m": np.ones(2, np.float32)}, key=jax.random.key(step), metadata={"s": int(step)}
      )
    assert manager.all_steps() == [2, 5]
    assert manager.restore(base, step=2).metadata == {"s": 2}
    assert manager.restore(base).opt_state is None
    with pytest.raises(CheckpointError, match="found step 5, expected one above the latest, 5"):
      manager.save(5, tree)
    with pytest.raises(CheckpointError, match=r"step is 1\.5"):
      manager.save(1.5, tree)
    with pytest.raises(CheckpointError, match=r"data\['rng'\]"):
      manager.save(6, tree, data={"rng": np.ones(2)})
    with pytest.raises(CheckpointError, match="expected a random key"):
      manager.save(6, tree, key=3)
    with pytest.raises(CheckpointError, match=r"another structure.*m \(saved float32\[2\], expected float32\[3\]\)"):
      manager.restore(base, {"m": np.ones(3, np.float32)})
    with pytest.raises(CheckpointError, match=r"v \(saved nothing"):
      manager.restore(base, {"v": np.ones(2, np.float32)})
    assert manager.save(6, tree)
    assert manager.latest_step() == 6


def test_numpy_generators_resume(tmp_path):
  base, tree = matrix_tree()
  rng = np.random.default_rng(0)
  with Manager(tmp_path / "run") as manager:
    manager.save(1, tree, data=rng.bit_generator.state)
    want = rng.random(3)
    other = np.random.default_rng()
    other.bit_generator.state = manager.restore(base).data
  assert np.array_equal(other.random(3), want)
