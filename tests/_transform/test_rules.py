"""Rules on weights whose axes have one size: a rule that takes the wrong one is wrong in values, and not an error."""

import jax
from jax import lax
import jax.numpy as jnp
import pytest

from tests import helpers
from tests.helpers import one_weight

N = 4
CUBE = helpers.array(2, (3, N, N), jnp.float32)
MATRIX = helpers.array(3, (3, N), jnp.float32)


def product(w, x):
  """Of the first two axes."""
  return lax.dot_general(x, w, (((1, 2), (0, 1)), ((), ())))


LAYOUTS = {
  "transpose": lambda w, x: product(w.transpose(1, 0, 2), x),
  "reshape": lambda w, x: x.reshape(3, -1) @ w.reshape(N * N, N),
  "reversal": lambda w, x: product(lax.rev(w, (1,)), x),
  "slice": lambda w, x: product(w[1:, : N - 1, ::2], x[:, 1:, : N - 1]),
  "dynamic slice": lambda w, x: product(lax.dynamic_slice(w, (1, 0, 2), (N - 1, N - 1, 2)), x[:, 1:, 1:]),
  "split": lambda w, x: sum(product(part, x[:, k * 2 : k * 2 + 2]) * (k + 1) for k, part in enumerate(jnp.split(w, 2))),
  "broadcast": lambda w, x: jnp.einsum("bij,kijo->bko", x, jnp.broadcast_to(w, (2, N, N, N))),
  "squeeze": lambda w, x: product(w[None].squeeze(0), x),
}


@pytest.mark.parametrize("roles", ["iio", "oio", "sio"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name, roles):
  """Where the product contracts axes of two roles it is materialised, and right all the same."""
  tree = one_weight((N, N, N), axes={"w": roles})
  kept = "error" if roles == "iio" else "ignore"
  helpers.check(lambda p, x: LAYOUTS[name](p["w"], x), tree, (CUBE,), 1e-5, on_materialize=kept)


@pytest.mark.parametrize(
  "fn",
  [
    lambda w, x: jnp.tanh(x @ w) @ w.T,
    lambda w, x: w @ jnp.tanh(w @ x.T),
    lambda w, x: -(w * 0.5) @ x.T / 3,
    lambda w, x: jax.grad(lambda x: jnp.sum(jnp.tanh(x @ w)))(x),
  ],
  ids=["both ways", "on the left", "scaled", "backwards"],
)
def test_products_of_a_square(fn):
  helpers.check(lambda p, x: fn(p["w"], x), one_weight((N, N), axes={"w": "io"}), (MATRIX,), 1e-5)


def test_a_square_beside_an_activation_of_its_shape():
  """A square weight on the left, of an activation that is square, too: nothing but values tells the sides apart."""
  fn = lambda p, x: p["w"] @ jax.nn.silu(p["w"] @ x) + jax.nn.silu(x) @ p["w"]
  helpers.check(fn, one_weight((16, 16)), (helpers.array(3, (16, 16), jnp.float32),), 1e-5)


@pytest.mark.parametrize("fill", [0.0, 2.5])
@pytest.mark.parametrize("roles", ["io", "oi"])
def test_ids_out_of_bounds_have_the_users_fill(roles, fill):
  fn = lambda p, ids: jnp.take(p["w"], ids, axis=0, mode="fill", fill_value=fill)
  helpers.check(fn, one_weight((N, N), axes={"w": roles}), (jnp.array([0, N, 1, 2 * N]),), 1e-5)
