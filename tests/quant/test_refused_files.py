"""Files' tensors that make no base: errors that name the tensor, and remedies that work."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora.quant import from_gguf, from_tensors
from tests.quant.test_tensors import MODULE, NAME, awq, bitsandbytes, fp8, gptq, int8_rows, named

gguf = pytest.importorskip("gguf")

from tests.quant.test_gguf import blocks, tensor  # noqa: E402

FFN = r"from_gguf: blk\.0\.ffn_up\.weight: "


def refused(match, tensor, **options):
  with pytest.raises(ValueError, match=FFN + match):
    from_gguf(tensor, **options)


def test_types_that_are_not_read():
  value = np.random.default_rng(0).standard_normal((2, 256), np.float32)
  kind = gguf.GGMLQuantizationType.TQ1_0
  other = tensor("TQ1_0", (2, 256), gguf.quantize(value, kind))
  refused(r"found the type TQ1_0, expected one of Q4_0, Q4_1, Q8_0, Q4_K, Q6_K\..*gguf.dequantize\(.*quantize", other)
  floats = gguf.dequantize(other.data, other.tensor_type)  # the remedy
  assert jaxlora.quantize({"w": floats.T}, "nf4", targets="w")["w"].shape == (256, 2)
  refused(r"found the type F32, expected codes\. tensor\.data is the array", tensor("F32", (2, 256), value))
  half = tensor("BF16", (2, 256), gguf.quantize(value, gguf.GGMLQuantizationType.BF16))
  refused(r"found the type BF16, expected codes\. gguf\.dequantize\(tensor\.data, tensor\.tensor_type\) is", half)
  assert gguf.dequantize(half.data, half.tensor_type).shape == (2, 256)


def test_blocks_that_are_not_whole():
  refused(
    r"shape \(4, 48\) has rows of no whole blocks of 32.*gguf.GGUFReader",
    tensor("Q4_1", (4, 48), blocks("Q4_1", (4, 64))),
  )
  data = blocks("Q4_K", (4, 512))
  for wrong in (data[:, :-1], data[:3], data.view(np.int8), data.reshape(-1)):
    refused(r"found .*expected bytes of shape \(4, 288\) for \(4, 512\) in Q4_K\.", tensor("Q4_K", (4, 512), wrong))
  refused(r"shape \(\) has", tensor("Q4_1", (), np.zeros(0, np.uint8)))


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_scales_that_are_not_finite(kind, value):
  data = blocks(kind, (4, 512))
  first = {"Q4_1": 2, "Q6_K": 208}[kind]
  data[2, first : first + 2] = np.float16([value]).view(np.uint8)
  refused(r"found NaN or infinite scales.*read it again, or quantise the original", tensor(kind, (4, 512), data))


def test_dtypes_that_are_no_floats():
  for dtype in ("int8", jnp.float8_e4m3fn, bool):
    refused("dtype is .*expected that of a float of 16 bits or more", tensor("Q4_1", (4, 64)), dtype=dtype)


def changed(tensors, config, **changes):
  """Tensors of one weight with some of them others, or missing."""
  found = {own: changes.get(own, array) for own, array in tensors.items()} | changes
  return named({own: array for own, array in found.items() if array is not None}), config


def without(own):
  return lambda t, c: changed(t, c, **{own: None})


def state_of(**about):
  return np.frombuffer(json.dumps(about).encode(), np.uint8)


BROKEN = {
  "nothing": (gptq, lambda t, c: ({}, c), "found no tensor of that name, expected .*GPTQ"),
  "another name": (gptq, lambda t, c: ({"other.qweight": t["qweight"]}, c), "found no tensor of that name"),
  "a plain array": (gptq, lambda t, c: ({NAME: np.ones((2, 2), np.float32)}, c), "a plain array is a base as it is"),
  "gptq, no scales": (gptq, without("scales"), "found GPTQ, with tensors that make no weight.*jaxlora.quantize"),
  "gptq, zeros of another size": (gptq, lambda t, c: changed(t, c, qzeros=t["qzeros"][:, :1]), r"zeros of \(4, 1\)"),
  "gptq, codes of another size": (gptq, lambda t, c: changed(t, c, qweight=t["qweight"][:-1]), r"expected \(56,\)"),
  "gptq, groups out of range": (gptq, lambda t, c: changed(t, c, g_idx=t["g_idx"] + 1), "groups 1 to 4, expected 0"),
  "gptq, too few groups": (gptq, lambda t, c: changed(t, c, g_idx=t["g_idx"][:8]), r"g_idx: shape \(8,\)"),
  "gptq, NaN": (gptq, lambda t, c: changed(t, c, scales=t["scales"] * np.float16(np.nan)), "NaN or infinite scales"),
  "awq, another order": (awq, lambda t, c: changed(t, {"version": "gemv"}), "AWQ's version 'gemv'; expected gemm"),
  "awq, zeros": (awq, lambda t, c: changed(t, c, qzeros=t["qzeros"][:1]), "fits no scales"),
  "bitsandbytes, no scales": (bitsandbytes, without("weight.absmax"), r"found no .*weight\.absmax"),
  "bitsandbytes, few scales": (
    bitsandbytes, lambda t, c: changed(t, c, **{"weight.absmax": t["weight.absmax"][:3]}),
    r"absmax of 3 elements, 16 expected",
  ),
  "bitsandbytes, few codes": (bitsandbytes, lambda t, c: changed(t, c, weight=t["weight"][:-1]), "511 elements, 512"),
  "bitsandbytes, another table": (
    bitsandbytes, lambda t, c: changed(t, c, **{"weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32)}),
    "whose table of values is none of those known here.*jaxlora.quantize",
  ),
  "bitsandbytes, no JSON": (
    bitsandbytes, lambda t, c: changed(t, c, **{"weight.quant_state.bitsandbytes__nf4": np.uint8([1, 2])}),
    "expected JSON with a shape",
  ),
  "bitsandbytes, JSON of no sizes": (
    bitsandbytes,
    lambda t, c: changed(t, c, **{"weight.quant_state.bitsandbytes__nf4": state_of(shape=[0, 4], blocksize=64)}),
    "expected positive sizes",
  ),
  "llm.int8, rows": (int8_rows, lambda t, c: changed(t, c, SCB=t["SCB"][:3]), "signed bytes with as many rows"),
  "llm.int8, an order of GPUs": (int8_rows, lambda t, c: changed(t, c, weight_format=np.uint8(1)), "again on a CPU"),
  "fp8, scales": (fp8, lambda t, c: changed(t, c, weight_scale_inv=np.ones((5, 3), np.float32)), r"of shape \(5, 3\)"),
  "fp8, NaN codes": (
    fp8, lambda t, c: changed(t, c, weight=np.full(t["weight"].shape, np.nan, jnp.float8_e4m3fn)), "NaN or infinite",
  ),
  "fp8, alone": (fp8, without("weight_scale_inv"), "expected the tensors of a weight"),
  "another format": (gptq, lambda t, c: ({f"{MODULE}.q_weight": t["qweight"]}, c), "found EXL2, with tensors"),
  "an unknown dtype": (gptq, lambda t, c: changed(t, c, scales=np.array(["a"])), "scales: dtype <U1, expected one"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_tensors_that_make_no_weight(case):
  make, change, match = BROKEN[case]
  tensors, _, config = make()
  tensors, config = change(tensors, config)
  with pytest.raises(ValueError, match=rf"from_tensors: .*q_proj.*{match}"):
    from_tensors(tensors, NAME, config=config)


def test_stacks_are_not_moved_in_act_order():
  tensors, _, config = gptq(act_order=True)
  node = from_tensors(named(tensors), NAME, config=config)
  stack = jax.tree.map(lambda part: jnp.stack([part, part]), node)
  assert stack.transpose(0, 2, 1).shape == (2, 64, 16)
  with pytest.raises(ValueError, match=r"transpose: \(1, 0, 2\) moves the stacked axes.*jaxlora.dequantize"):
    stack.transpose(1, 0, 2)
  assert jaxlora.dequantize(stack).transpose(1, 0, 2).shape == (16, 2, 64)
  with pytest.raises(TypeError, match="ReorderedArray was used as an array"):
    jnp.ones((2, 16)) @ node
