"""Fingerprints see every element, whatever an array's kind or sharding."""

import itertools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxlora import checkpoint
from jaxlora._base import digests


@pytest.fixture(autouse=True)
def by_the_devices(monkeypatch):
  """However small a leaf is, the devices that hold it compute its digest."""
  monkeypatch.setattr(digests, "_SMALL", 0)


def test_the_fingerprint_is_its_formula():
  x = np.random.default_rng(0).standard_normal((2, 3, 2)).astype(np.float32)

  def mix(word):
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
      word = (word ^ (word >> shift)) * factor % 2**32
    return word ^ (word >> 16)

  digest = ""
  for lane in (0x243F6A88, 0x85A308D3):
    total = 0
    for place in itertools.product(*map(range, x.shape)):
      seed = lane
      for index in place:
        seed = mix(seed ^ ((index + 1) * 0x9E3779B9 % 2**32))
      total += mix(int(x[place].view(np.uint32)) ^ seed)
    digest += f"{total % 2**32:08x}"
  assert checkpoint.fingerprint({"x": x}) == {"x": f"float32[2,3,2]:{digest}"}


WORDS = ["bfloat16", "float8_e4m3fn", "float4_e2m1fn", "int8", "uint4", "bool", "complex64", "int64", "float64"]


@pytest.mark.parametrize("dtype", WORDS)
def test_fingerprints_of_numpy_and_jax_arrays_agree_and_see_every_element(dtype):
  x = np.arange(6).reshape(2, 3).astype(dtype)
  with jax.enable_x64(True):
    on_device = jnp.asarray(x)
  assert on_device.dtype == x.dtype
  assert checkpoint.fingerprint({"x": x}) == checkpoint.fingerprint({"x": on_device})
  seen = {checkpoint.fingerprint({"x": x})["x"]}
  for place in np.ndindex(x.shape):
    changed = x.copy()
    changed[place] = (x[place] == 0) if dtype == "bool" else x[(place[0] + 1) % 2, place[1]]
    seen.add(checkpoint.fingerprint({"x": changed})["x"])
  assert len(seen) == 7


def test_fingerprints_depend_on_no_sharding_and_are_remembered():
  x = np.random.default_rng(0).standard_normal((8, 16)).astype(np.float32)
  want = checkpoint.fingerprint({"x": x})
  for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(kind,) * 2)
    for spec in (P("x", "y"), P(None, ("x", "y"))):
      sharded = jax.device_put(x, NamedSharding(mesh, spec))
      assert checkpoint.fingerprint({"x": sharded}) == want
      with jax.log_compiles(False), jax.transfer_guard("disallow"):
        assert checkpoint.fingerprint({"x": sharded}) == want  # nothing moves any more
  rows = np.arange(3 * 2**20, dtype=np.uint8).reshape(3, -1)  # several pieces
  assert checkpoint.fingerprint({"x": rows}) == checkpoint.fingerprint({"x": jnp.asarray(rows)})


def test_what_is_no_array_is_told_by_type():
  found = checkpoint.fingerprint(
    {"n": 3, "f": jnp.tanh, "s": jax.ShapeDtypeStruct((2,), "float32"), "k": jax.random.key(0)}
  )
  assert found["s"] == "float32[2]"
  assert ":" not in found["f"]
  assert found["n"] != checkpoint.fingerprint({"n": 4})["n"]
  assert found["k"] != checkpoint.fingerprint({"k": jax.random.key(1)})["k"]
