"""Weights that several tensors of a file make, as bases; packed here by the formats' published layouts."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from jaxlora._quant.books import DYNAMIC8, FP4, NF4
from jaxlora.quant import from_tensors
from tests import helpers

RECORDED = np.load(Path(__file__).parent / "bitsandbytes_0_50_2.npz")
OUT, IN, GROUP = 16, 64, 16
NAME = "model.layers.0.self_attn.q_proj.weight"
MODULE = NAME.removesuffix(".weight")


def integers(bits, shape, seed=0):
  return np.random.default_rng(seed).integers(0, 2**bits, shape)


def scales(groups=IN // GROUP, outs=OUT):
  return (0.01 + 0.1 * np.random.default_rng(9).random((groups, outs))).astype(np.float16)


def words_along(numbers, bits, axis):
  """Numbers packed along an axis into words of 32 bits, the first in the lowest bits: one by one, by shifts."""
  numbers = np.moveaxis(numbers, axis, 0).astype(np.uint64)
  each = 32 // bits
  words = np.zeros((len(numbers) // each, *numbers.shape[1:]), np.uint64)
  for k, row in enumerate(numbers):
    words[k // each] |= row << np.uint64(bits * (k % each))
  return np.moveaxis(words.astype(np.uint32).view(np.int32), 0, axis)


def gptq(bits=4, symmetric=False, act_order=False, version=1):
  """Tensors as AutoGPTQ packs them, and the values: qweight along inputs, qzeros along outputs, zeros less one."""
  codes, s = integers(bits, (IN, OUT)), scales()
  zeros = np.full(s.shape, 2 ** (bits - 1)) if symmetric else 1 + integers(bits, s.shape, 1) % (2**bits - 1)
  groups = np.arange(IN) // GROUP
  groups = np.random.default_rng(3).permutation(groups) if act_order else groups
  tensors = {
    "qweight": words_along(codes, bits, 0),
    "qzeros": words_along(zeros - (version == 1), bits, 1),
    "scales": s,
    "g_idx": groups.astype(np.int32),
  }
  value = np.float32(codes - zeros[groups]) * np.float32(s)[groups]
  config = {"quant_method": "gptq", "bits": bits, "group_size": GROUP}
  return tensors, value.T, config | ({"checkpoint_format": "gptq_v2"} if version == 2 else {})


def awq():
  """Tensors as AutoAWQ's gemm packs them: outputs by eights, in the order 0 2 4 6 1 3 5 7."""
  codes, s = integers(4, (IN, OUT)), scales()
  zeros = integers(4, s.shape, 1)

  def packed(numbers):
    words = np.zeros((len(numbers), OUT // 8), np.uint64)
    for column in range(OUT // 8):
      for place, own in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
        words[:, column] |= numbers[:, 8 * column + own].astype(np.uint64) << np.uint64(4 * place)
    return words.astype(np.uint32).view(np.int32)

  value = np.float32(codes - np.repeat(zeros, GROUP, 0)) * np.repeat(np.float32(s), GROUP, 0)
  return {"qweight": packed(codes), "qzeros": packed(zeros), "scales": s}, value.T, {"quant_method": "awq"}


def bitsandbytes(shape=(OUT, IN), kind="nf4", size=64, double=False):
  """Tensors of bitsandbytes' names, and the values, decoded one by one in the flattened order."""
  codes, count = integers(4, (OUT * 5000,))[: np.prod(shape)], -(-int(np.prod(shape)) // size)
  book = np.float32(NF4 if kind == "nf4" else FP4)
  state = {"quant_type": kind, "blocksize": size, "dtype": "float32", "shape": list(shape)}
  absmax = np.float32(0.1) + np.random.default_rng(2).random(count, np.float32)
  tensors = {"weight.quant_map": book}
  if double:
    nested, outer = integers(8, (count,), 4).astype(np.uint8), np.float32([0.3, 0.2, 0.7])[: -(-count // 256)]
    tensors |= {"weight.nested_absmax": outer, "weight.nested_quant_map": np.float32(DYNAMIC8)}
    tensors["weight.absmax"] = nested
    state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}
    absmax = np.float32([np.float32(DYNAMIC8)[c] * outer[k // 256] for k, c in enumerate(nested)]) + np.float32(0.5)
  else:
    tensors["weight.absmax"] = absmax
  even = np.pad(codes, (0, codes.size % 2)).astype(np.uint8)
  tensors["weight"] = ((even[::2] << 4) | even[1::2])[:, None]
  tensors[f"weight.quant_state.bitsandbytes__{kind}"] = np.frombuffer(json.dumps(state).encode(), np.uint8)
  value = np.float32([book[c] * absmax[k // size] for k, c in enumerate(codes)])
  return tensors, value.reshape(shape), {}


def int8_rows():
  """LLM.int8."""
  codes, scale = integers(8, (OUT, IN)).astype(np.int8), np.float32(0.5 + np.arange(OUT))
  return {"weight": codes, "SCB": scale, "weight_format": np.uint8(0)}, codes * (scale / np.float32(127))[:, None], {}


def fp8(shape=(OUT, IN), blocks=(8, 16), dtype=jnp.float8_e4m3fn, scale_dtype=np.float32):
  grid = [-(-n // b) for n, b in zip(shape, blocks, strict=True)]
  scale = (0.5 + np.random.default_rng(5).random(grid)).astype(scale_dtype)
  codes = np.random.default_rng(6).standard_normal(shape).astype(dtype)
  wide = np.repeat(np.repeat(np.float32(scale), blocks[0], 0), blocks[1], 1)[: shape[0], : shape[1]]
  tensors = {"weight": codes, "weight_scale_inv": scale}
  return tensors, np.float32(codes) * wide, {"weight_block_size": list(blocks)}


FORMATS = {
  "gptq": gptq,
  "gptq, symmetric": lambda: gptq(symmetric=True),
  "gptq, 8 bits": lambda: gptq(8),
  "gptq, 2 bits, second version": lambda: gptq(2, version=2),
  "gptq, act-order": lambda: gptq(act_order=True),
  "gptq, 8 bits, symmetric, act-order": lambda: gptq(8, True, True),
  "awq": awq,
  "nf4": bitsandbytes,
  "nf4, double": lambda: bitsandbytes((256, 64), double=True),
  "fp4": lambda: bitsandbytes(kind="fp4"),
  "llm.int8": int8_rows,
  "fp8, blocks": fp8,
  "fp8, e5m2": lambda: fp8(dtype=jnp.float8_e5m2),
  "fp8, blocks that do not divide": lambda: fp8((24, 40), (16, 16), scale_dtype=jnp.bfloat16),
}


def named(tensors):
  return {f"{MODULE}.{own}": tensor for own, tensor in tensors.items()}


def base(case, **options):
  tensors, value, config = FORMATS[case]()
  return from_tensors(named(tensors), NAME, config=config, **options), value


@pytest.mark.parametrize("case", FORMATS)
def test_values(case):
  found, value = base(case)
  assert (found.shape, found.dtype) == (value.shape, jnp.float32)
  np.testing.assert_allclose(found.dequantize(), value, rtol=2e-7 if "double" in case else 0)
  four = case.startswith(("nf4", "fp4", "awq")) or ("gptq" in case and "8 bits" not in case)
  assert all(isinstance(part, jax.Array) for part in jax.tree.leaves(found))
  codes = (found.blocks if "act-order" in case else found).codes
  assert ("int4" in codes.dtype.name) == four
  assert base(case, dtype="bfloat16")[0].dtype == jnp.bfloat16


def test_functions_of_all_of_them():
  """Kernels in Flax's layout, adapted: values and gradients are those of the floats."""
  found = {case.replace(", ", "_"): base(case) for case in FORMATS}
  kernels = {name: node.T for name, (node, _) in found.items()}
  tree = jaxlora.adapt(kernels, jaxlora.LoraConfig(rank=2, targets=".*", axes={".*": "io"}), jax.random.key(0))
  shapes = {name: (2, node.shape[0]) for name, node in kernels.items()}
  inputs = {
    name: helpers.normal(k, shapes[name], jnp.float32) / float(np.abs(value).sum(1).max())
    for k, (name, (_, value)) in enumerate(found.items())
  }
  fn = lambda p, x: sum(jnp.sum(jnp.tanh(x[name] @ p[name])) for name in x)
  helpers.check(fn, helpers.trained(tree), (inputs,), 1e-4)


def test_stacks_run_in_loops():
  """Layers as one stack, act-order among them: what the scan slices are codes."""
  nodes = [
    from_tensors(named(t), NAME, config=config).T
    for t, _, config in (gptq(act_order=True), gptq(8, act_order=True))
    for _ in "ab"
  ]
  for first in (0, 2):
    stack = jax.tree.map(lambda *parts: jnp.stack(parts), *nodes[first : first + 2])
    np.testing.assert_array_equal(stack.dequantize()[1], nodes[first].dequantize())
  fn = lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w @ w.T), None), x, p["w"])[0]
  tree = jaxlora.adapt({"w": stack}, jaxlora.LoraConfig(rank=2, targets="w", axes={"w": "sio"}), jax.random.key(0))
  helpers.check(fn, helpers.trained(tree), (jnp.ones((2, IN)),), 1e-4, on_materialize="error")


def test_checkpoints(tmp_path):
  params = {"layer": {name: base(case)[0].T for name, case in [("q", "gptq, act-order"), ("k", "nf4, double")]}}
  config = jaxlora.LoraConfig(rank=2, targets=".*", axes={".*": "io"})
  tree = helpers.trained(jaxlora.adapt(params, config, jax.random.key(0)))
  checkpoint.save(tmp_path / "a", tree)
  again = checkpoint.load(tmp_path / "a", params)
  jax.tree.map(np.testing.assert_array_equal, again, tree)
  q = params["layer"]["q"]
  changed = {"layer": {**params["layer"], "q": q.with_parts({"order": q.order[::-1]})}}
  with pytest.raises(checkpoint.CheckpointError, match=r"layer/q \(adapted\): other values"):
    checkpoint.load(tmp_path / "a", changed)


def test_nf4_is_what_quantize_makes():
  """A file of bitsandbytes is the base that its original would be."""
  state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [24, 128]}
  tensors = {
    "q.weight": RECORDED["packed"][:, None],
    "q.weight.absmax": RECORDED["absmax"],
    "q.weight.quant_map": np.float32(NF4),
    "q.weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
  }
  found = from_tensors(tensors, "q.weight").T
  own = jaxlora.quantize({"w": RECORDED["weight"].T}, "nf4", targets="w", axes={"w": "io"}, double=False)["w"]
  jax.tree.map(np.testing.assert_array_equal, found, own)
  assert repr(found) == repr(own) == "QuantizedArray(128x24 float32 as nf4, blocks 64x1)"


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("shape", [(6, 96), (5, 32), (128, 32), (7, 9), (300, 64), (33, 576), (2, 1024)])
def test_runs_of_any_shape(shape, double):
  """Runs of 64 that end within a row, or are several rows; the scales' own of 256, too."""
  tensors, value, _ = bitsandbytes(shape, double=double)
  found = from_tensors(named(tensors), NAME)
  np.testing.assert_allclose(found.dequantize(), value, rtol=2e-7)
  assert all(n % k == 0 for n, k in zip(shape, found.scales.shape, strict=True))
