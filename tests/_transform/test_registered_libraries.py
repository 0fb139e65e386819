"""`register_product` on the grouped products of libraries: megablox', which JAX brings, and tokamax's."""

import sys

import jax
from jax import lax
from jax.experimental.pallas.ops.tpu.megablox import gmm
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers
from tests.helpers.adapters import trained

SIZES = jnp.array([3, 0, 5], jnp.int32)


def megablox(x, w, sizes):
  """In interpret mode, as no TPU is here."""
  return gmm(x, w, sizes, jnp.float32, (8, 128, 128), interpret=True)


def tokamax(x, w, sizes):
  """The library's choice for this device."""
  return pytest.importorskip("tokamax", reason="tokamax is in the extra `interchange`").ragged_dot(x, w, sizes)


@pytest.mark.parametrize("kernel", [megablox, tokamax])
@pytest.mark.parametrize("thin", [None, lax.ragged_dot], ids=["own", "ragged_dot"])
def test_grouped_kernels_of_libraries_stay_factored(kernel, thin, monkeypatch):
  monkeypatch.setattr(sys, "argv", sys.argv[:1])  # tokamax reads it as its own flags
  with jax.numpy_dtype_promotion("standard"):  # megablox promotes
    check(kernel, thin)


def check(kernel, thin):
  key = jax.random.key(0)
  x, w = (jax.random.normal(key, shape) for shape in ((8, 128), (3, 128, 128)))
  product = jaxlora.register_product(kernel, "mk,gkn,g->mn", thin=thin, example=(x, w, SIZES))
  tree = trained(jaxlora.adapt({"w": w}, jaxlora.LoraConfig(rank=4, axes={"w": "sio"}), key))
  (use,) = jaxlora.explain(lambda p: product(x, p["w"], SIZES), tree).uses
  assert (use.factored, use.way) == (True, kernel.__name__)

  loss = lambda fn, tree: jnp.sum(jnp.sin(fn(tree, x) / 30))
  fn = jaxlora.wrap(lambda p, x: product(x, p["w"], SIZES))
  oracle = lambda tree, x: lax.ragged_dot(x, jaxlora.merge(tree)["w"], SIZES)
  helpers.assert_close(jax.jit(fn)(tree, x), oracle(tree, x), 1e-5)
  grads = [jax.jit(jaxlora.grad(lambda tree, fn=fn: loss(fn, tree)))(tree)["w"] for fn in (fn, oracle)]
  helpers.assert_close(grads[0].a, grads[1].a, 1e-5)
  helpers.assert_close(grads[0].b, grads[1].b, 1e-5)
