"""Parameters of which only shapes and dtypes are known: what is made of them, and what is refused."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from tests import helpers

KEY = jax.random.key(0)
PARAMS = {
  "body": helpers.array(1, (6, 6), jnp.float32),
  "head": {"kernel": helpers.array(2, (6, 4), jnp.bfloat16), "bias": helpers.array(3, (4,), jnp.float32)},
}
ABSTRACT = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), PARAMS)
FIELDS = {
  "lora": {},
  "train": {"train": ["bias"]},
  "factors": {"dtype": "float16", "dropout": 0.1},
  "own init": {"init": lambda key, shape, dtype, fan_in, rank: jnp.ones(shape, dtype)},
  **{variant: {"variant": variant} for variant in ("dora", "dora_exact", "lora_fa", "vera", "adalora", "loha", "lokr")},
  **{init: {"init": init} for init in ("pissa", "pissa_niter_2", "olora", "orthogonal", "gaussian")},
}


def network(p, x):
  return jnp.tanh(x @ p["body"]) @ p["head"]["kernel"].astype(jnp.float32) + p["head"]["bias"][None]


@pytest.mark.parametrize("name", FIELDS)
def test_a_tree_of_shapes_is_that_of_the_arrays(name, lenient):
  """Structure, shapes and dtypes are the same; so are the values of parts that are made of none."""
  config = jaxlora.LoraConfig(rank=2, **({"targets": "body|head/kernel"} | FIELDS[name]))
  tree, real = jaxlora.adapt(ABSTRACT, config, KEY), jaxlora.adapt(PARAMS, config, KEY)
  assert jax.tree.structure(tree) == jax.tree.structure(real)
  for got, want in zip(jax.tree.leaves(tree), jax.tree.leaves(real), strict=True):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    if isinstance(got, jax.Array):
      np.testing.assert_array_equal(got, want)
  assert str(jaxlora.summary(tree)) == str(jaxlora.summary(real))
  again = jaxlora.join(*jaxlora.split(tree))
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  assert all(x is y for x, y in zip(jax.tree.leaves(again), jax.tree.leaves(tree), strict=True))
  x = jax.ShapeDtypeStruct((3, 6), jnp.float32)
  assert jax.eval_shape(jaxlora.wrap(network), tree, x).shape == (3, 4)
  assert jax.jit(jaxlora.wrap(network)).lower(tree, x).out_info.shape == (3, 4)
  chex.assert_trees_all_equal_shapes_and_dtypes(
    jax.eval_shape(jaxlora.optimizer(optax.adam(1.0)).init, tree), jaxlora.optimizer(optax.adam(1.0)).init(real)
  )
  chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(jaxlora.merge, tree), PARAMS)


def test_factors_that_need_no_values_are_made():
  tree = jaxlora.adapt(ABSTRACT, jaxlora.LoraConfig(rank=2, targets=["body"], train=["bias"]), KEY)
  assert isinstance(tree["body"].a, jax.Array)
  assert tree["head"]["bias"].value == ABSTRACT["head"]["bias"]


def test_what_looks_at_values_is_refused_and_the_remedy_works():
  def looks(key, shape, dtype, fan_in, rank):
    return jnp.full(shape, float(jnp.zeros(()) + fan_in), dtype)

  config = jaxlora.LoraConfig(rank=2, targets=["body"], init=looks, variant="dora")
  with pytest.raises(
    ValueError, match=r"body: found a shape and a dtype, expected an array.*Adapt once the weights are"
  ):
    jaxlora.adapt(ABSTRACT, config, KEY)
  assert jaxlora.adapt(PARAMS, config, KEY)["body"].a.shape == (2, 6)


@pytest.mark.parametrize(
  "call", [jaxlora.merge, jaxlora.wrap(lambda p: jnp.ones((2, 6)) @ p["body"])], ids=["merge", "wrap"]
)
def test_shapes_are_no_values(call):
  tree = jaxlora.adapt(ABSTRACT, jaxlora.LoraConfig(rank=2, targets=["body"], variant="dora"), KEY)
  with pytest.raises(ValueError, match=r"body: found no values but only a shape and a dtype in base, a, b.*eval_shape"):
    call(tree)
  jax.eval_shape(jaxlora.wrap(lambda p: jnp.ones((2, 6)) @ p["body"]), tree)  # both remedies
  call(jaxlora.adapt({"body": PARAMS["body"]}, jaxlora.LoraConfig(rank=2, targets="body", variant="dora"), KEY))
