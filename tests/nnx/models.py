"""A module with everything that a call changes, and what tests make of it."""

from flax import nnx
import jax
import jax.numpy as jnp

import jaxlora
import jaxlora.nnx
from tests import helpers

KEY = jax.random.key(0)
CONFIG = jaxlora.LoraConfig(rank=2, targets=r"(up|down|layers/\d)/kernel", train=["norm/bias"])
X, Y = helpers.normal(0, (4, 5), jnp.float32), helpers.normal(1, (4, 3), jnp.float32)


class Net(nnx.Module):
  def __init__(self, rngs):
    self.up = nnx.Linear(5, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.drop = nnx.Dropout(0.5, rngs=rngs)
    self.layers = nnx.List([nnx.Linear(6, 6, rngs=rngs) for _ in range(2)])
    self.down = nnx.Linear(6, 3, rngs=rngs)

  def hidden(self, x):
    """What comes before the head."""
    h = self.drop(self.norm(self.up(x)))
    for layer in self.layers:
      h = jnp.tanh(layer(h))
    return h

  def __call__(self, x, *, scale=1.0):
    return self.down(self.hidden(x)) * scale


def adapted(net=None, config=CONFIG, **options):
  """An adapted module whose factors are no zeros."""
  model = jaxlora.nnx.adapt(Net(nnx.Rngs(0)) if net is None else net, config, KEY, **options)
  moved(model)
  return model


def moved(model):
  state = nnx.state(model, jaxlora.nnx.Trainable)
  nnx.update(model, jax.tree.map(lambda x: x + 0.1 * helpers.normal(x.size, x.shape, x.dtype), state))


def merged(model):
  return jaxlora.merge(jaxlora.nnx.to_tree(model))


def states_equal(left, right, *filters):
  left, right = (nnx.to_pure_dict(nnx.state(module, *filters)) for module in (left, right))
  helpers.assert_close(jax.tree.map(raw, left), jax.tree.map(raw, right), 1e-5)


def raw(leaf):
  return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
