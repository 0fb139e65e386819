"""One jitted layer for many weights is traced and lowered once."""

import re

import jax
import jax.numpy as jnp

import jaxlora
from tests import helpers
from tests.helpers import square_weights

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


def test_a_jitted_layer_stays_one_function():
  @jax.jit
  def block(w, x):
    return jnp.tanh(x @ w)

  def fn(p, x):
    for w in p.values():
      x = block(w, x)
    return x

  tree = square_weights(6)
  helpers.check(fn, tree, (X,), 1e-5)
  texts = [jax.jit(jaxlora.wrap(fn)).lower(square_weights(count), X).as_text() for count in (2, 6)]
  assert texts[0].count("func.func") == texts[1].count("func.func")
  assert len(re.findall(r"func\.func private @block\w*\(", texts[1])) == 1
  assert [use.path for use in jaxlora.explain(fn, tree, X).uses] == list(tree)


def test_jitted_functions_of_one_name_are_told_apart():
  """Of one name, on operands of one type, and once with the weights the other way round."""
  first, second = jax.jit(lambda w, x: jnp.tanh(x @ w)), jax.jit(lambda w, x: jnp.sin(x @ w.T))

  def fn(p, x):
    return second(p["layer_1"], first(p["layer_0"], x)), first(p["layer_1"], second(p["layer_0"], x))

  helpers.check(fn, square_weights(2), (X,), 1e-5)
