"""What the user asked of an equation holds for those that take its place: precision, policies, dtypes."""

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._jax.control_flow import Remat, structure
from tests import helpers
from tests.helpers import one_weight

KEY = jax.random.key(0)
X = helpers.array(2, (3, 5), jnp.float32)


def traced_equations(fn):
  return helpers.traced(jaxlora.wrap(fn, on_materialize="error"), one_weight((5, 5)), X)


def test_precision_holds_for_the_low_rank_products():
  highest = lax.Precision.HIGHEST
  dots = [e for e in traced_equations(lambda p, x: jnp.dot(x, p["w"], precision=highest)) if "dot" in e.primitive.name]
  assert len(dots) >= 2  # the second thin one may be a sum, which is exact
  assert all(eqn.params["precision"] == (highest, highest) for eqn in dots)


def test_the_policy_of_a_remat_holds():
  policy = jax.checkpoint_policies.dots_saveable
  fn = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]), policy=policy, prevent_cse=False)
  (remat,) = [found for eqn in traced_equations(fn) if isinstance(found := structure(eqn), Remat)]
  assert remat.policy is policy
  assert remat.prevent_cse is False


def test_unroll_and_reverse_of_a_scan_hold():
  def fn(p, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=6, unroll=3, reverse=True)[0]

  (scan,) = [eqn for eqn in traced_equations(fn) if eqn.primitive.name == "scan"]
  assert (scan.params["unroll"], scan.params["reverse"], scan.params["length"]) == (3, True, 6)


def test_a_remat_of_a_gradient_keeps_its_barrier():
  def fn(p, x):
    inner = jax.checkpoint(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))
    return jax.grad(lambda x: inner(x))(x)

  tree = one_weight()
  lowered = [jax.jit(f).lower(t, X).as_text() for f, t in ((fn, jaxlora.merge(tree)), (jaxlora.wrap(fn), tree))]
  assert [text.count("optimization_barrier") > 0 for text in lowered] == [True, True]


@pytest.mark.parametrize("kind", ["dot", "conv"])
def test_the_update_has_the_products_own_precision(kind):
  """float16 in, float32 out: 4096 terms of 20 do not fit into the first, and the base product says so by its dtype."""
  n, options = 4096, {"preferred_element_type": jnp.float32}
  x = jnp.full((1, 2, n), 20.0, jnp.float16)
  if kind == "dot":
    fn, roles, shape = lambda p, x: jnp.matmul(x, p["w"], **options), "io", (n, 3)
  else:
    numbers = ("NHC", "HIO", "NHC")
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers, **options)
    roles, shape = "iio", (1, n, 3)
  a, b = jnp.ones((1, *shape[:-1]), jnp.float16), jnp.full((1, 3), 1e-3, jnp.float16)
  weight = jaxlora.LoraWeight(jnp.zeros(shape, jnp.float16), a, b, roles=roles, rank=1, alpha=1.0)
  out = jaxlora.wrap(fn, on_materialize="error")({"w": weight}, x)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, 20 * n * float(b[0, 0]) * np.ones_like(out), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_factors_beside_a_base_of_eight_bits_keep_their_own(dtype):
  base = helpers.array(1, (6, 5), jnp.float32).astype(dtype)
  tree = helpers.adapted({"w": base}, rank=2, targets="w", dtype="float32")
  fn = lambda p, x: x @ p["w"].astype(jnp.float32)
  x, w = helpers.array(2, (3, 6), jnp.float32), tree["w"]
  want = x @ (base.astype(jnp.float32) + w.scale * w.a.T @ w.b)
  helpers.assert_close(jaxlora.wrap(fn, on_materialize="error")(tree, x), want, 1e-5)
