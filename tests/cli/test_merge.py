"""`jaxlora merge`: a model's files with an adapter folded in, tensor by tensor."""

import json
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from jaxlora import checkpoint, peft
from tests import helpers
from tests.cli.files import PARAMS, as_torch, flat, zeros_file


def assert_close(got, want):
  assert list(got) == list(want)
  for name in want:
    assert got[name].dtype == want[name].dtype
    np.testing.assert_allclose(got[name].astype(np.float32), want[name].astype(np.float32), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ["checkpoint", "peft"])
@pytest.mark.parametrize("base", ["flax", "torch"])
def test_merge_is_jaxloras_merge(run, tmp_path, folders, tree, base, adapter):
  out = tmp_path / "out.safetensors"
  report = run("merge", folders / f"{base}.safetensors", folders / adapter, out)
  assert len(report["merged"]) == 3
  want = jaxlora.merge(tree)
  want = flat(want) if base == "flax" else as_torch(want)
  got = load_file(out)
  assert_close({name: got[name] for name in want}, want)
  old = (folders / f"{base}.safetensors").read_bytes()
  header = 8 + struct.unpack("<Q", old[:8])[0]
  assert out.read_bytes()[:header] == old[:header]  # names, order, metadata


def test_merge_of_several_files_and_other_dtypes(run, tmp_path, tree):
  half = {name: value.astype(jnp.bfloat16) for name, value in as_torch(PARAMS).items()}
  half["other"] = np.arange(5, dtype=np.int64)
  base = tmp_path / "base"
  base.mkdir()
  parts = {"model-1.safetensors": sorted(half)[:3], "model-2.safetensors": sorted(half)[3:]}
  for file, names in parts.items():
    save_file({name: half[name] for name in names}, base / file)
  index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
  (base / "model.safetensors.index.json").write_text(json.dumps(index))
  peft.save(tmp_path / "p", tree)
  run("merge", base, tmp_path / "p", tmp_path / "out")
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*parts, "model.safetensors.index.json"]
  got = {name: value for file in parts for name, value in load_file(tmp_path / "out" / file).items()}
  assert np.array_equal(got["other"], half["other"])
  want = as_torch(jaxlora.merge(tree))
  for name, value in want.items():
    assert got[name].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[name].astype(np.float32), value, rtol=2e-2, atol=2e-2)
  assert "exists" in run("merge", base, tmp_path / "p", tmp_path / "out", code=1)["error"]
  (base / "model-2.safetensors").write_bytes(b"0" * 30)
  error = run("merge", base, tmp_path / "p", tmp_path / "new", code=1)["error"]
  assert "model-2.safetensors: cannot be read as safetensors" in error


def test_merge_finds_a_bare_models_names(run, tmp_path, folders, tree):
  """Files of a model without its head have names without the beginning."""
  bare = {name.removeprefix("model."): value for name, value in as_torch(PARAMS).items()}
  save_file(bare, tmp_path / "bare.safetensors")
  run("merge", tmp_path / "bare.safetensors", folders / "peft", tmp_path / "out.safetensors")
  got = load_file(tmp_path / "out.safetensors")
  want = as_torch(jaxlora.merge(tree))
  assert_close({name: got[name.removeprefix("model.")] for name in want}, want)


@pytest.mark.parametrize("base", ["flax", "torch"])
def test_merge_reads_once(run, tmp_path, folders, touched, base):
  run("merge", folders / f"{base}.safetensors", folders / "checkpoint", tmp_path / "out.safetensors")
  labels = [label for label in touched if not label.startswith(f"read {base}.safetensors from byte")]
  assert labels == ["read a checkpoint"]
  assert set(touched.values()) == {1}
  touched.clear()
  run("merge", folders / f"{base}.safetensors", folders / "peft", tmp_path / "out.safetensors")
  assert touched["read adapter_config.json"] == touched["read the header of adapter_model.safetensors"] == 1
  assert set(touched.values()) == {1}


def test_merge_checks_the_base(run, tmp_path, folders):
  other = flat(PARAMS)
  other["layers_1/q_proj/kernel"] = other["layers_1/q_proj/kernel"] + 1
  save_file(other, tmp_path / "other.safetensors")
  arguments = ["merge", tmp_path / "other.safetensors", folders / "checkpoint", tmp_path / "out.safetensors"]
  error = run(*arguments, code=1)["error"]
  assert "layers_1/q_proj/kernel: float32[6,4]:" in error
  assert "--any-base" in error
  assert [path.name for path in tmp_path.iterdir()] == ["other.safetensors"]  # nothing half-written
  run(*arguments, "--any-base")
  del other["layers_1/q_proj/kernel"]
  save_file(other, tmp_path / "other.safetensors")
  for adapter in ("checkpoint", "peft"):
    error = run(*arguments[:2], folders / adapter, arguments[3], code=1)["error"]
    assert "layers" in error
  error = run("merge", folders / "flax.safetensors", folders / "peft", folders / "flax.safetensors", code=1)
  assert "is the base itself" in error["error"]


def test_merge_takes_a_base_larger_than_memory(tmp_path, forks):
  """80 more tensors of 2 MiB, all adapted, take no more memory than 16 did, but for what the allocators keep."""
  commands, shape = [], (1024, 512)
  base, a, b = jax.ShapeDtypeStruct(shape, np.float32), np.ones((1, 1024), np.float32), np.ones((1, 512), np.float32)
  for count in (16, 96):
    start, size = zeros_file(tmp_path / f"{count}.safetensors", count, shape)
    tree = {f"w{k}": jaxlora.LoraWeight(base, a * k, b, rank=1, alpha=1.0) for k in range(count)}
    checkpoint.save(tmp_path / f"a{count}", tree)
    out = tmp_path / f"{count}.out"
    commands.append(["merge", *map(str, (tmp_path / f"{count}.safetensors", tmp_path / f"a{count}", out))])
  said = [line for line in forks.run("command_lines", *commands) if line[0] == "code"]
  assert [code for _, code, _ in said] == [0, 0]
  some, many = (most for _, _, most in said)
  assert many - some < 25 * size < 80 * size
  with open(out, "rb") as file:
    for k in (0, 17, 95):
      file.seek(start + k * size)
      assert (np.frombuffer(file.read(size), np.float32) == k).all()


@pytest.mark.parametrize("inputs_first", [True, False])
def test_experts_in_one_parameter(run, tmp_path, inputs_first):
  shapes = {"gate_up_proj": (3, 4, 8), "down_proj": (3, 4, 4)}  # the second is square: the first tells how it is stored
  params = {name: {"kernel": helpers.array(k, shape, jnp.float32)} for k, (name, shape) in enumerate(shapes.items())}
  params = {"model": {"layers": {"0": {"mlp": {"experts": params}}}}}
  tree = helpers.adapted(params, targets=".*", axes={".*": "sio"})
  peft.save(tmp_path / "p", tree)
  stored = lambda tree: {
    name.removesuffix(".kernel"): np.ascontiguousarray(value if inputs_first else value.transpose(0, 2, 1))
    for name, value in flat(tree, ".").items()
  }
  save_file(stored(params), tmp_path / "base.safetensors")
  run("merge", tmp_path / "base.safetensors", tmp_path / "p", tmp_path / "out.safetensors")
  assert_close(load_file(tmp_path / "out.safetensors"), stored(jaxlora.merge(tree)))


def test_axes_say_how_a_base_called_as_torchs_is_stored(run, tmp_path):
  """Inputs first, as a JAX model may keep weights that it calls as torch does: squares alone do not show it."""
  weight = np.asarray(helpers.array(1, (8, 8), jnp.float32))
  tree = helpers.adapted({"q_proj": {"kernel": jnp.asarray(weight)}}, targets=".*")
  peft.save(tmp_path / "p", tree)
  save_file({"q_proj.weight": weight}, tmp_path / "base.safetensors")
  (tmp_path / "axes.json").write_text('{"q_proj/weight": "io"}')
  update = np.asarray(tree["q_proj"]["kernel"].delta())
  for more, expected in ((("--axes", tmp_path / "axes.json"), update), ((), update.T)):
    run("merge", tmp_path / "base.safetensors", tmp_path / "p", tmp_path / "out.safetensors", *more)
    found = load_file(tmp_path / "out.safetensors")["q_proj.weight"]
    np.testing.assert_allclose(found, weight + expected, rtol=1e-5, atol=1e-6)
    (tmp_path / "out.safetensors").unlink()
  checkpoint.save(tmp_path / "c", helpers.adapted({"q_proj": {"weight": jnp.asarray(weight)}}, targets=".*"))
  merge = ("merge", tmp_path / "base.safetensors", tmp_path / "c", tmp_path / "out.safetensors")
  assert "Leave it out" in run(*merge, "--axes", tmp_path / "axes.json", code=1)["error"]
  run(*merge)
