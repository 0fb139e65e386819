"""`merge` into narrow dtypes: what rounding takes of an update is told, and `dtype=` keeps it."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import adapted, array


def narrow(alpha, kind=jnp.bfloat16, **fields):
  return adapted({"w": array(1, (64, 48), jnp.float32).astype(kind)}, targets="w", alpha=alpha, **fields)


def exact(tree):
  node = tree["w"]
  a, b = (np.asarray(x, np.float64) for x in (node.a, node.b))
  return np.asarray(node.base, np.float64) + node.scale * np.einsum("ri,ro->io", a, b)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn])
@pytest.mark.parametrize("factors", [None, jnp.float32])
def test_a_small_update_that_is_rounded_away_is_told(dtype, factors):
  tree = narrow(1e-4, dtype, dtype=factors)
  want = exact(tree)
  with pytest.warns(jaxlora.RoundingWarning, match=r"in w \(\d+%\). Pass dtype=jnp.float32") as said:
    merged = jaxlora.merge(tree)["w"]
  assert merged.dtype == dtype
  update = np.linalg.norm(want - np.asarray(tree["w"].base, np.float64))
  lost = np.linalg.norm(np.asarray(merged, np.float64) - want) / update
  assert f"({lost:.0%})" in str(said[0].message)
  assert said[0].filename == __file__
  kept = jaxlora.merge(tree, dtype=jnp.float32)["w"]  # the remedy; warnings are errors here
  assert kept.dtype == jnp.float32
  assert np.linalg.norm(np.asarray(kept, np.float64) - want) < 1e-2 * update


def test_what_loses_little_or_nothing_says_nothing():
  jaxlora.merge(narrow(3))
  jaxlora.merge(narrow(1e-4, jnp.float32))
  jaxlora.merge(narrow(1e-4, seed=None))  # no update at all
  tree = adapted({"w": jnp.ones((4, 3), jnp.bfloat16), "b": jnp.ones(3, jnp.bfloat16)}, targets="w", train="b")
  assert {name: leaf.dtype for name, leaf in jaxlora.merge(tree, dtype=jnp.float32).items()} == {
    "w": jnp.float32,
    "b": jnp.float32,
  }
  assert jaxlora.merge({"w": tree["w"], "c": jnp.ones(3, jnp.bfloat16)}, dtype=jnp.float32)["c"].dtype == jnp.bfloat16


def test_merge_is_silent_where_values_are_traced():
  tree = narrow(1e-4)
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    inside = jax.jit(jaxlora.merge)(tree)["w"]
    jax.eval_shape(lambda t: jaxlora.merge(t, dtype=jnp.float32), tree)
    jax.vmap(jaxlora.merge)(jax.tree.map(lambda x: x[None], tree))
  with pytest.warns(jaxlora.RoundingWarning):
    assert np.mean(np.asarray(jaxlora.merge(tree)["w"] != inside)) < 1e-3


def test_sums_of_narrow_parts_are_formed_in_float32():
  tree = narrow(1.0, dtype=jnp.bfloat16)
  got, want = np.asarray(jaxlora.merge(tree)["w"], np.float64), exact(tree)
  assert np.all(np.abs(got - want) <= 2.0**-8 * np.abs(want) + 1e-6)  # rounded once


@pytest.mark.parametrize("fields", [{}, {"variant": "dora"}, {"train": ["bias"], "dtype": "bfloat16"}], ids=str)
def test_a_tree_that_a_compiled_function_closes_over_is_merged_inside(fields):
  """Its arrays are known there, and what is made of them is not."""
  tree = adapted(
    {"kernel": array(1, (6, 4), jnp.float32), "bias": array(2, (4,), jnp.float32)}, targets="kernel", **fields
  )
  inside = jax.jit(lambda: jaxlora.merge(tree))()
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), inside, jaxlora.merge(tree))
