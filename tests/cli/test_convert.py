"""`jaxlora convert`: either format becomes the other, by one reading and one writing."""

import json

from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxlora import checkpoint, peft
from tests.cli.files import PARAMS, flat
from tests.helpers import adapted, array


def test_convert_to_peft_and_back_without_the_bases_values(run, tmp_path, folders, tree):
  report = run(
    "convert", folders / "checkpoint", tmp_path / "p", "--base-model", "org/base", "--task-type", "CAUSAL_LM"
  )
  assert report["formats"] == ["jaxlora", "peft"]
  config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
  assert (config["base_model_name_or_path"], config["task_type"]) == ("org/base", "CAUSAL_LM")
  for file in (folders / "flax.safetensors", folders / "checkpoint"):  # names and shapes from either
    target = tmp_path / f"from {file.name}"
    run("convert", tmp_path / "p", target, "--base", file)
    restored = checkpoint.restore(target, PARAMS)
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
      assert np.array_equal(x, y)
    assert checkpoint.contents(target).metadata["peft"] == {
      "base_model_name_or_path": "org/base",
      "task_type": "CAUSAL_LM",
    }
  run("convert", target, tmp_path / "again")  # what the first PEFT folder said goes along
  assert json.loads((tmp_path / "again" / "adapter_config.json").read_text()) == config


def test_convert_from_peft_by_torchs_names(run, tmp_path):
  kernel = {"h": {"0": {"attn": {"c_attn": {"kernel": array(1, (4, 12), jnp.float32)}}}}}
  conv = {"stem": {"conv": {"kernel": array(2, (3, 3, 2, 5), jnp.float32)}}}
  params = {"transformer": {"wte": {"embedding": array(3, (7, 4), jnp.float32)}, **kernel, **conv}}
  tree = adapted(params, targets=["attn", "conv", "wte"], axes={".*conv/kernel": "iiio"})
  peft.save(tmp_path / "p", tree)
  run("convert", tmp_path / "p", tmp_path / "c")
  more = {"transformer": params["transformer"] | {"ln_f": {"scale": jnp.ones(4)}}}  # no part of what was known
  restored = checkpoint.restore(tmp_path / "c", more)
  del restored["transformer"]["ln_f"]
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
    assert np.array_equal(x, y)


def test_what_was_converted_without_a_base_and_does_not_fit_one(run, tmp_path):
  """Kernels split into heads, under `params`: the error names two ways, and both are gone here."""
  params = {"params": {"layers_0": {"q_proj": {"kernel": array(1, (6, 2, 4), jnp.float32)}}}}
  tree = adapted(params, targets=["q_proj"], axes={".*": "ioo"})
  peft.save(tmp_path / "p", tree)
  run("convert", tmp_path / "p", tmp_path / "c")
  with pytest.raises(checkpoint.CheckpointError, match=r"--base FILE, or .* jaxlora\.peft\.load\(folder, params\)"):
    checkpoint.load(tmp_path / "c", params)
  save_file(flat(params, "/"), tmp_path / "base.safetensors")
  run("convert", tmp_path / "p", tmp_path / "again", "--base", tmp_path / "base.safetensors")
  for loaded in (checkpoint.load(tmp_path / "again", params), peft.load(tmp_path / "p", params)):
    assert jax.tree.structure(loaded) == jax.tree.structure(tree)
    for x, y in zip(jax.tree.leaves(loaded), jax.tree.leaves(tree), strict=True):
      assert np.array_equal(x, y)


def test_convert_needs_the_base_where_a_layout_is_not_told(run, tmp_path):
  params = {"layers_0": {"q_proj": {"kernel": jnp.ones((6, 4))}}, "head": {"kernel": jnp.ones((4, 3))}}
  peft.save(tmp_path / "p", adapted(params, targets=["q_proj"], train=["head"]))
  assert "Pass --base FILE" in run("convert", tmp_path / "p", tmp_path / "c", code=1)["error"]
  save_file(flat(params, "."), tmp_path / "base.safetensors")
  run("convert", tmp_path / "p", tmp_path / "c", "--base", tmp_path / "base.safetensors")
  assert list(checkpoint.contents(tmp_path / "c").leaves) == ["head/kernel", "layers_0/q_proj/kernel"]


def test_convert_reads_once_and_writes_once(run, tmp_path, folders, touched, monkeypatch):
  monkeypatch.setattr(peft.Module, "delta", None)  # shapes come from the factors
  for base in (["--base", folders / "flax.safetensors"], []):
    touched.clear()
    run("convert", folders / "peft", tmp_path / f"c{len(base)}", *base)
    labels = [label for label in touched if not label.startswith("read adapter_model.safetensors from byte")]
    assert set(touched.values()) == {1}
    assert len(touched) - len(labels) == 8  # two factors of four modules, the tied head among them, each read once
    assert sorted(labels) == [
      "read adapter_config.json",
      "read the header of adapter_model.safetensors",
      "wrote a checkpoint",
    ]
  touched.clear()
  run("convert", folders / "checkpoint", tmp_path / "p")
  assert dict(touched) == {
    "read a checkpoint": 1,
    "wrote adapter_model.safetensors": 1,
    "wrote adapter_config.json": 1,
  }


def test_names_of_a_json_file_join_and_split(run, tmp_path):
  kernel = lambda seed, *shape: {"kernel": array(seed, shape, jnp.float32)}
  params = {"layers_0": {"q": kernel(1, 6, 4), "k": kernel(2, 6, 2), "gate_up": kernel(3, 6, 8)}}
  tree = adapted(params)
  checkpoint.save(tmp_path / "run", tree)
  names = tmp_path / "names.json"
  names.write_text(
    json.dumps(
      {
        r"layers_(\d)/[qk]": {"joined": r"h.\1.qk", "parts": ["q", "k"], "groups": 2},
        r"layers_(\d)/gate_up": {"split": [r"h.\1.gate", r"h.\1.up"], "sizes": [1, 1]},
      }
    )
  )
  run("convert", tmp_path / "run", tmp_path / "p", "--names", names)
  config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
  assert config["target_modules"] == ["gate", "qk", "up"]
  save_file(flat(params, "."), tmp_path / "base.safetensors")
  run("convert", tmp_path / "p", tmp_path / "again", "--names", names, "--base", tmp_path / "base.safetensors")
  restored = checkpoint.restore(tmp_path / "again", params)
  for x, y in zip(jax.tree.leaves(restored), jax.tree.leaves(tree), strict=True):
    assert np.array_equal(x, y)
  for wrong, message in (('{"a": {"joined": 1}}', "expected a torch name"), ('["a"]', "expected a dict of regexes")):
    names.write_text(wrong)
    assert message in run("convert", tmp_path / "run", tmp_path / "q", "--names", names, code=1)["error"]


def test_to_and_from_other_libraries(run, tmp_path):
  params = {"layers_0": {"q_proj": {"kernel": array(1, (6, 4), jnp.float32)}}}
  tree = adapted(params)
  checkpoint.save(tmp_path / "run", tree)
  assert run("convert", tmp_path / "run", tmp_path / "mlx", "--to", "mlx-lm")["formats"] == ["jaxlora", "mlx-lm"]
  run("convert", tmp_path / "mlx", tmp_path / "p", "--to", "peft", "--base-model", "org/base")
  assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"
  run("convert", tmp_path / "p", tmp_path / "again", "--to", "mlx-lm")
  save_file(flat(params, "."), tmp_path / "base.safetensors")
  run("convert", tmp_path / "again", tmp_path / "c", "--base", tmp_path / "base.safetensors")
  for x, y in zip(jax.tree.leaves(checkpoint.restore(tmp_path / "c", params)), jax.tree.leaves(tree), strict=True):
    assert np.array_equal(x, y)
  report = run("inspect", tmp_path / "mlx")
  assert (report["format"], report["leaves"][0]["rank"]) == ("mlx-lm", 2)
  assert "--to jaxlora" in run("convert", tmp_path / "run", tmp_path / "x", "--to", "jaxlora", code=1)["error"]


def test_kohyas_names_need_a_base_to_become_torchs(run, tmp_path):
  name = "lora_unet_down_blocks_0_attentions_0_to_q"
  factors = {
    f"{name}.lora_down.weight": array(1, (2, 6), jnp.float32),
    f"{name}.lora_up.weight": array(2, (4, 2), jnp.float32),
  }
  save_file({key: np.asarray(x) for key, x in factors.items()}, tmp_path / "style.safetensors")
  base = {"down_blocks_0": {"attentions_0": {"to_q": {"kernel": array(3, (6, 4), jnp.float32)}}}}
  save_file(flat(base, "."), tmp_path / "base.safetensors")
  source = tmp_path / "style.safetensors"
  error = run("convert", source, tmp_path / "p", "--to", "peft", code=1)["error"]
  assert "Convert it to a checkpoint with --base FILE first" in error
  error = run("check", source, "--serve", "peft", "--write", tmp_path / "p", code=1)["error"]
  assert "Convert it to a checkpoint with --base FILE first" in error
  assert not (tmp_path / "p").exists()
  assert run("inspect", source)["format"] == "kohya"
  run("convert", source, tmp_path / "c", "--base", tmp_path / "base.safetensors")
  run("convert", tmp_path / "c", tmp_path / "p")
  assert list(peft.to_modules(checkpoint.restore(tmp_path / "c", base)).modules) == ["down_blocks.0.attentions.0.to_q"]
  assert json.loads((tmp_path / "p" / "adapter_config.json").read_text())["r"] == 2


def test_dora_on_some_modules_makes_no_peft_folder(run, tmp_path):
  factors = {f"unet.{name}.lora_{half}.weight": np.ones((2, 2), np.float32) for name in "xy" for half in "AB"}
  save_file({**factors, "unet.x.lora_magnitude_vector": np.ones(2, np.float32)}, tmp_path / "dora.safetensors")
  error = run("convert", tmp_path / "dora.safetensors", tmp_path / "p", "--to", "peft", code=1)["error"]
  assert "y: no DoRA, while other modules are" in error
  assert not (tmp_path / "p").exists()


def test_qwixs_factors_in_an_orbax_checkpoint(run, tmp_path):
  import orbax.checkpoint as ocp

  a, b = array(1, (6, 2), jnp.float32), array(2, (2, 2, 4), jnp.float32)
  leaf = {"w_lora_a": jnp.asarray(a), "w_lora_b": jnp.asarray(b)}
  with ocp.StandardCheckpointer() as saver:
    saver.save(tmp_path / "qwix", {"layers": {"0": {"attn": {"q_proj": leaf}}}})
  assert "Convert it first: jaxlora convert" in run("inspect", tmp_path / "qwix", code=1)["error"]
  assert "Say alpha=" in run("convert", tmp_path / "qwix", tmp_path / "p", code=1)["error"]
  assert run("convert", tmp_path / "qwix", tmp_path / "p", "--alpha", "4")["formats"] == ["flax", "peft"]
  loaded = peft.load(tmp_path / "p", {"layers": {"0": {"attn": {"q_proj": {"kernel": jnp.zeros((6, 8))}}}}})
  found = np.asarray(loaded["layers"]["0"]["attn"]["q_proj"]["kernel"].materialize())
  np.testing.assert_allclose(found, 2 * np.asarray(a) @ np.asarray(b).reshape(2, 8), rtol=1e-5, atol=1e-5)
  save_file({f"layers/0/attn/q_proj/{name}": np.asarray(x) for name, x in leaf.items()}, tmp_path / "q.safetensors")
  assert "Convert it first: jaxlora convert" in run("inspect", tmp_path / "q.safetensors", code=1)["error"]
  run("convert", tmp_path / "q.safetensors", tmp_path / "p2", "--alpha", "4")
  assert peft.check(tmp_path / "p2", "peft") == []
  run("convert", tmp_path / "qwix", tmp_path / "m", "--alpha", "4", "--to", "mlx-lm")
  assert run("inspect", tmp_path / "m")["leaves"][0]["scale"] == 2.0


def as_json(path, value):
  path.write_text(json.dumps(value))
  return path


def test_axes_of_a_json_file(run, tmp_path):
  """A checkpoint of a square weight that nothing tells the layout of, and qwix's factors beside one."""
  params = {"q": {"other": array(1, (8, 8), jnp.float32)}}
  checkpoint.save(tmp_path / "c", adapted(params, targets=".*"))
  names = as_json(tmp_path / "names.json", {"q/other": "q.weight"})
  error = run("convert", tmp_path / "c", tmp_path / "p", "--names", names, code=1)["error"]
  assert "axes={'q/other': 'io' or 'oi'}" in error
  assert "In a command axes= is --axes FILE, in JSON." in error
  for roles in ("io", "oi"):
    axes = as_json(tmp_path / "axes.json", {"q/other": roles})
    run("convert", tmp_path / "c", tmp_path / f"p{roles}", "--names", names, "--axes", axes)
    back = tmp_path / f"b{roles}"
    save_file(flat(params, "/"), tmp_path / "base.safetensors")
    run(
      "convert", tmp_path / f"p{roles}", back, "--names", names, "--axes", axes, "--base", tmp_path / "base.safetensors"
    )
    assert checkpoint.load(back, params, strict=False)["q"]["other"].roles == roles
  error = run("convert", tmp_path / "poi", tmp_path / "x", "--axes", axes, code=1)["error"]
  assert "Pass it with --base FILE" in error

  weight, a, b = (np.asarray(array(2, shape, jnp.float32)) for shape in ((8, 8), (8, 2), (2, 8)))
  leaves = {"q": {"w": weight, "w_lora_a": a, "w_lora_b": b}}
  (tmp_path / "qwix.msgpack").write_bytes(serialization.msgpack_serialize(leaves))
  flags = ("convert", tmp_path / "qwix.msgpack", tmp_path / "q", "--alpha", "4")
  assert "--axes FILE" in run(*flags, code=1)["error"]
  run(*flags, "--axes", as_json(tmp_path / "qwix.json", {"q/w": "io"}))
  module = peft.load(tmp_path / "q", {"q": {"kernel": jnp.zeros((8, 8))}})["q"]["kernel"]
  np.testing.assert_allclose(module.materialize(), 2 * np.asarray(a) @ np.asarray(b), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("content", ["[]", '{"q": "xy"}', '{"q": 3}', "{"])
def test_axes_that_are_none(run, tmp_path, folders, content):
  (tmp_path / "axes.json").write_text(content)
  error = run("convert", folders / "checkpoint", tmp_path / "p", "--axes", tmp_path / "axes.json", code=1)["error"]
  assert error.startswith(f"{tmp_path / 'axes.json'}: ")
