"""The nodes themselves: made from factors, and shown in one line."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import LoraWeight
from tests.helpers import adapted, array

BASE = jnp.zeros((6, 5))


def test_from_factors_reads_the_rank_and_has_scale_one():
  a, b = array(1, (3, 6), jnp.float32), array(2, (3, 5), jnp.float32)
  weight = LoraWeight.from_factors(BASE, a, b, "io")
  assert (weight.rank, weight.scale, weight.variant, weight.dropout, weight.extra) == (3, 1, "lora", 0, {})
  np.testing.assert_allclose(weight.materialize(), a.T @ b, rtol=1e-5)
  assert jax.tree.structure(weight) == jax.tree.structure(LoraWeight(BASE, a, b, rank=3, alpha=3.0))


@pytest.mark.parametrize(
  ("roles", "shape", "a", "b"),
  [
    ("sio", (2, 6, 5), (2, 3, 6), (2, 3, 5)),
    ("iso", (6, 2, 5), (2, 3, 6), (2, 3, 5)),
    ("iioo", (1, 2, 3, 4), (3, 1, 2), (3, 3, 4)),
  ],
)
def test_the_rank_is_behind_the_stacked_axes(roles, shape, a, b):
  assert LoraWeight.from_factors(jnp.zeros(shape), jnp.zeros(a), jnp.zeros(b), roles).rank == 3
  abstract = [jax.ShapeDtypeStruct(x, jnp.float32) for x in (shape, a, b)]
  assert LoraWeight.from_factors(*abstract, roles).rank == 3


def test_from_factors_with_a_scale_and_what_a_variant_adds():
  a, b = jnp.ones((4, 6)), jnp.ones((4, 5))
  make = lambda **fields: LoraWeight.from_factors(BASE, a, b, **fields)
  assert make(alpha=2.0).scale == 0.5
  assert make(alpha=2.0, scaling="rslora").scale == 1
  assert (make(scaling="rslora").scale, make(scaling="rslora").alpha) == (1, math.sqrt(4))
  ones = jnp.ones((1, 5))
  dora = make(variant="dora", dropout=0.1, magnitude=ones, norm=ones)
  assert dora.extra == {"magnitude": ones, "norm": ones}
  assert dora.dropout == 0.1


def test_from_factors_of_two_ranks():
  with pytest.raises(ValueError, match=r"a has shape \(2, 6\) and b \(3, 5\); expected one rank"):
    LoraWeight.from_factors(BASE, jnp.ones((2, 6)), jnp.ones((3, 5)), "io")


# ----------------------------------------------------------------------------------------------------------------------
# One line.


def tree(dtype=jnp.bfloat16, **fields):
  params = {"w": jnp.zeros((16, 32), dtype), "bias": jnp.zeros(16), "temperature": jnp.zeros(())}
  return adapted(params, **{"rank": 4, "targets": "w", "train": ["bias", "temperature"]} | fields)


def test_what_is_at_its_default_is_not_said():
  nodes = tree()
  assert repr(nodes["w"]) == "LoraWeight(16x32 io, rank 4, bf16)"
  assert repr(nodes["bias"]) == "FullWeight(16, f32)"
  assert repr(nodes["temperature"]) == "FullWeight(scalar, f32)"
  assert "\n" not in repr(nodes)
  assert repr(jax.tree.map(lambda leaf: np.ndarray, nodes)["w"]).startswith("LoraWeight(?x? io, rank 4")


def test_what_is_not_is():
  node = tree(alpha=6.0, dropout=0.1, variant="dora", dtype=jnp.float32)["w"]
  assert repr(node) == "LoraWeight(16x32 io, rank 4, f32, dora, scale 1.5, dropout 0.1)"
  narrow = adapted({"w": jnp.zeros((16, 32), jnp.bfloat16)}, rank=4, dtype="float32")["w"]
  assert repr(narrow) == "LoraWeight(16x32 io, rank 4, bf16, f32 factors)"
  rslora = tree(scaling="rslora", alpha=2.0)["w"]
  assert repr(rslora) == "LoraWeight(16x32 io, rank 4, bf16)"


def test_halves():
  frozen, trainable = jaxlora.split(tree())
  assert repr(frozen["w"]) == "LoraWeight(16x32 io, rank 4, bf16, without a/b)"
  assert repr(trainable["w"]) == "LoraWeight(16x32 io, rank 4, bf16, without base)"
  assert repr(frozen["bias"]) == "FullWeight(16, f32, without value)"
  assert repr(trainable["bias"]) == "FullWeight(16, f32, without base)"
  assert repr(jaxlora.split(tree(variant="lora_fa"))[1]["w"]) == (
    "LoraWeight(?x32 io, rank 4, bf16, lora_fa, without base/a)"
  )
  nothing = jax.tree.map(lambda x: None, trainable)
  assert repr(nothing["w"]) == "LoraWeight(?x? io, rank 4, without base/a/b)"
  assert repr(nothing["bias"]) == "FullWeight(?, without base/value)"


def test_types_tracers_and_labels_in_the_places_of_arrays():
  want = "LoraWeight(16x32 io, rank 4, bf16)"
  seen = []
  assert repr(jax.eval_shape(lambda tree: tree, tree())["w"]) == want
  jax.jit(lambda tree: seen.append(repr(tree["w"])))(tree())
  jax.jit(jax.vmap(lambda tree: seen.append(repr(tree["w"]))))(jax.tree.map(lambda x: x[None], tree()))
  assert seen == [want, want]
  assert repr(jaxlora.labels(tree())["w"]) == "LoraWeight(?x? io, rank 4, base='frozen', a='a', b='b')"
  assert repr(jaxlora.mask(tree())["bias"]) == "FullWeight(?, base=False, value=True)"


@pytest.mark.parametrize(
  ("dtype", "name"),
  [
    (jnp.float32, "f32"),
    (jnp.bfloat16, "bf16"),
    (jnp.float16, "f16"),
    (jnp.float8_e4m3fn, "f8_e4m3fn"),
    (jnp.int8, "i8"),
  ],
)
def test_dtypes(dtype, name):
  assert repr(jaxlora.FullWeight(jnp.zeros(3, dtype), jnp.zeros(3, dtype))) == f"FullWeight(3, {name})"
