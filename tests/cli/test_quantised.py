"""`jaxlora merge` into quantised weights: decoded, merged, stored again or as plain floats; or refused by name."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

import jaxlora
from jaxlora import _cli, peft
from jaxlora._base.files import stored_tensors
from tests.helpers import adapted, array


def load_file(path):
  """safetensors.numpy reads no 8-bit floats."""
  return {name: stored.read() for name, stored in stored_tensors(path).items()}


OUT, IN = 300, 200  # no multiples of the blocks
NAME = "model.layers.0.self_attn.q_proj.weight"
PARAMS = {"layers_0": {"self_attn": {"q_proj": {"kernel": array(1, (IN, OUT), jnp.float32)}}}}


def spread(scale, shape, block):
  """Scales as an array of the weight's shape, by NumPy's own repetition of elements."""
  if scale.size == 1:
    return np.full(shape, scale.reshape(()), np.float32)
  if scale.ndim == 1 or scale.shape[1] == 1:
    return np.broadcast_to(scale.reshape(-1, 1), shape).astype(np.float32)
  return np.repeat(np.repeat(scale, block, 0), block, 1)[: shape[0], : shape[1]].astype(np.float32)


def fp8(value, scale, block=128, dtype=jnp.float8_e4m3fn):
  return (value / spread(scale, value.shape, block)).astype(dtype)


SCALES = {  # the name of the scales, their values for weights of about one, the dtype of the codes
  "deepseek": ("weight_scale_inv", np.full((3, 2), 0.01, np.float32), jnp.float8_e4m3fn),
  "powers of two": ("weight_scale_inv", np.full((3, 2), 2.0**-6, np.float32), jnp.float8_e4m3fn),
  "one": ("weight_scale", np.full((), 0.01, np.float32), jnp.float8_e4m3fn),
  "one of shape (1, 1)": ("weight_scale_inv", np.full((1, 1), 0.01, np.float32), jnp.float8_e4m3fn),
  "channels": ("weight_scale", np.full((OUT, 1), 0.01, jnp.bfloat16), jnp.float8_e4m3fn),
  "channels, 1-D": ("weight_scale", np.full((OUT,), 0.01, np.float32), jnp.float8_e4m3fn),
  "e5m2": ("weight_scale", np.full((1,), 0.01, np.float32), jnp.float8_e5m2),
  "comfy": ("scale_weight", np.full((), 0.01, np.float32), jnp.float8_e4m3fn),
  "mistral": ("qscale_weight", np.full((), 0.01, np.float32), jnp.float8_e4m3fn),
}


@pytest.fixture
def base(tmp_path):
  """Writes a folder with a quantised projection, and its adapter; returns the value of the base's weight."""

  def make(scale_name, scale, dtype, *, alpha=1.0, config=None):
    value = np.asarray(array(3, (OUT, IN), jnp.float32))
    codes = fp8(value, scale, dtype=dtype)
    module = NAME.removesuffix(".weight")
    tensors = {NAME: codes, f"{module}.{scale_name}": scale, "model.norm.weight": np.ones(IN, jnp.bfloat16)}
    folder = tmp_path / "base"
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    quantisation = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    told = {"torch_dtype": "bfloat16", "quantization_config": quantisation} if config is None else config
    (folder / "config.json").write_text(json.dumps(told))
    (folder / "tokenizer.json").write_text("{}")
    tree = adapted(PARAMS, alpha=alpha, rank=4, targets=["q_proj"])
    peft.save(tmp_path / "p", tree)
    delta = np.asarray(tree["layers_0"]["self_attn"]["q_proj"]["kernel"].delta()).T
    return codes.astype(np.float32) * spread(scale, value.shape, 128), delta, f"{module}.{scale_name}"

  return make


@pytest.mark.parametrize("kind", SCALES)
def test_fp8_is_decoded_merged_and_stored_again(run, tmp_path, base, kind):
  name, scale, dtype = SCALES[kind]
  value, delta, scale_key = base(name, scale, dtype)
  report = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out")
  got = load_file(tmp_path / "out" / "model.safetensors")
  assert got[NAME].dtype == dtype
  assert (got[scale_key].dtype, got[scale_key].shape) == (scale.dtype, scale.shape)
  stored = got[NAME].astype(np.float32) * spread(got[scale_key], value.shape, 128)
  exact = value + delta
  assert np.isfinite(stored).all()
  bound = 2.0**-3 if dtype == jnp.float8_e5m2 else 2.0**-4  # half a step of the codes, relative
  assert np.all(np.abs(stored - exact) <= bound * np.abs(exact) + 0.01 * 2.0**-6)
  lost = np.linalg.norm(stored - exact) / np.linalg.norm(delta)
  np.testing.assert_allclose(report["lost"][NAME], lost, rtol=1e-4)
  if kind == "powers of two":
    assert (np.frexp(got[scale_key])[0] == 0.5).all()
  kept = (tmp_path / "base" / "config.json").read_bytes()
  assert (tmp_path / "out" / "config.json").read_bytes() == kept
  assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.parametrize("dtype", [None, "float32"])
@pytest.mark.parametrize("kind", ["deepseek", "one", "channels"])
def test_dequantize_writes_plain_floats(run, tmp_path, base, kind, dtype):
  value, delta, scale_key = base(*SCALES[kind])
  more = ["--dtype", dtype] if dtype else []
  run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", "--dequantize", *more)
  got = load_file(tmp_path / "out" / "model.safetensors")
  assert scale_key not in got
  assert got[NAME].dtype == jnp.dtype(dtype or jnp.bfloat16)
  np.testing.assert_allclose(got[NAME].astype(np.float32), value + delta, rtol=1e-6 if dtype else 2.0**-8, atol=1e-6)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"torch_dtype": dtype or "bfloat16"}


def test_a_small_update_that_fp8_loses_is_told_and_the_remedy_keeps_it(run, capsys, tmp_path, base):
  value, delta, _ = base(*SCALES["deepseek"], alpha=1e-3)
  assert _cli.main(["merge", *map(str, (tmp_path / "base", tmp_path / "p", tmp_path / "out"))]) == 0
  text = capsys.readouterr().out
  assert f"rounded away in {NAME}" in text
  assert "--dequantize" in text
  report = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "o2", "--dequantize", "--dtype", "float32")
  assert report["lost"] == {}
  got = load_file(tmp_path / "o2" / "model.safetensors")[NAME]
  assert np.linalg.norm(got - value - delta) < 1e-3 * np.linalg.norm(delta)
  error = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "o3", "--dtype", "float32", code=1)["error"]
  assert "Pass --dequantize with it" in error


def test_scales_that_fit_no_blocks_are_refused(run, tmp_path, base):
  base("weight_scale", np.full((OUT, 1), 0.01, np.float32), jnp.float8_e4m3fn)
  tensors = load_file(tmp_path / "base" / "model.safetensors")
  tensors[f"{NAME}_scale"] = np.full((7, 3), 0.01, np.float32)
  save_file(tensors, tmp_path / "base" / "model.safetensors")
  error = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert "expected one scale, one for each output, or one for each block" in error
  assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("axes", ["both", "inputs"])
def test_blocks_of_other_sizes_are_those_that_the_configuration_says(run, tmp_path, base, axes):
  """5 x 4 scales of a 300 x 200 weight are those of blocks of 60 x 50, and as well of 64 x 64, or of 70 x 60."""
  sizes = (70, 60) if axes == "both" else (1, 60)
  scale = np.full((-(-OUT // sizes[0]), -(-IN // sizes[1])), 0.01, np.float32)
  scale *= np.linspace(1, 2, scale.size, dtype=np.float32).reshape(scale.shape)
  spread_out = np.repeat(np.repeat(scale, sizes[0], 0), sizes[1], 1)[:OUT, :IN]
  base("weight_scale", np.full((OUT, 1), 0.01, np.float32), jnp.float8_e4m3fn, config={})
  file, tree = tmp_path / "base" / "model.safetensors", peft.load(tmp_path / "p", PARAMS)
  delta = np.asarray(tree["layers_0"]["self_attn"]["q_proj"]["kernel"].delta()).T
  save_file(load_file(file) | {f"{NAME}_scale": scale}, file)
  value = load_file(file)[NAME].astype(np.float32) * spread_out
  merge = ("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out")
  assert '"weight_block_size" in the "quantization_config"' in run(*merge, code=1)["error"]
  told = {"weight_block_size": sizes}
  if axes == "inputs":
    told = {"config_groups": {"group_0": {"weights": {"strategy": "group", "group_size": 60}}}}
  (tmp_path / "base" / "config.json").write_text(json.dumps({"quantization_config": told}))
  run(*merge, "--dequantize", "--dtype", "float32")
  np.testing.assert_allclose(load_file(tmp_path / "out" / "model.safetensors")[NAME], value + delta, atol=1e-5)


def test_codes_beside_something_unknown_are_refused(run, tmp_path, base):
  base("weight_inv_s", np.full((), 0.01, np.float32), jnp.float8_e4m3fn, config={})
  error = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert f"an unknown format with {NAME}_inv_s beside it" in error


NAMED = {
  "EXL2": {"q_weight": np.zeros((25, 300), np.int32), "q_scale": np.zeros((2, 38), np.int32)},
  "HQQ": {"W_q": np.zeros((150, 200), np.uint8), "scale": np.ones(3, np.float32)},
  "AQLM": {"codes": np.zeros((300, 25, 1), np.int16), "codebooks": np.zeros((1, 16, 1, 8), np.float16)},
  "an unknown format": {"weight": np.zeros((OUT, IN), np.float16), "weight_zero_point": np.zeros(3, np.float16)},
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("option", [[], ["--dequantize"]], ids=str)
def test_other_formats_are_refused_by_name(run, tmp_path, kind, option):
  module = NAME.removesuffix("weight")
  (tmp_path / "base").mkdir()
  save_file({module + name: part for name, part in NAMED[kind].items()}, tmp_path / "base" / "model.safetensors")
  peft.save(tmp_path / "p", adapted(PARAMS, rank=4, targets=["q_proj"]))
  error = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", *option, code=1)["error"]
  assert kind in error or option
  assert not (tmp_path / "out").exists()


def words(codes, bits, axis):
  """Codes of some bits in 32-bit words along an axis, the lowest bits first, one by one."""
  codes = np.moveaxis(codes, axis, -1).astype(np.uint64)
  each = 32 // bits
  packed = np.zeros((*codes.shape[:-1], codes.shape[-1] // each), np.uint64)
  for k in range(codes.shape[-1]):
    packed[..., k // each] |= codes[..., k] << np.uint64(bits * (k % each))
  return np.ascontiguousarray(np.moveaxis(packed.astype(np.uint32).view(np.int32), -1, axis))


GROUP, ROWS, COLUMNS = 32, 64, 128  # inputs that share a scale; outputs and inputs


def gptq(bits=4, version="gptq", act_order=False):
  """Tensors, configuration and value of a weight, as AutoGPTQ packs them."""
  random = np.random.default_rng(0)
  codes, zeros = random.integers(0, 2**bits, (COLUMNS, ROWS)), random.integers(1, 2**bits, (COLUMNS // GROUP, ROWS))
  scales = random.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
  group = np.arange(COLUMNS) // GROUP
  group = random.permutation(group) if act_order else group
  value = (codes - zeros[group]) * scales.astype(np.float32)[group]
  tensors = {
    "qweight": words(codes, bits, 0), "qzeros": words(zeros - (version == "gptq"), bits, 1), "scales": scales,
    "g_idx": group.astype(np.int32),
  }  # fmt: skip
  return tensors, {"quant_method": "gptq", "bits": bits, "checkpoint_format": version}, value.T


def awq():
  """As AutoAWQ packs them: eight columns of a word in its order."""
  random = np.random.default_rng(0)
  codes, zeros = random.integers(0, 16, (COLUMNS, ROWS)), random.integers(0, 16, (COLUMNS // GROUP, ROWS))
  scales = random.uniform(0.01, 0.02, zeros.shape).astype(np.float16)
  order = [8 * (k // 8) + (0, 2, 4, 6, 1, 3, 5, 7)[k % 8] for k in range(ROWS)]
  value = (codes - np.repeat(zeros, GROUP, 0)) * np.repeat(scales.astype(np.float32), GROUP, 0)
  tensors = {"qweight": words(codes[:, order], 4, 1), "qzeros": words(zeros[:, order], 4, 1), "scales": scales}
  return tensors, {"quant_method": "awq", "bits": 4, "group_size": GROUP, "version": "gemm"}, value.T


DECODED = {
  "GPTQ": gptq,
  "GPTQ, 8 bits": lambda: gptq(8),
  "GPTQ, version 2": lambda: gptq(version="gptq_v2"),
  "GPTQ, in order of activations": lambda: gptq(act_order=True),
  "AWQ": awq,
}


@pytest.mark.parametrize("kind", DECODED)
def test_packed_integers_are_refused_and_decoded_by_dequantize(run, tmp_path, kind):
  tensors, quantisation, value = DECODED[kind]()
  folder = tmp_path / "base"
  folder.mkdir()
  modules = [NAME.removesuffix("weight"), "model.layers.1.mlp.up_proj."]
  save_file({module + name: part for module in modules for name, part in tensors.items()}, folder / "model.safetensors")
  (folder / "config.json").write_text(json.dumps({"quantization_config": quantisation, "hidden_size": 1}))
  (folder / "quantize_config.json").write_text("{}")
  params = {"layers_0": {"self_attn": {"q_proj": {"kernel": jnp.zeros((COLUMNS, ROWS))}}}}
  tree = adapted(params, rank=4, targets=["q_proj"])
  peft.save(tmp_path / "p", tree)
  error = run("merge", folder, tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert f"stored as {kind.split(',')[0]}" in error
  assert "Pass --dequantize" in error
  run("merge", folder, tmp_path / "p", tmp_path / "out", "--dequantize", "--dtype", "float32")
  got = load_file(tmp_path / "out" / "model.safetensors")
  assert list(got) == [f"{module}weight" for module in modules]
  delta = np.asarray(tree["layers_0"]["self_attn"]["q_proj"]["kernel"].delta()).T
  np.testing.assert_allclose(got[f"{modules[0]}weight"], value + delta, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(got[f"{modules[1]}weight"], value, rtol=1e-5, atol=1e-6)
  assert json.loads((tmp_path / "out" / "config.json").read_text()) == {"hidden_size": 1}
  assert not (tmp_path / "out" / "quantize_config.json").exists()


def test_dequantize_is_refused_where_another_weight_cannot_be_read(run, tmp_path, base):
  base(*SCALES["one"])
  tensors = load_file(tmp_path / "base" / "model.safetensors")
  tensors["model.layers.1.q_proj.W_q"] = np.zeros((3, 4), np.uint8)
  save_file(tensors, tmp_path / "base" / "model.safetensors")
  error = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", "--dequantize", code=1)["error"]
  assert "model.layers.1.q_proj: --dequantize: quantised, in HQQ" in error
  run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out")  # the adapted ones are read


def test_codes_whose_scales_are_missing_are_refused(run, tmp_path, base):
  base(*SCALES["one"])
  tensors = load_file(tmp_path / "base" / "model.safetensors")
  save_file({NAME: tensors[NAME]}, tmp_path / "base" / "model.safetensors")
  error = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out", code=1)["error"]
  assert "quantised by config.json, and no scales are beside it" in error


def test_int8_with_scales_is_stored_again(run, tmp_path, base):
  base("weight_scale", np.full((OUT, 1), 0.03, np.float32), jnp.float8_e4m3fn)
  value = np.asarray(array(3, (OUT, IN), jnp.float32))
  scale = np.abs(value).max(1, keepdims=True) / 127
  codes = np.rint(value / scale).astype(np.int8)
  save_file({NAME: codes, f"{NAME}_scale": scale}, tmp_path / "base" / "model.safetensors")
  lost = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out")["lost"][NAME]
  got = load_file(tmp_path / "out" / "model.safetensors")
  assert got[NAME].dtype == np.int8
  plain = run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "o2", "--dequantize", "--dtype", "float32")
  want = load_file(tmp_path / "o2" / "model.safetensors")[NAME]
  assert not plain["lost"]
  stored = got[NAME].astype(np.float32) * got[f"{NAME}_scale"]
  assert (
    np.abs(stored - want).max() <= 2 * got[f"{NAME}_scale"].max()
  )  # the largest may be cut off, where that is closer
  np.testing.assert_allclose(lost, np.linalg.norm(stored - want) / np.linalg.norm(want - codes * scale), rtol=1e-3)


def test_dequantize_without_anything_to_decode_is_refused(run, tmp_path, folders):
  out = tmp_path / "out.safetensors"
  error = run("merge", folders / "torch.safetensors", folders / "peft", out, "--dequantize", code=1)["error"]
  assert "its weights are not quantised" in error


def test_a_plain_fp8_base_tells_what_it_loses(run, tmp_path):
  """Without scales the codes are the values, as image models store them."""
  peft.save(tmp_path / "p", adapted(PARAMS, rank=4, targets=["q_proj"], alpha=1e-3))
  save_file({NAME: np.asarray(array(3, (OUT, IN), jnp.float32)).astype(jnp.float8_e4m3fn)}, tmp_path / "b.safetensors")
  arguments = ["merge", tmp_path / "b.safetensors", tmp_path / "p", tmp_path / "out.safetensors"]
  assert run(*arguments)["lost"][NAME] > 0.5
  assert run(*arguments, "--dtype", "float32")["lost"] == {}
  assert load_file(tmp_path / "out.safetensors")[NAME].dtype == np.float32


def test_the_librarys_merge_and_jaxlora_merge_lose_the_same(run, tmp_path):
  kernel = PARAMS["layers_0"]["self_attn"]["q_proj"]["kernel"].astype(jnp.bfloat16)
  tree = adapted({"layers_0": {"self_attn": {"q_proj": {"kernel": kernel}}}}, rank=4, targets=["q_proj"], alpha=1e-3)
  peft.save(tmp_path / "p", tree)
  save_file({NAME: np.asarray(kernel).T.copy()}, tmp_path / "b.safetensors")
  lost = run("merge", tmp_path / "b.safetensors", tmp_path / "p", tmp_path / "out.safetensors")["lost"][NAME]
  with pytest.warns(jaxlora.RoundingWarning, match=rf"q_proj/kernel \({lost:.0%}\)"):
    merged = jaxlora.merge(tree)
  files = load_file(tmp_path / "out.safetensors")[NAME]
  assert np.mean(files != jax.tree.leaves(merged)[0].T) < 1e-3  # but for sums that lie between two numbers


def test_codes_and_scales_in_several_files(run, tmp_path, base):
  """As DeepSeek's index has them: the two parts of a weight are computed together, wherever they lie."""
  value, delta, scale_key = base(*SCALES["deepseek"])
  folder = tmp_path / "base"
  tensors = load_file(folder / "model.safetensors")
  (folder / "model.safetensors").unlink()
  home = {name: f"model-0000{2 if name == scale_key else 1}-of-00002.safetensors" for name in tensors}
  for file in sorted(set(home.values())):
    save_file({name: tensor for name, tensor in tensors.items() if home[name] == file}, folder / file)
  for given in (folder, folder / "model.safetensors.index.json"):  # a set of files without an index, and with one
    run("merge", given, tmp_path / "p", tmp_path / f"out of {given.name}")
    got = {name: load_file(tmp_path / f"out of {given.name}" / file)[name] for name, file in home.items()}
    stored = got[NAME].astype(np.float32) * spread(got[scale_key], value.shape, 128)
    assert np.linalg.norm(stored - value - delta) < 0.05 * np.linalg.norm(value + delta)
    assert (tmp_path / f"out of {given.name}" / "config.json").exists()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
  run("merge", folder, tmp_path / "p", tmp_path / "plain", "--dequantize")
  told = json.loads((tmp_path / "plain" / "model.safetensors.index.json").read_text())
  assert scale_key not in told["weight_map"]
  for file in set(home.values()):
    assert set(load_file(tmp_path / "plain" / file)) == {n for n, f in told["weight_map"].items() if f == file}
