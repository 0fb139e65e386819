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
