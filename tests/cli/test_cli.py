"""The command line: either format in, either out, and models merged tensor by tensor."""

import json
from pathlib import Path
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import _cli, checkpoint
from tests.helpers import adapted, array

safetensors_numpy = pytest.importorskip("safetensors.numpy", reason="the extra jaxlora[peft] is not installed")
pytest.importorskip("tqdm", reason="the extra jaxlora[peft] is not installed")
from jaxlora import peft  # noqa: E402

PARAMS = {
  "layers_0": {"q_proj": {"kernel": array(1, (6, 4), jnp.float32), "bias": array(2, (4,), jnp.float32)}},
  "layers_1": {"q_proj": {"kernel": array(3, (6, 4), jnp.float32), "bias": array(4, (4,), jnp.float32)}},
  "embed_tokens": {"embedding": array(5, (11, 6), jnp.float32)},
}


@pytest.fixture(scope="module")
def tree():
  overrides = {"layers_1/.*": {"rank": 1, "alpha": 0.5}}
  return adapted(PARAMS, alpha=6, targets=["q_proj", "embed_tokens"], overrides=overrides)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tree):
  """The same adapter in both formats, and its base as Flax and as torch would write it."""
  folder = tmp_path_factory.mktemp("cli")
  checkpoint.save(folder / "checkpoint", tree, metadata={"task": "summaries"})
  peft.save(folder / "peft", tree)
  safetensors_numpy.save_file(flat(PARAMS), folder / "flax.safetensors", metadata={"format": "flax"})
  safetensors_numpy.save_file(as_torch(PARAMS), folder / "torch.safetensors", metadata={"format": "pt"})
  return folder


def flat(params, joint="/"):
  leaves, _ = jax.tree_util.tree_flatten_with_path(params)
  return {jax.tree_util.keystr(path, simple=True, separator=joint): np.asarray(leaf) for path, leaf in leaves}


def as_torch(params):
  names = {"layers_": "model.layers.", "embed_tokens": "model.embed_tokens", "/": ".", "kernel": "weight"}
  result = {}
  for path, leaf in flat(params).items():
    name = path.replace("embedding", "weight")
    for old, new in names.items():
      name = name.replace(old, new)
    result[name] = np.ascontiguousarray(leaf.T) if path.endswith("kernel") else leaf
  return result


def run(capsys, *arguments, code=0):
  """The object that `--json` prints."""
  assert _cli.main([*map(str, arguments), "--json"]) == code
  return json.loads(capsys.readouterr().out)


def assert_close(got, want):
  assert list(got) == list(want)
  for name in want:
    assert got[name].dtype == want[name].dtype
    np.testing.assert_allclose(got[name].astype(np.float32), want[name].astype(np.float32), rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------------------------------------------------
# inspect.


@pytest.mark.parametrize("kind", ["checkpoint", "peft"])
def test_inspect_shows_either_format(capsys, folders, tree, kind):
  report = run(capsys, "inspect", folders / kind)
  assert report["format"] == {"checkpoint": "jaxlora", "peft": "peft"}[kind]
  rows = {leaf["path"].replace("/", "_").replace(".", "_"): leaf for leaf in report["leaves"]}
  (row,) = [leaf for name, leaf in rows.items() if "layers_1" in name]
  node = tree["layers_1"]["q_proj"]["kernel"]
  assert (row["rank"], row["alpha"], row["scale"], row["dtype"], row["nan"]) == (1, 0.5, 0.5, "float32", 0)
  np.testing.assert_allclose(row["norm"], np.linalg.norm(node.delta()), rtol=1e-5)
  np.testing.assert_allclose(row["a_norm"], np.linalg.norm(node.a), rtol=1e-5)
  assert report["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(jaxlora.split(tree)[1]))
  assert report["bytes"] == 4 * report["parameters"]
  assert _cli.main(["inspect", str(folders / kind)]) == 0
  text = capsys.readouterr().out
  assert "q_proj" in text
  assert f"{report['parameters']:,} parameters" in text
  if kind == "checkpoint":
    assert report["metadata"] == {"task": "summaries"}
    assert report["base"] == checkpoint.fingerprint(PARAMS)
    assert '"summaries"' in text


def test_inspect_of_stacked_roles_whole_leaves_and_nan(capsys, tmp_path):
  base = {"w": np.ones((3, 4, 5), np.float32), "b": np.ones(4, np.float32)}
  a, b = (np.asarray(array(k, (3, 2, n), jnp.float32)) for k, n in ((1, 4), (2, 5)))
  node = jaxlora.LoraWeight(base["w"], a, b, roles="sio", rank=2, alpha=3.0)
  whole = jaxlora.FullWeight(base["b"], np.array([3, 4, np.nan, 0], np.float32))
  with checkpoint.Manager(tmp_path / "run") as manager:
    manager.save(7, {"w": node, "b": whole}, {"m": a})
  report = run(capsys, "inspect", tmp_path / "run", code=1)
  assert (report["step"], report["training"], report["nan"]) == (7, True, 1)
  rows = {leaf["path"]: leaf for leaf in report["leaves"]}
  np.testing.assert_allclose(rows["w"]["norm"], np.linalg.norm(node.delta()), rtol=1e-5)
  assert rows["b"]["kind"] == "whole"
  assert rows["b"]["norm"] is None
  assert _cli.main(["inspect", str(tmp_path / "run" / "7")]) == 1
  assert "NaN or infinite values in b" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------------------
# convert.


def test_convert_to_peft_and_back_without_the_bases_values(capsys, tmp_path, folders, tree):
  report = run(
    capsys, "convert", folders / "checkpoint", tmp_path / "p", "--base-model", "org/base", "--task-type", "X"
  )
  assert report["formats"] == ["jaxlora", "peft"]
  config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
  assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "X")
  for file in (folders / "flax.safetensors", folders / "checkpoint"):  # names and shapes from either
    target = tmp_path / f"from {file.name}"
    run(capsys, "convert", tmp_path / "p", target, "--base", file)
    restored = checkpoint.restore(target, PARAMS)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
      assert np.array_equal(x, y)
    assert checkpoint.contents(target).metadata["peft"] == {"base_model_name_or_path": "org/base", "task_type": "X"}
  run(capsys, "convert", target, tmp_path / "again")  # what the first PEFT folder said goes along
  assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == config


def test_convert_from_peft_by_torchs_names(capsys, tmp_path):
  kernel = {"h": {"0": {"attn": {"c_attn": {"kernel": array(1, (4, 12), jnp.float32)}}}}}
  conv = {"stem": {"conv": {"kernel": array(2, (3, 3, 2, 5), jnp.float32)}}}
  params = {"transformer": {"wte": {"embedding": array(3, (7, 4), jnp.float32)}, **kernel, **conv}}
  tree = adapted(params, targets=["attn", "conv", "wte"], axes={".*conv/kernel": "iiio"})
  peft.save(tmp_path / "p", tree)
  run(capsys, "convert", tmp_path / "p", tmp_path / "c")
  more = {"transformer": params["transformer"] | {"ln_f": {"scale": jnp.ones(4)}}}  # no part of what was known
  restored = checkpoint.restore(tmp_path / "c", more)
  del restored["transformer"]["ln_f"]
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
    assert np.array_equal(x, y)


def test_convert_needs_the_base_where_a_layout_is_not_told(capsys, tmp_path):
  params = {"layers_0": {"q_proj": {"kernel": jnp.ones((6, 4))}}, "head": {"kernel": jnp.ones((4, 3))}}
  peft.save(tmp_path / "p", adapted(params, targets=["q_proj"], train=["head"]))
  assert "Pass --base FILE" in run(capsys, "convert", tmp_path / "p", tmp_path / "c", code=1)["error"]
  safetensors_numpy.save_file(flat(params, "."), tmp_path / "base.safetensors")
  run(capsys, "convert", tmp_path / "p", tmp_path / "c", "--base", tmp_path / "base.safetensors")
  assert list(checkpoint.contents(tmp_path / "c").leaves) == ["head/kernel", "layers_0/q_proj/kernel"]


# ----------------------------------------------------------------------------------------------------------------------
# merge.


@pytest.mark.parametrize("adapter", ["checkpoint", "peft"])
@pytest.mark.parametrize("base", ["flax", "torch"])
def test_merge_is_jaxloras_merge(capsys, tmp_path, folders, tree, base, adapter):
  out = tmp_path / "out.safetensors"
  report = run(capsys, "merge", folders / f"{base}.safetensors", folders / adapter, out)
  assert len(report["merged"]) == 3
  want = jaxlora.merge(tree)
  want = flat(want) if base == "flax" else as_torch(want)
  got = safetensors_numpy.load_file(out)
  assert_close({name: got[name] for name in want}, want)
  old = (folders / f"{base}.safetensors").read_bytes()
  header = 8 + struct.unpack("<Q", old[:8])[0]
  assert out.read_bytes()[:header] == old[:header]  # names, order, metadata


def test_merge_of_several_files_and_other_dtypes(capsys, tmp_path, tree):
  half = {name: value.astype(jnp.bfloat16) for name, value in as_torch(PARAMS).items()}
  half["other"] = np.arange(5, dtype=np.int64)
  base = tmp_path / "base"
  base.mkdir()
  parts = {"model-1.safetensors": sorted(half)[:3], "model-2.safetensors": sorted(half)[3:]}
  for file, names in parts.items():
    safetensors_numpy.save_file({name: half[name] for name in names}, base / file)
  index = {"metadata": {}, "weight_map": {name: file for file, names in parts.items() for name in names}}
  (base / "model.safetensors.index.json").write_text(json.dumps(index))
  peft.save(tmp_path / "p", tree)
  run(capsys, "merge", base, tmp_path / "p", tmp_path / "out")
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [*parts, "model.safetensors.index.json"]
  got = {name: value for file in parts for name, value in safetensors_numpy.load_file(tmp_path / "out" / file).items()}
  assert np.array_equal(got["other"], half["other"])
  want = as_torch(jaxlora.merge(tree))
  for name, value in want.items():
    assert got[name].dtype == jnp.bfloat16
    np.testing.assert_allclose(got[name].astype(np.float32), value, rtol=2e-2, atol=2e-2)
  assert "exists" in run(capsys, "merge", base, tmp_path / "p", tmp_path / "out", code=1)["error"]
  (base / "model-2.safetensors").write_bytes(b"0" * 30)
  error = run(capsys, "merge", base, tmp_path / "p", tmp_path / "new", code=1)["error"]
  assert "model-2.safetensors: cannot be read as safetensors" in error


def test_merge_finds_a_bare_models_names(capsys, tmp_path, folders, tree):
  """Files of a model without its head have names without the beginning."""
  bare = {name.removeprefix("model."): value for name, value in as_torch(PARAMS).items()}
  safetensors_numpy.save_file(bare, tmp_path / "bare.safetensors")
  run(capsys, "merge", tmp_path / "bare.safetensors", folders / "peft", tmp_path / "out.safetensors")
  got = safetensors_numpy.load_file(tmp_path / "out.safetensors")
  want = as_torch(jaxlora.merge(tree))
  assert_close({name: got[name.removeprefix("model.")] for name in want}, want)


def test_merge_checks_the_base(capsys, tmp_path, folders):
  other = flat(PARAMS)
  other["layers_1/q_proj/kernel"] = other["layers_1/q_proj/kernel"] + 1
  safetensors_numpy.save_file(other, tmp_path / "other.safetensors")
  arguments = ["merge", tmp_path / "other.safetensors", folders / "checkpoint", tmp_path / "out.safetensors"]
  error = run(capsys, *arguments, code=1)["error"]
  assert "layers_1/q_proj/kernel: float32[6,4]:" in error
  assert "--any-base" in error
  assert not list(tmp_path.glob("out*"))  # nothing half-written
  run(capsys, *arguments, "--any-base")
  del other["layers_1/q_proj/kernel"]
  safetensors_numpy.save_file(other, tmp_path / "other.safetensors")
  for adapter in ("checkpoint", "peft"):
    error = run(capsys, *arguments[:2], folders / adapter, arguments[3], code=1)["error"]
    assert "layers" in error
  error = run(capsys, "merge", folders / "flax.safetensors", folders / "peft", folders / "flax.safetensors", code=1)
  assert "is the base itself" in error["error"]


def zeros_file(path, count, shape):
  """Zeros that take no room on disk."""
  size = 4 * shape[0] * shape[1]
  entry = lambda k: {"dtype": "F32", "shape": list(shape), "data_offsets": [k * size, (k + 1) * size]}
  text = json.dumps({f"w{k}": entry(k) for k in range(count)}).encode()
  with open(path, "wb") as file:
    file.write(struct.pack("<Q", len(text)) + text)
    file.truncate(8 + len(text) + count * size)
  return 8 + len(text), size


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


# ----------------------------------------------------------------------------------------------------------------------
# Codes, help.


def test_bad_files_are_code_1_and_usage_is_code_2(capsys, tmp_path, folders):
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "adapter_config.json").write_text("{")
  for path in ("nothing", "empty", "broken"):
    assert path in run(capsys, "inspect", tmp_path / path, code=1)["error"]
  assert _cli.main(["inspect", str(tmp_path / "nothing")]) == 1
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("jaxlora: ")
  assert "Traceback" not in err
  error = run(capsys, "merge", tmp_path / "no.safetensors", folders / "peft", tmp_path / "out", code=1)["error"]
  assert "no.safetensors" in error
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}')
  assert "in its own folder" in run(capsys, "merge", tmp_path, folders / "peft", tmp_path / "out", code=1)["error"]
  for arguments in ([], ["inspect"], ["merge", "a"], ["unknown"], ["inspect", "a", "--unknown"]):
    with pytest.raises(SystemExit) as usage:
      _cli.main(arguments)
    assert usage.value.code == 2


def test_help_shows_an_example_of_each(capsys):
  for command in ("inspect", "convert", "merge"):
    with pytest.raises(SystemExit) as done:
      _cli.main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  jaxlora {command} " in text
    assert "exit codes: 0 done; 1" in text


def test_python_m_jaxlora(folders):
  done = subprocess.run(
    [sys.executable, "-m", "jaxlora", "inspect", folders / "checkpoint", "--json"],
    capture_output=True,
    text=True,
    check=True,
    cwd=Path(jaxlora.__file__).parent.parent,
  )
  assert json.loads(done.stdout)["step"] == 0
  assert not done.stderr
