"""Trees of every kind of node, and what it is for two to be the same."""

import dataclasses
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from tests.helpers import array


class Pair(NamedTuple):
  left: Any
  right: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Block:
  kernel: Any
  inner: Any
  name: str = dataclasses.field(metadata={"static": True}, default="block")


def make_params():
  return {
    "block": Block(
      array(1, (6, 5), jnp.float32), [array(2, (5, 4), jnp.bfloat16), None, {"bias": array(3, (4,), jnp.float32)}]
    ),
    "pair": Pair(array(4, (3, 4, 5), jnp.float32), (array(5, (2, 3, 7), jnp.float32),)),
    "box": nn.Partitioned(array(6, (4, 5), jnp.float32), names=("a", "b")),
    "step": jnp.int32(3),
    "key": jax.random.key(5),
    "temperature": array(7, (), jnp.float32),
  }


CONFIG = jaxlora.LoraConfig(
  rank=2,
  alpha=3,
  targets=["kernel", "inner/0", "pair", "box"],
  axes={"pair/left": "sio", "pair/right/0": "iio"},
  train=["bias", "temperature"],
  scaling="rslora",
  overrides={
    "box": {"rank": 3, "alpha": 1.5, "dropout": 0.25, "dtype": "bfloat16"},
    "block/kernel": {"scaling": "standard"},
  },
)


def assert_same(got, want):
  """The same structure, static fields included, and the same bits."""
  got_leaves, got_def = jax.tree.flatten(got)
  want_leaves, want_def = jax.tree.flatten(want)
  assert got_def == want_def
  for x, y in zip(got_leaves, want_leaves, strict=True):
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
      x, y = jax.random.key_data(x), jax.random.key_data(y)
    assert (x.dtype, x.shape) == (y.dtype, y.shape)
    assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def matrix_tree(value=1.0, shape=(6, 4)):
  """A tree without a compilation: one adapted matrix with NumPy factors."""
  base = {"w": np.arange(np.prod(shape), dtype=np.float32).reshape(shape), "b": np.zeros(3, np.float32)}
  factors = {"a": np.full((2, shape[0]), value, np.float32), "b": np.full((2, shape[1]), value, np.float32)}
  return base, base | {"w": jaxlora.LoraWeight(base["w"], **factors, rank=2, alpha=2.0)}
