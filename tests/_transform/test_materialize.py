"""What cannot stay factored: never wrong, and never silent."""

import warnings

import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers
from tests.helpers import one_weight, square_weights

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


def use_whole(p, x):
  return x @ jnp.sin(p["w"])


def test_a_primitive_without_a_rule_materialises_and_warns_once_with_path_primitive_and_line():
  tree = one_weight()
  wrapped = jaxlora.wrap(use_whole)
  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    first = wrapped(tree, X)
  (warning,) = caught
  text = str(warning.message)
  assert text.startswith("w: base + A B was formed as one array at `sin`")
  assert "test_materialize.py" in text
  assert "use_whole" in text
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    second = jax.jit(wrapped)(tree, X)  # the same place: no second warning
  helpers.assert_close(first, use_whole(jaxlora.merge(tree), X), 1e-5)
  helpers.assert_close(second, first, 1e-5)


def test_materialising_can_be_forbidden_or_allowed():
  tree = one_weight()
  with pytest.raises(jaxlora.MaterializeError, match=r"w: base \+ A B was formed as one array at `sin`.*Exclude"):
    jaxlora.wrap(use_whole, on_materialize="error")(tree, X)
  helpers.check(use_whole, tree, (X,), 1e-5, on_materialize="ignore")


@jax.custom_jvp
def clipped(w):
  return jnp.clip(w, -0.5, 0.5)


@clipped.defjvp
def _(primals, tangents):
  return clipped(*primals), 3 * tangents[0]  # unlike the derivative of the body


@jax.custom_vjp
def quantised_product(x, w):
  return x @ jnp.round(w * 8) / 8


quantised_product.defvjp(
  lambda x, w: (quantised_product(x, w), (x, w)), lambda kept, g: (5 * g @ kept[1].T, 7 * kept[0].T @ g)
)


@pytest.mark.parametrize(
  "fn",
  [lambda p, x: x @ clipped(p["w"]), lambda p, x: quantised_product(x, p["w"]), lambda p, x: x @ jax.nn.relu(p["w"])],
  ids=["custom_jvp", "custom_vjp", "relu"],
)
def test_custom_derivative_rules_hold(fn):
  tree = one_weight()
  helpers.check(fn, tree, (X,), 1e-5, on_materialize="ignore")
  with pytest.raises(jaxlora.MaterializeError, match="derivative or batching rule of its own"):
    jaxlora.wrap(fn, on_materialize="error")(tree, X)


@pytest.mark.parametrize(
  ("fn", "why"),
  [
    (lambda p, x: x @ p["w"] @ p["w"].T @ p["w"], None),
    (lambda p, x: p["w"].T @ p["w"], "product of two adapted weights"),
    (lambda p, x: x[:1] * jnp.sum(p["w"] * 2), "no rule keeps a weight factored through `reduce_sum`"),
    (lambda p, x: jnp.einsum("bi,io->", x, p["w"]), "across roles|reduce_sum"),
    (lambda p, x: x @ p["w"].reshape(7, 5).T, "merges axes of different roles"),
    (lambda p, x: x @ p["w"].astype(jnp.int32).astype(jnp.float32), "a cast to int32"),
    (lambda p, x: p, "the function returns it"),
    (lambda p, x: lax.scan(lambda c, row: (c + row, row * 2), jnp.zeros(7), p["w"]), "factored through `add`"),
    (lambda p, x: lax.fori_loop(0, 3, lambda _, w: w * 2, p["w"]), "a loop carries it and changes it"),
    (lambda p, x: lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, p["w"]), "it leaves a branch as a result"),
    (lambda p, x: lax.scan(lambda c, _: (c, p["w"].T), 0.0, length=2)[1], "the function returns it"),
    (lambda p, x: jnp.where(x[0, 0] > 0, p["w"], 0.0), "select_n"),
    (lambda p, x: p["w"][jnp.array([0, 1]), jnp.array([2, 3])], "whole slices along one axis"),
    (lambda p, x: lax.conv_general_dilated(p["w"][None], x[:, :, None], (1,), "SAME"), "as its input"),
    (lambda p, x: 2.0 / p["w"], "not a scalar"),
    (lambda p, x: p["w"] * jnp.ones((1, 7)), "not a scalar"),
  ],
)
def test_what_cannot_stay_factored_is_still_right(fn, why):
  tree = one_weight()
  with jax.numpy_rank_promotion("allow"):
    wrapped = jaxlora.wrap(fn, on_materialize="ignore")
    helpers.assert_close(jax.jit(wrapped)(tree, X), jax.jit(helpers.oracle(fn))(tree, X), 1e-5)
    if why is None:
      assert not jaxlora.explain(fn, tree, X).materialized
    else:
      with pytest.raises(jaxlora.MaterializeError, match=why):
        jaxlora.wrap(fn, on_materialize="error")(tree, X)


def test_what_a_jitted_layer_materialises_is_said_of_every_weight():
  layer = jax.jit(lambda w, x: x @ jnp.sin(w))
  fn = lambda p, x: layer(p["layer_1"], layer(p["layer_0"], x))
  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    jaxlora.wrap(fn)(square_weights(2), X)
  assert [str(warning.message).split(":")[0] for warning in caught] == ["layer_0", "layer_1"]
  with pytest.raises(jaxlora.MaterializeError, match="layer_0"):
    jaxlora.wrap(fn, on_materialize="error")(square_weights(2), X)


def test_lines_inside_jitted_numpy_functions_are_the_users():
  """The line is part of what makes a place: two calls are two places, and both are told of."""

  def fn(p, x):
    first = jnp.clip(p["w"], -1, 1)
    second = jnp.clip(p["w"], -2, 2)
    return x @ first @ second.T

  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    jaxlora.wrap(fn)(one_weight(), X)
  lines = {str(warning.message).split("(")[1].split(")")[0] for warning in caught}
  assert len(lines) == 2
  assert all("test_materialize.py" in line for line in lines)


def test_kernels_that_are_concatenated_first_are_kernels():
  """Linen's OptimizedLSTMCell makes one kernel of its gates' before the product: all are adapted, and told of."""
  cell = nn.OptimizedLSTMCell(4)
  carry = (jnp.zeros((3, 4)), jnp.zeros((3, 4)))
  params = jax.jit(cell.init)(KEY, carry, X)["params"]
  fn = lambda p: cell.apply({"params": p}, carry, X)[1]
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY, probe=fn)
  assert {leaf.path for leaf in jaxlora.summary(tree).leaves} == {f"{s}{g}/kernel" for s in "ih" for g in "figo"}
  assert {use.path for use in jaxlora.explain(fn, tree).materialized} == {
    f"{s}{g}/kernel" for s in "ih" for g in "figo"
  }
