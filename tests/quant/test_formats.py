"""Formats: what codes and scales are, and what they stand for."""

from pathlib import Path

import hypothesis
from hypothesis import strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._quant.again import encoded_as
from jaxlora._quant.blocks import block_shape
from tests.helpers import profiles

KEY = jax.random.key(0)
FORMATS = ("nf4", "int8", "int4", "q4_0", "fp8")
RECORDED = Path(__file__).parent / "bitsandbytes_0_50_2.npz"
# Of a Gaussian matrix, blocks of 64: `||W - W'|| / ||W||`.
ERRORS = {"nf4": 0.093, "int8": 0.0065, "int4": 0.110, "q4_0": 0.097, "fp8": 0.027}


def one(weight, format="nf4", **options):
  """A matrix (in, out) in codes."""
  return jaxlora.quantize({"w": weight}, format, **{"targets": "w", "axes": {"w": "io"}} | options)["w"]


formed = jax.jit(lambda node: node.dequantize())


def error(weight, quantised):
  return float(jnp.linalg.norm((quantised.dequantize() - weight).astype(jnp.float32)) / jnp.linalg.norm(weight))


def test_nf4_is_what_bitsandbytes_makes():
  """Torch's weight is (out, in); the even element of a pair is in the high half of a byte."""
  recorded = np.load(RECORDED)
  found = one(jnp.asarray(recorded["weight"].T), double=False)
  codes = np.asarray(found.codes).astype(np.uint8).T.reshape(-1)
  np.testing.assert_array_equal((codes[::2] << 4) | codes[1::2], recorded["packed"])
  np.testing.assert_array_equal(np.asarray(found.scales).T.reshape(-1), recorded["absmax"])
  double = one(jnp.asarray(recorded["weight"].T), double=True)
  np.testing.assert_array_equal(double.codes, found.codes)
  np.testing.assert_allclose(np.asarray(double.scales.offset).reshape(-1), recorded["offset"], rtol=1e-6)
  np.testing.assert_allclose(np.asarray(double.scales.scales).reshape(-1), recorded["nested_absmax"], rtol=1e-6)
  second = (
    np.asarray(double.scales.codes).T.reshape(-1).astype(int) - recorded["nested"]
  )  # its kernel is not the nearest
  assert np.abs(second).max() <= 1
  assert (second != 0).mean() < 0.05


@pytest.mark.parametrize("format", FORMATS)
def test_errors_and_sizes(format):
  weight = jax.random.normal(KEY, (256, 192))
  tree, report = jaxlora.quantize_with_report({"kernel": weight}, format)
  (leaf,) = report.leaves
  assert 0.5 * ERRORS[format] < leaf.error < ERRORS[format]
  assert leaf.error == pytest.approx(error(weight, tree["kernel"]), rel=1e-5)
  code_bits = 8 if format in ("int8", "fp8") else 4
  assert code_bits + 0.125 < leaf.bits < code_bits + 0.14
  assert report.bytes_after == round(leaf.bits * weight.size / 8)
  assert report.bytes_before == 4 * weight.size
  for word in ("kernel", "256 x 192", format, "192.0 KiB before"):
    assert word in str(report)


def test_sizes_that_were_asked_for():
  """NF4 with double quantisation at most 0.52 bytes a parameter, int8 with a scale for each output at most 1.01."""
  weight = jax.random.normal(KEY, (1024, 256))
  sizes = [("nf4", {}, 0.52), ("nf4", {"double": False}, 0.5625), ("int8", {"block_size": None, "double": False}, 1.01)]
  for format, options, most in sizes:
    _, report = jaxlora.quantize_with_report({"kernel": weight}, format, **options)
    assert report.leaves[0].bits / 8 <= most
  assert one(weight, "int8", block_size=None).block == (1024, 1)


@pytest.mark.parametrize(("format", "double"), profiles.alternating(FORMATS, [False, True]))
def test_blocks_of_zeros_are_zeros_and_what_is_representable_stays(format, double):
  weight = jax.random.normal(KEY, (128, 6)).at[:64, 2].set(0)
  found = one(weight, format, double=double)
  values = found.dequantize()
  assert bool(jnp.isfinite(values).all())
  if not double:  # the scale of a block of zeros is 0; as a code it is that of the nearest value
    np.testing.assert_array_equal(values[:64, 2], 0)
    again = one(values, format, double=False).dequantize()
    np.testing.assert_allclose(again, values, rtol=1e-6)
  all_zero = one(jnp.zeros((64, 4)), format, double=double)
  np.testing.assert_array_equal(all_zero.dequantize(), 0)


@pytest.mark.parametrize(
  ("shape", "axes", "size", "block"),
  [
    ((128, 32), (0,), 64, (64, 1)),
    ((96, 32), (0,), 64, (48, 1)),
    ((7, 32), (0,), 64, (7, 1)),
    ((67, 32), (0,), 64, (67, 1)),
    ((134, 3), (0,), 64, (67, 1)),
    ((8, 16, 32), (1, 0), 64, (4, 16, 1)),
    ((3, 3, 128, 5), (2, 1, 0), 64, (1, 1, 64, 1)),
    ((128, 32), (0,), None, (128, 1)),
    ((16, 50257), (0, 1), 256, (16, 29)),
    ((64, 1), (0,), 1, (1, 1)),
  ],
)
def test_blocks_are_divisors(shape, axes, size, block):
  assert block_shape(shape, axes, size) == block


ROLES = ("io", "oi", "ioo", "iio", "sio", "siio", "ssio", "iiio")


@hypothesis.given(
  roles=st.sampled_from(ROLES),
  sizes=st.lists(st.sampled_from([1, 2, 3, 5, 8, 12, 20]), min_size=4, max_size=4),
  format=st.sampled_from(FORMATS),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float16]),
  size=st.sampled_from([1, 4, 7, 64, None]),
  double=st.booleans(),
)
@hypothesis.settings(max_examples=profiles.count(4, 300), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
def test_any_shape_and_dtype(roles, sizes, format, dtype, size, double):
  """Values are near, blocks divide, and a slice of every part along a stack is that slice."""
  shape = tuple(sizes[: len(roles)])
  weight = jax.random.normal(KEY, shape, dtype)
  found = jaxlora.quantize({"w": weight}, format, targets="w", axes={"w": roles}, block_size=size, double=double)["w"]
  assert (found.shape, found.dtype, found.ndim, found.size) == (shape, dtype, len(shape), weight.size)
  assert all(n % b == 0 and (b == 1 or role == "i") for n, b, role in zip(shape, found.block, roles, strict=True))
  values = formed(found)
  assert values.dtype == dtype
  off, largest = np.abs(np.float32(values) - np.float32(weight)), np.abs(np.float32(weight)).max()
  assert off.max() <= 0.35 * largest
  if roles[0] == "s":
    last = formed(jax.tree.map(lambda part: np.asarray(part)[-1], found))
    np.testing.assert_allclose(np.float32(last), np.float32(values[-1]), rtol=1e-2, atol=1e-6)


@hypothesis.given(
  roles=st.sampled_from(ROLES),
  sizes=st.lists(st.sampled_from([1, 2, 3, 5, 8, 12, 20]), min_size=4, max_size=4),
  format=st.sampled_from(FORMATS),
  dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
  size=st.sampled_from([1, 4, 7, 64, None]),
  double=st.booleans(),
)
@hypothesis.settings(max_examples=profiles.count(3, 60), phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate])
def test_any_shape_is_written_again_as_it_was(roles, sizes, format, dtype, size, double):
  """Other floats in an array's format, blocks and levels are what quantising them with its options gives."""
  shape = tuple(sizes[: len(roles)])
  first, other = (jax.random.normal(jax.random.key(k), shape, dtype) for k in range(2))
  write = lambda w: one(w, format, axes={"w": roles}, block_size=size, double=double)
  found, want = encoded_as(other, write(first)), write(other)
  assert jax.tree.map(jnp.shape, found) == jax.tree.map(jnp.shape, want)
  assert (found.dtype, found.block) == (want.dtype, want.block)
  np.testing.assert_array_equal(found.codes, want.codes)
  values = [np.float32(formed(node)) for node in (found, want)]  # a mean's last bit may move a scale by one code
  np.testing.assert_allclose(*values, atol=0.03 * np.abs(values[1]).max())


def test_embeddings_have_blocks_along_their_features():
  params = {"embed": {"embedding": jax.random.normal(KEY, (11, 64))}}
  assert jaxlora.quantize(params, "nf4", targets=["embed"])["embed"]["embedding"].block == (1, 64)
  tied = lambda p: jnp.take(p["w"], jnp.arange(3), axis=0) @ p["w"].T
  assert jaxlora.quantize({"w": jnp.ones((11, 64))}, "int8", targets="w", probe=tied)["w"].block == (1, 64)


def test_only_what_is_targeted():
  params = {"a": {"kernel": jnp.ones((64, 4)), "bias": jnp.zeros(4)}, "head": {"kernel": jnp.ones((4, 64))}}
  tree = jaxlora.quantize(params, "nf4")
  assert isinstance(tree["a"]["kernel"], jaxlora.QuantizedArray)
  assert tree["a"]["bias"] is params["a"]["bias"]
  assert tree["head"]["kernel"] is params["head"]["kernel"]  # the last classifier, by its name
  both = jaxlora.quantize(tree, "int8", targets=["head"])
  assert (both["a"]["kernel"].format, both["head"]["kernel"].format) == ("nf4", "int8")
  back = jaxlora.dequantize(both)
  assert jax.tree.map(jnp.shape, back) == jax.tree.map(jnp.shape, params)


def test_shapes_alone():
  """Before the weights are loaded: what compiles ahead of time is given shapes."""
  params = {"w": jax.random.normal(KEY, (128, 32))}
  like = jaxlora.quantize(jax.eval_shape(lambda: params), "nf4", targets="w")
  real = jaxlora.quantize(params, "nf4", targets="w")
  assert jax.tree.structure(like) == jax.tree.structure(real)
  assert jax.tree.map(lambda x: (x.shape, x.dtype), like) == jax.tree.map(lambda x: (x.shape, x.dtype), real)
  assert jax.tree.structure(jax.jit(lambda p: jaxlora.quantize(p, "nf4", targets="w"))(params)) == jax.tree.structure(
    real
  )


def large_floats():
  return sum(x.nbytes for x in jax.live_arrays() if x.dtype == jnp.float32 and x.size > 4000)


class Stored:
  """A weight in a file: an array when it is read. Notes then how many bytes of floats lie on the device."""

  def __init__(self, shape, seen):
    self.shape, self.dtype, self.ndim, self.seen = shape, np.dtype(np.float32), len(shape), seen

  def __array__(self, dtype=None, copy=None):
    self.seen.append(large_floats())
    return np.random.default_rng(len(self.seen)).standard_normal(self.shape).astype(np.float32)


@pytest.mark.parametrize("how", ["quantize", "with a report", "residual"])
def test_one_leaf_is_on_the_device_at_a_time(how):
  """Each leaf is read once, and what was read before is gone from the device by then, whatever is done with it."""
  seen: list[int] = []
  params = {f"layer_{k}": {"kernel": Stored((256, 64), seen)} for k in range(4)}
  if how == "residual":
    again = {f"layer_{k}": {"kernel": Stored((256, 64), seen)} for k in range(4)}
    codes = jaxlora.quantize({key: {"kernel": np.asarray(leaf["kernel"])} for key, leaf in again.items()}, "nf4")
    seen.clear()
    before = large_floats()
    tree = jaxlora.adapt(codes, jaxlora.LoraConfig(rank=2, init="residual"), KEY, floats=params)
  else:
    make = jaxlora.quantize if how == "quantize" else lambda *args: jaxlora.quantize_with_report(*args)[0]
    before = large_floats()
    tree = make(params, "nf4")
  assert len(seen) == 4
  assert max(seen) <= before
  assert tree["layer_3"]["kernel"].shape == (256, 64)


def test_the_error_of_outputs():
  params = {"kernel": jax.random.normal(KEY, (128, 32))}
  probe = lambda p: {"y": jnp.ones((2, 128)) @ p["kernel"], "count": jnp.arange(3)}
  tree, report = jaxlora.quantize_with_report(params, "int4", probe=probe)
  y, other = probe(params)["y"], probe(jaxlora.dequantize(tree))["y"]
  assert report.output_error == pytest.approx(float(jnp.linalg.norm(y - other) / jnp.linalg.norm(y)), rel=1e-3)
  assert f"the probe's results differ by {report.output_error:.4f}" in str(report)
  shapes = jax.eval_shape(lambda: params)
  assert jaxlora.quantize_with_report(shapes, "int4", probe=probe)[1].output_error is None
  traced = []
  jax.eval_shape(lambda p: traced.append(jaxlora.quantize_with_report(p, "int4", probe=probe)[1]), params)
  assert (traced[0].output_error, traced[0].leaves[0].error) == (None, None)
