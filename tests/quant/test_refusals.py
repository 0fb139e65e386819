"""What cannot be quantised, or is not what it says: errors that name the leaf, and remedies that work."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora

KEY = jax.random.key(0)
PARAMS = {
  "dense": {"kernel": jax.device_put(np.ones((64, 8), np.float32)), "bias": jax.device_put(np.zeros(8, np.float32))},
  "ids": jax.device_put(np.arange(6, dtype=np.int32).reshape(2, 3)),
}
STACK = {"w": jax.device_put(np.ones((3, 64, 8), np.float32))}


def refused(match, *args, **options):
  with pytest.raises(ValueError, match=match):
    jaxlora.quantize(*args, **options)


def test_arguments():
  refused(r"format is 'nf5', expected one of 'nf4', 'int8', 'int4', 'q4_0', 'fp8'\.", PARAMS, "nf5")
  refused(r"format is 'dynamic8'", PARAMS, "dynamic8")
  for size in (0, -1, 2.5, True):
    refused("quantize: block_size is", PARAMS, "nf4", block_size=size)
  refused("the tree has no leaves", {}, "nf4")
  refused(r"LoraConfig.targets: .*'dens'", PARAMS, "nf4", targets=["dens"])


def test_leaves_that_are_no_matrices_of_floats():
  two_axes = r"quantize: dense/bias: shape \(8,\), expected two axes or more.*Leave it out \(exclude='dense/bias'\)"
  refused(two_axes, PARAMS, "nf4", targets=".*")
  floats = r"quantize: ids: dtype int32, expected a real floating dtype\. Leave it out \(exclude='ids'\)"
  refused(floats, PARAMS, "nf4", targets=".*", exclude="dense/bias")
  refused(r"w: shape \(0, 3\)", {"w": jnp.zeros((0, 3))}, "nf4", targets="w")
  refused(r"w: dtype complex64", {"w": jnp.zeros((4, 3), jnp.complex64)}, "nf4", targets="w")
  tree = jaxlora.quantize(PARAMS, "nf4", targets=".*", exclude="ids|dense/bias")
  assert tree["ids"] is PARAMS["ids"]


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_values_that_are_not_finite(value):
  params = {**PARAMS, "other": {"kernel": PARAMS["dense"]["kernel"].at[3, 2].set(value)}}
  refused(r"other/kernel: found NaN or infinite values .*exclude=", params, "int8")
  assert jaxlora.quantize(params, "int8", exclude="other/kernel")["other"] is not None


def test_values_that_single_precision_cannot_hold(x64):
  refused("w: found NaN or infinite values", {"w": jnp.full((4, 4), 1e300)}, "nf4", targets="w")


def test_quantising_twice():
  once = jaxlora.quantize(PARAMS, "nf4")
  refused(
    r"dense/kernel is quantised already: QuantizedArray\(64x8 float32 as nf4.*exclude='dense/kernel'", once, "int8"
  )
  other = jaxlora.quantize(jaxlora.dequantize(once), "int8")  # the remedies
  assert other["dense"]["kernel"].format == "int8"
  more = {**once, "more": {"kernel": jnp.ones((64, 4))}}
  assert jaxlora.quantize(more, "int8", exclude="dense/kernel")["more"]["kernel"].format == "int8"


def test_adapted_trees():
  tree = jaxlora.adapt(PARAMS, jaxlora.LoraConfig(rank=2, targets="dense/kernel"), KEY)
  refused(r"dense/kernel is adapted already. Quantise first.*jaxlora.strip.*jaxlora.merge", tree, "nf4")
  for plain in (jaxlora.strip(tree), jaxlora.merge(tree)):
    assert jaxlora.quantize(plain, "nf4")["dense"]["kernel"].format == "nf4"


def test_kernels_of_which_nothing_tells_the_roles():
  refused(r"w: shape \(3, 64, 8\) has 3 axes.*axes=\{'w': .*probe=", STACK, "nf4", targets="w")
  refused(r"axes: 'io' has 2 letters for w", STACK, "nf4", targets="w", axes={"w": "io"})
  assert jaxlora.quantize(STACK, "nf4", targets="w", axes={"w": "sio"})["w"].block == (1, 64, 1)
  probe = lambda p: jnp.einsum("sbi,sio->sbo", jnp.ones((3, 2, 64)), p["w"])
  assert jaxlora.quantize(STACK, "nf4", targets="w", probe=probe)["w"].block == (1, 64, 1)


BROKEN = {
  "codes of another dtype": (lambda q: {"codes": q.codes.astype(jnp.uint8)}, "codes of uint8, expected uint4 for"),
  "codes of another size": (lambda q: {"codes": q.codes[:, :5]}, r"scales of shape \(1, 8\), expected as many axes"),
  "scales of fewer axes": (lambda q: {"scales": q.scales[0]}, r"scales of shape \(8,\), expected as many axes"),
  "scales that do not divide": (lambda q: {"scales": jnp.ones((3, 8))}, r"scales of shape \(3, 8\)"),
  "no scales": (lambda q: {"scales": None}, r"scales of nothing"),
  "an unknown format": (lambda q: {"format": "nf5"}, r"format 'nf5', expected one of"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit(case):
  change, match = BROKEN[case]
  whole = jaxlora.quantize(PARAMS, "nf4", double=False)
  broken = whole["dense"]["kernel"].with_parts(change(whole["dense"]["kernel"]))
  tree = {**whole, "dense": {**whole["dense"], "kernel": broken}}
  with pytest.raises(ValueError, match=f"dense/kernel: {match}.*jaxlora.quantize"):
    jaxlora.wrap(lambda p, x: x @ p["dense"]["kernel"])(tree, jnp.ones((2, 64)))
  with pytest.raises(ValueError, match=f"adapt: dense/kernel: {match}"):
    jaxlora.adapt(tree, jaxlora.LoraConfig(rank=2), KEY)


def test_codes_of_another_size_than_the_factors():
  tree = jaxlora.adapt(jaxlora.quantize(PARAMS, "nf4", targets=["dense"]), jaxlora.LoraConfig(rank=2), KEY)
  node = tree["dense"]["kernel"]
  other = jaxlora.quantize({"kernel": jnp.ones((128, 8))}, "nf4")["kernel"]
  tree = {**tree, "dense": {**tree["dense"], "kernel": node.with_parts({"base": other})}}
  with pytest.raises(ValueError, match=r"dense/kernel: factor a has shape \(2, 64\), expected \(2, 128\)"):
    jaxlora.wrap(lambda p, x: x @ p["dense"]["kernel"])(tree, jnp.ones((2, 128)))


def test_a_quantised_leaf_is_no_array():
  leaf = jaxlora.quantize(PARAMS, "nf4")["dense"]["kernel"]
  with pytest.raises(TypeError, match=r"QuantizedArray was used as an array.*jaxlora.wrap.*jaxlora.dequantize\(tree\)"):
    jnp.ones((2, 64)) @ leaf
  assert jnp.dot(jnp.ones((2, 64)), jaxlora.dequantize(leaf)).shape == (2, 8)


class Unregistered:
  """What JAX takes for a leaf."""

  shape, dtype, ndim = (64, 8), jnp.dtype(jnp.float32), 2

  def __init__(self, codes):
    self.codes = codes

  def dequantize(self):
    return self.codes / 2


def test_nodes_that_jax_does_not_know():
  tree = {"w": Unregistered(jnp.ones((64, 8)))}
  for call in (
    lambda tree: jaxlora.wrap(lambda p, x: x @ p["w"])(tree, jnp.ones((2, 64))),
    lambda tree: jaxlora.adapt(tree, jaxlora.LoraConfig(rank=2, targets="w"), KEY),
  ):
    with pytest.raises(ValueError, match=r"w: found a Unregistered, .*is no pytree node.*register_pytree_node"):
      call(tree)

  class Registered(Unregistered):
    pass

  jax.tree_util.register_pytree_node(
    Registered, lambda node: ((node.codes,), None), lambda _, parts: Registered(*parts)
  )
  tree = {"w": Registered(jnp.ones((64, 8)))}
  assert jaxlora.wrap(lambda p, x: x @ p["w"])(tree, jnp.ones((2, 64)))[0, 0] == 32
  assert jaxlora.adapt(tree, jaxlora.LoraConfig(rank=2, targets="w"), KEY)["w"].rank == 2
