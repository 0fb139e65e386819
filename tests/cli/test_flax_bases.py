"""`jaxlora merge` and `convert` with bases as JAX users have them: Flax's msgpack files and orbax checkpoints."""

import json

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

import jaxlora
from jaxlora import checkpoint, peft
from jaxlora._files.msgpack import msgpack_tensors
from tests.cli.files import PARAMS, flat
from tests.helpers import adapted, array


def packed(folder, params=PARAMS):
  folder.mkdir()
  (folder / "flax_model.msgpack").write_bytes(flax.serialization.to_bytes(params))
  (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32"}))
  return folder


def saved(folder, tree):
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder, tree)
  return folder


BASES = {
  "a msgpack folder": lambda folder: packed(folder / "base"),
  "a msgpack file": lambda folder: packed(folder / "base") / "flax_model.msgpack",
  "orbax": lambda folder: saved(folder / "base", PARAMS),
  "orbax, under params": lambda folder: saved(folder / "base", {"params": PARAMS}),
  "MaxText's state": lambda folder: (
    saved(
      folder / "base" / "100" / "items",
      {"params": {"params": PARAMS}, "opt_state": {"mu": PARAMS}, "step": np.int32(100)},
    ).parent.parent
  ),
}


def assert_merged(got, tree):
  want = flat(jaxlora.merge(tree))
  bare = {name.replace("params/", ""): value for name, value in got.items()}
  assert set(bare) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(bare[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("adapter", ["checkpoint", "peft"])
@pytest.mark.parametrize("kind", BASES)
def test_merge_into_safetensors(run, tmp_path, folders, tree, kind, adapter):
  report = run("merge", BASES[kind](tmp_path), folders / adapter, tmp_path / "out.safetensors")
  assert len(report["merged"]) == 3
  assert_merged(load_file(tmp_path / "out.safetensors"), tree)


@pytest.mark.parametrize("chunk", [None, 80])
def test_a_msgpack_base_is_written_as_one(run, tmp_path, folders, tree, monkeypatch, chunk):
  if chunk:  # bytes above which an array is written in pieces
    monkeypatch.setattr(flax.serialization, "MAX_CHUNK_SIZE", chunk)
  base = packed(tmp_path / "base")
  run("merge", base, folders / "peft", tmp_path / "out")
  assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "flax_model.msgpack"]
  restored = flax.serialization.from_bytes(PARAMS, (tmp_path / "out" / "flax_model.msgpack").read_bytes())
  assert_merged(flat(restored), tree)
  run("merge", base / "flax_model.msgpack", folders / "peft", tmp_path / "out.msgpack")
  assert (tmp_path / "out.msgpack").read_bytes() == (tmp_path / "out" / "flax_model.msgpack").read_bytes()
  error = run("merge", base, folders / "peft", tmp_path / "o2", "--dtype", "bfloat16", code=1)["error"]
  assert "Write safetensors: o2.safetensors as OUT" in error
  run("merge", base, folders / "peft", tmp_path / "o2.safetensors", "--dtype", "bfloat16")  # the remedy
  assert load_file(tmp_path / "o2.safetensors")["layers_0/q_proj/kernel"].dtype == jnp.bfloat16


@pytest.mark.parametrize("under", [False, True])
def test_an_orbax_base_is_written_as_one(run, tmp_path, folders, tree, under):
  base = saved(tmp_path / "base", {"params": PARAMS} if under else PARAMS)
  run("merge", base, folders / "peft", tmp_path / "out")
  with ocp.PyTreeCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "out")
  assert_merged(flat(restored), tree)
  assert "exists" in run("merge", base, folders / "peft", tmp_path / "out", code=1)["error"]


def test_an_orbax_base_with_lists_keeps_them(run, tmp_path):
  layer = lambda k: {"q_proj": {"kernel": array(k, (6, 4), jnp.float32)}}
  params = {"layers": [layer(k) for k in range(11)], "norms": ({"scale": jnp.ones(3)},)}
  tree = adapted(params, targets=".*kernel")
  peft.save(tmp_path / "p", tree)
  saved(tmp_path / "base", params)
  run("merge", tmp_path / "base", tmp_path / "p", tmp_path / "out")
  with ocp.StandardCheckpointer() as checkpointer:
    restored = checkpointer.restore(tmp_path / "out", jax.tree.map(ocp.utils.to_shape_dtype_struct, params))
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), restored, jaxlora.merge(tree))


@pytest.mark.parametrize("kind", BASES)
def test_convert_reads_names_and_shapes_of_each(run, tmp_path, folders, tree, kind):
  run("convert", folders / "peft", tmp_path / "c", "--base", BASES[kind](tmp_path))
  found = checkpoint.contents(tmp_path / "c")
  assert {path.replace("params/", "") for path in found.leaves} == {
    "layers_0/q_proj/kernel", "layers_1/q_proj/kernel", "embed_tokens/embedding"
  }  # fmt: skip
  if kind in ("a msgpack folder", "orbax"):
    restored = checkpoint.restore(tmp_path / "c", PARAMS)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
      np.testing.assert_array_equal(x, y)


def test_what_is_no_base_is_refused(run, tmp_path, folders):
  out = tmp_path / "out.safetensors"
  for content in (b"", b"\x81\xa1a\x03", packed(tmp_path / "base").joinpath("flax_model.msgpack").read_bytes()[:200]):
    (tmp_path / "bad.msgpack").write_bytes(content)
    assert "bad.msgpack: " in run("merge", tmp_path / "bad.msgpack", folders / "peft", out, code=1)["error"]
  (tmp_path / "state" / "1" / "params").mkdir(parents=True)
  (tmp_path / "state" / "1" / "opt").mkdir()
  for item in ("params", "opt"):
    (tmp_path / "state" / "1" / item / "_METADATA").write_text("{}")
  assert "holds opt, params; pass the one" in run("merge", tmp_path / "state", folders / "peft", out, code=1)["error"]
  error = run("merge", tmp_path / "state" / "1" / "params", folders / "peft", out, code=1)["error"]
  assert "cannot be read by orbax" in error


def test_msgpack_values_are_those_that_flax_reads(tmp_path):
  tree = {
    "a": {"kernel": jnp.ones((3, 4), jnp.bfloat16), "0": np.arange(5, dtype=np.int8)},
    "l": [np.zeros((2, 0)), np.ones(())],
    "n": 3,
  }
  (tmp_path / "a.msgpack").write_bytes(flax.serialization.to_bytes(tree))
  found = msgpack_tensors(tmp_path / "a.msgpack")
  assert set(found) == {"a/kernel", "a/0", "l/0", "l/1"}
  for path, value in {"a/kernel": tree["a"]["kernel"], "a/0": tree["a"]["0"], "l/0": tree["l"][0]}.items():
    read = found[path].read()
    assert read.dtype == value.dtype
    np.testing.assert_array_equal(read, value)


def test_an_orbax_leaf_is_read_alone(run, tmp_path, folders, monkeypatch):
  """One leaf in memory at a time."""
  reads = []
  restore = ocp.PyTreeCheckpointer.restore

  def counted(self, *arguments, **options):
    restored = restore(self, *arguments, **options)
    reads.append(sum(leaf is not ... for leaf in jax.tree.leaves(restored)))
    return restored

  monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", counted)
  run("merge", saved(tmp_path / "base", PARAMS), folders / "peft", tmp_path / "out.safetensors")
  assert reads == [1] * 5
