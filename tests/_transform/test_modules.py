"""Modules that are called: `wrap(model)(x)`, methods, partial applications, and what holds a module itself."""

import functools
import inspect

import equinox as eqx
from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

pytestmark = pytest.mark.usefixtures("lenient")
KEY = jax.random.key(0)
X = helpers.normal(0, (4, 5), jnp.float32)


class Eqx(eqx.Module):
  mlp: eqx.nn.MLP

  def __call__(self, x, *, scale=1.0):
    """The documentation of the call."""
    return self.mlp(x) * scale

  def twice(self, x):
    return self.mlp(x) * 2


class Nnx(nnx.Module):
  def __init__(self, rngs):
    self.up, self.norm, self.down = (
      nnx.Linear(5, 6, rngs=rngs),
      nnx.BatchNorm(6, rngs=rngs),
      nnx.Linear(6, 3, rngs=rngs),
    )

  def __call__(self, x, *, scale=1.0):
    """The documentation of the call."""
    return self.down(nnx.relu(self.norm(self.up(x)))) * scale

  def twice(self, x):
    return self(x) * 2


def equinox():
  return Eqx(eqx.nn.MLP(5, 3, 6, 1, key=KEY)), X[0]


def flax():
  model = Nnx(nnx.Rngs(0))
  model.eval()
  return model, X


def adapted(made, **fields):
  model, x = made()
  config = jaxlora.LoraConfig(rank=2, targets=lambda path, leaf: getattr(leaf, "ndim", 0) == 2, **fields)
  return helpers.trained(jaxlora.adapt(model, config, KEY, probe=lambda m: m(x))), x


@pytest.mark.parametrize("made", [equinox, flax])
def test_an_adapted_module_is_called(made):
  model, x = adapted(made)
  merged = jaxlora.merge(model)
  wrapped = jaxlora.wrap(model, on_materialize="error")
  helpers.assert_close(wrapped(x), merged(x), 1e-5)
  helpers.assert_close(wrapped(x, scale=2.0), merged(x, scale=2.0), 1e-5)
  helpers.assert_close(jax.jit(wrapped)(x), merged(x), 1e-5)
  assert wrapped.__doc__ == "The documentation of the call."
  assert list(inspect.signature(wrapped).parameters) == ["x", "scale"]
  assert not jaxlora.explain(model, x).materialized


@pytest.mark.parametrize("made", [equinox, flax])
def test_what_holds_a_module_is_called(made):
  model, x = adapted(made)
  merged = jaxlora.merge(model)
  helpers.assert_close(jaxlora.wrap(model.twice, on_materialize="error")(x), merged.twice(x), 1e-5)
  for partial in (functools.partial, jax.tree_util.Partial):
    bound = jaxlora.wrap(partial(lambda m, x, scale: m(x) * scale, model, scale=3.0), on_materialize="error")
    helpers.assert_close(bound(x), merged(x) * 3, 1e-5)
    helpers.assert_close(bound(x, scale=4.0), merged(x) * 4, 1e-5)


def test_equinox_wrappers_are_modules():
  model, x = adapted(equinox)
  want = jax.vmap(jaxlora.merge(model))(X)
  helpers.assert_close(jaxlora.wrap(eqx.filter_vmap(model), on_materialize="error")(X), want, 1e-5)
  helpers.assert_close(jax.vmap(jaxlora.wrap(model, on_materialize="error"))(X), want, 1e-5)
  helpers.assert_close(eqx.filter_jit(jaxlora.wrap(model, on_materialize="error"))(x), want[0], 1e-5)


@pytest.mark.parametrize("made", [equinox, flax])
def test_gradients_go_through_a_module_that_is_called(made):
  model, x = adapted(made)
  jit = jax.jit if made is flax else eqx.filter_jit
  got = jit(jaxlora.grad(lambda m: jnp.sum(jaxlora.wrap(m)(x) ** 2)))(model)
  want = jit(jaxlora.grad(lambda m: jnp.sum(jaxlora.merge(m)(x) ** 2)))(model)
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-4)


def test_an_nnx_module_is_called_as_it_is_then():
  """What the loop has changed in the module since it was wrapped is seen."""
  model, x = adapted(flax)
  wrapped = jaxlora.wrap(model)
  before = wrapped(x)
  model.down.bias.set_value(model.down.bias.get_value() + 1)
  helpers.assert_close(wrapped(x), before + 1, 1e-5)


def test_dropout_and_materialised_weights_of_a_module():
  model, x = adapted(flax, dropout=0.5)
  masks = [jaxlora.wrap(model, dropout_key=jax.random.key(k))(x) for k in range(2)]
  assert not np.allclose(*masks)
  with pytest.raises(jaxlora.MaterializeError, match="up/kernel"):
    jaxlora.wrap(functools.partial(lambda m, x: jnp.sum(jnp.sin(m.up.kernel[...])), model), on_materialize="error")(x)


@pytest.mark.parametrize("made", [equinox, flax])
def test_halves_and_bare_calls_say_what_to_do(made):
  model, x = adapted(made)
  for half in jaxlora.split(model):
    with pytest.raises(ValueError, match=r"missing: this is one half of a split tree\. Put the halves together"):
      jaxlora.wrap(half)(x)
  helpers.assert_close(jaxlora.wrap(jaxlora.join(*jaxlora.split(model)))(x), jaxlora.merge(model)(x), 1e-5)
  closed_over = jaxlora.wrap(lambda x: model(x))
  for call in (model, closed_over):
    with pytest.raises(TypeError, match=r"LoraWeight was used as an array.*fn itself, not closed over"):
      call(x)


@pytest.mark.parametrize("fn", [3, {"kernel": np.ones(3)}])
def test_what_cannot_be_called_is_refused(fn):
  with pytest.raises(TypeError, match=r"wrap: fn is .*, expected a function of trees"):
    jaxlora.wrap(fn)
