"""Quantised weights as the libraries that write them make them: what they decode is what is decoded here.

Needs torch, bitsandbytes, compressed-tensors and transformers, in a run of its own, as `tests/peft/test_peft.py` says.
"""

import json
import os

import numpy as np
import pytest

if os.environ.get("USE_TORCH") != "1":
  pytest.skip("needs torch, in a run of its own: USE_TORCH=1", allow_module_level=True)
torch = pytest.importorskip("torch", reason="the formats are those of torch's libraries")

from safetensors.torch import save_file  # noqa: E402

from jaxlora._base.files import stored_tensors  # noqa: E402
from jaxlora._files.formats import quantised_weights  # noqa: E402
from jaxlora.quant import from_tensors  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]
OUT, IN = 48, 256


def weight(seed=0):
  return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(seed)) * 0.05


def decoded(tmp_path, tensors, config=None):
  """The weight that is found in a file of these tensors, its format, and its value."""
  save_file({name: tensor.contiguous().clone() for name, tensor in tensors.items()}, tmp_path / "m.safetensors")
  stored = stored_tensors(tmp_path / "m.safetensors")
  read = lambda name: stored[name].read()
  ((name, found),) = quantised_weights(stored, config or {}, read).items()
  parts = found.parts_by(read)
  value = found.format.dequantise(parts, found.about)
  assert value.shape == found.shape
  if found.format.requantise is not None:  # what is stored again without a change is what was stored
    again = {**parts, **found.format.requantise(value, parts, found.about)}
    np.testing.assert_allclose(found.format.dequantise(again, found.about), value, rtol=1e-6)
    assert {part: (array.dtype, array.shape) for part, array in again.items()} == {
      part: (array.dtype, array.shape) for part, array in parts.items()
    }
  base = from_tensors({name: tensor.read() for name, tensor in stored.items()}, name, config=config)
  np.testing.assert_allclose(base.dequantize(), value, rtol=1e-6, atol=1e-8)
  return name, found.format.name, value


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("double", [False, True])
def test_bitsandbytes_4_bits(tmp_path, kind, double):
  functional = pytest.importorskip("bitsandbytes.functional")
  packed, state = functional.quantize_4bit(weight(), quant_type=kind, blocksize=64, compress_statistics=double)
  more = {f"q.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
  name, form, value = decoded(tmp_path, {"q.weight": packed, **more})
  assert (name, form) == ("q.weight", "bitsandbytes (4 bits)")
  np.testing.assert_allclose(value, functional.dequantize_4bit(packed, state).numpy(), rtol=1e-6, atol=1e-8)


def test_bitsandbytes_8_bits(tmp_path):
  functional = pytest.importorskip("bitsandbytes.functional")
  codes, scale, _ = functional.int8_vectorwise_quant(weight().half())
  tensors = {"q.weight": codes, "q.SCB": scale, "q.weight_format": torch.zeros((), dtype=torch.uint8)}
  name, form, value = decoded(tmp_path, tensors)
  assert (name, form) == ("q.weight", "bitsandbytes (8 bits)")
  np.testing.assert_allclose(value, functional.int8_vectorwise_dequant(codes, scale).numpy(), rtol=1e-6)


COMPRESSED = {
  "int4, groups": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64}),
  "int4, groups with zeros": (
    "pack-quantized", {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 64, "symmetric": False},
  ),
  "int4, channels": ("pack-quantized", {"num_bits": 4, "type": "int", "strategy": "channel"}),
  "int3, channels": ("pack-quantized", {"num_bits": 3, "type": "int", "strategy": "channel"}),
  "int8, packed": ("pack-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
  "int8": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
  "int8, one scale": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "tensor"}),
  "int8 with zeros": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": False}),
  "fp8, channels": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "channel"}),
  "fp8, one scale": ("float-quantized", {"num_bits": 8, "type": "float", "strategy": "tensor"}),
  "fp8, blocks": (
    "float-quantized", {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [16, 64]},
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", COMPRESSED)
def test_compressed_tensors(tmp_path, case):
  pytest.importorskip("compressed_tensors")
  from compressed_tensors.compressors.base import BaseCompressor
  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
  from compressed_tensors.quantization.utils import calculate_qparams

  form, fields = COMPRESSED[case]
  args = QuantizationArgs(**fields)
  value = weight()
  rows, columns = {
    "group": (1, fields.get("group_size")), "channel": (1, IN), "tensor": (OUT, IN),
    "block": fields.get("block_structure"),
  }[fields["strategy"]]  # fmt: skip
  blocks = value.reshape(OUT // rows, rows, IN // columns, columns)
  scale, zeros = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), args)
  if fields["strategy"] == "tensor":
    scale, zeros = scale.reshape(1), zeros.reshape(1)
  state = {"weight": value, "weight_scale": scale}
  state |= {} if fields.get("symmetric", True) else {"weight_zero_point": zeros}
  compressor = BaseCompressor.get_value_from_registry(form)
  scheme = QuantizationScheme(targets=["Linear"], weights=args, format=form)
  packed = compressor.compress(dict(state), scheme)
  want = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
  config = {
    "quant_method": "compressed-tensors",
    "config_groups": {"group_0": {"weights": json.loads(args.model_dump_json())}},
  }
  name, _, got = decoded(tmp_path, {f"q.{key}": tensor for key, tensor in packed.items()}, config)
  assert name == "q.weight"
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-7)
  assert np.abs(got - value.numpy()).max() < 0.1


def test_nvfp4(tmp_path):
  pytest.importorskip("compressed_tensors")
  from compressed_tensors.compressors.base import BaseCompressor
  from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme

  args = QuantizationArgs(num_bits=4, type="float", strategy="tensor_group", group_size=16)
  scheme = QuantizationScheme(targets=["Linear"], weights=args, format="nvfp4-pack-quantized")
  value, world = weight(), torch.tensor([200.0])
  scale = (value.reshape(OUT, -1, 16).abs().amax(-1) / 6 * world).to(torch.float8_e4m3fn).float()
  compressor = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
  packed = compressor.compress({"weight": value, "weight_scale": scale, "weight_global_scale": world}, scheme)
  want = compressor.decompress(dict(packed), scheme)["weight"].float().numpy()
  name, form, got = decoded(tmp_path, {f"q.{key}": tensor for key, tensor in packed.items()})
  assert (name, form) == ("q.weight", "NVFP4")
  np.testing.assert_allclose(got, want, rtol=1e-2, atol=1e-3)  # it decodes in bfloat16
  np.testing.assert_allclose(got, value.numpy(), atol=0.05)


def test_mxfp4(tmp_path):
  mxfp4 = pytest.importorskip("transformers.integrations.mxfp4")
  generator = torch.Generator().manual_seed(0)
  blocks = torch.randint(0, 256, (3, OUT, IN // 32, 16), generator=generator, dtype=torch.uint8)
  scales = torch.randint(118, 128, (3, OUT, IN // 32), generator=generator, dtype=torch.uint8)
  want = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
  name, form, got = decoded(tmp_path, {"experts.down_proj_blocks": blocks, "experts.down_proj_scales": scales})
  assert (name, form) == ("experts.down_proj", "MXFP4")
  np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("shape", [(OUT, IN), (512, 64), (128, 1024)])
def test_nf4_of_our_own_is_that_of_bitsandbytes(shape):
  """Codes and scales to the bit; the scales' own codes to its kernel's rounding, which is not always the nearest."""
  functional = pytest.importorskip("bitsandbytes.functional")
  import jaxlora

  value = torch.randn(*shape, generator=torch.Generator().manual_seed(1)) * 0.05
  value[3, :64] = 0
  params = {"w": value.numpy().T}
  options = {"targets": "w", "axes": {"w": "io"}}
  one, double = (jaxlora.quantize(params, "nf4", double=double, **options)["w"] for double in (False, True))
  packed, state = functional.quantize_4bit(value, quant_type="nf4", blocksize=64)
  codes = np.asarray(one.codes).astype(np.uint8).T.reshape(-1)
  np.testing.assert_array_equal((codes[::2] << 4) | codes[1::2], packed.numpy().reshape(-1))
  np.testing.assert_array_equal(np.asarray(one.scales).T.reshape(-1), state.absmax.numpy())
  np.testing.assert_array_equal(np.asarray(one.dequantize()).T, functional.dequantize_4bit(packed, state).numpy())
  packed, state = functional.quantize_4bit(value, quant_type="nf4", blocksize=64, compress_statistics=True)
  np.testing.assert_array_equal(double.codes, one.codes)
  apart = np.asarray(double.scales.codes).T.reshape(-1).astype(int) - state.absmax.numpy()
  assert np.abs(apart).max() <= 1
  assert (apart != 0).mean() < 0.02
  np.testing.assert_allclose(np.asarray(double.scales.scales).T.reshape(-1), state.state2.absmax.numpy(), rtol=1e-5)
  np.testing.assert_allclose(float(double.scales.offset[0, 0]), float(state.offset), rtol=1e-5)


def test_the_dynamic_map_is_that_of_bitsandbytes():
  functional = pytest.importorskip("bitsandbytes.functional")
  from jaxlora._quant.books import DYNAMIC8

  np.testing.assert_array_equal(np.float32(DYNAMIC8), functional.create_dynamic_map().numpy())
