"""Routers and experts: what `"all-linear"` adapts of a mixture of experts, and what it leaves out."""

import warnings

from flax.traverse_util import unflatten_dict
import jax
from jax import lax
import jax.numpy as jnp
import pytest

import jaxlora
from tests.helpers import array

KEY = jax.random.key(0)
X = array(9, (3, 8), jnp.float32)


def matrix(*shape):
  return array(1, shape, jnp.float32)


def roles(tree):
  return {leaf.path: leaf.roles for leaf in jaxlora.summary(tree).leaves}


def by_argmax(scores):
  return jnp.bincount(scores.argmax(-1), length=4)


def by_top_k(scores):
  return jnp.bincount(lax.top_k(scores, 1)[1][:, 0], length=4)


def by_order(scores):
  return jnp.bincount(jnp.argsort(-scores.reshape(-1, 2, 2).reshape(-1, 4))[:, 0], length=4)


def by_threshold(scores):
  """No choice: the groups are as large as the scores say."""
  return (scores > 0.2).sum(0)


@pytest.mark.parametrize("sizes_of", [by_argmax, by_top_k, by_order, by_threshold])
def test_all_linear_adapts_experts_and_says_that_it_leaves_out_their_router(sizes_of):
  def experts(p, x):
    sizes = sizes_of(jax.nn.softmax(jnp.tanh(x @ p["in"]) @ p["choice"] + p["bias"]))
    return lax.ragged_dot(jax.nn.silu(lax.ragged_dot(x, p["wi"], sizes)), p["wo"], sizes) @ p["out"] @ p["head"]

  square = {name: matrix(8, 8) for name in ("in", "out", "head")}
  params = square | {"choice": matrix(8, 4), "bias": jnp.ones((1, 4)), "wi": matrix(4, 8, 6), "wo": matrix(4, 6, 8)}
  adapt = lambda **fields: jaxlora.adapt(
    params, jaxlora.LoraConfig(rank=2, **fields), KEY, probe=lambda p: experts(p, X)
  )
  with pytest.warns(UserWarning, match="'all-linear' leaves out choice: .*a router") as warned:
    tree = adapt()
  assert len(warned) == 1
  assert warned[0].filename == __file__
  assert roles(tree) == {"in": "io", "out": "io", "wi": "sio", "wo": "sio"}
  with warnings.catch_warnings(action="error"):  # both remedies
    assert roles(adapt(exclude=["choice"])) == roles(tree)
    assert roles(adapt(targets=["choice", "wi"])) == {"choice": "io", "wi": "sio"}


@pytest.mark.parametrize(
  ("names", "router"),
  [
    (("mlp/router/kernel", "mlp/up/kernel"), "mlp/router/kernel"),
    (("mlp/gate/kernel", "mlp/experts/up/kernel"), "mlp/gate/kernel"),
    (("MoeBlock_0/gate/kernel", "mlp/up/kernel"), "MoeBlock_0/gate/kernel"),
    (("mlp/gate/kernel", "mlp/up/kernel"), None),
    (("mlp/gate_proj/kernel", "mlp/experts/up/kernel"), None),
    (("router/kernel",), None),
  ],
)
def test_without_a_probe_names_tell_routers(names, router):
  with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    tree = jaxlora.adapt(
      unflatten_dict({name: matrix(8, 6) for name in names}, sep="/"), jaxlora.LoraConfig(rank=2), KEY
    )
  assert {*roles(tree)} == {*names} - {router}
  assert [str(w.message).split(": what")[0].split("leaves out ")[1] for w in warned] == ([router] if router else [])
