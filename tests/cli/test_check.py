"""`jaxlora check`: what readers make of a folder, told with a remedy and a source, and the folder that they read."""

import json
import re

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxlora import _cli, peft
from jaxlora.peft._read import read
from tests.cli.files import PARAMS, as_torch, flat
from tests.helpers import adapted
from tests.peft.readers import READERS


@pytest.fixture
def folder(tmp_path):
  overrides = {"layers_1/.*": {"rank": 1, "alpha": 0.5}}
  tree = adapted(PARAMS, alpha=6, rank=3, targets=["q_proj"], overrides=overrides)
  peft.save(tmp_path / "adapter", tree)
  return tmp_path / "adapter"


def test_what_is_wrong_is_told_with_a_remedy_and_a_source(run, capsys, folder):
  report = run("check", folder, "--serve", "vllm", "--serve", "peft", code=1)
  (problem,) = report["problems"]
  assert (problem["reader"], problem["rule"]) == ("vllm", "scale")
  assert problem["found"] == ["model.layers.1.q_proj: scale 0.5, read as 2"]
  assert problem["source"].startswith("vllm/lora/peft_helper.py")
  assert "jaxlora.peft.save(..., serve='vllm')" in problem["remedy"]
  assert _cli.main(["check", str(folder), "--serve", "vllm"]) == 1
  text = capsys.readouterr().out
  assert "vllm, scale: expected that every module's scale is lora_alpha / r" in text
  assert "jaxlora check FOLDER --serve vllm --write OUT. (Source: vllm/lora/peft_helper.py" in text
  assert "nobody will read it as it is meant" in text
  assert run("check", folder, "--serve", "peft")["problems"] == []


def test_the_remedy_of_a_message_works(run, folder, tmp_path):
  """The very command that the message names."""
  (problem,) = run("check", folder, "--serve", "vllm", code=1)["problems"]
  command = re.search(r"jaxlora (check FOLDER --serve vllm --write OUT)", problem["remedy"])[1]
  words = {"FOLDER": folder, "OUT": tmp_path / "served"}
  assert run(*(words.get(word, word) for word in command.split()))["problems"] == []
  assert (
    run("check", tmp_path / "served", "--serve", "vllm", "--serve", "peft", "--serve", "llama.cpp")["problems"] == []
  )
  for reader in ("vllm", "llama.cpp"):
    for name, update in READERS[reader](tmp_path / "served").items():
      np.testing.assert_allclose(update, read(folder).modules[name].delta(), rtol=1e-6, atol=1e-7)


def test_an_adapter_in_several_files_is_written_as_one(run, folder, tmp_path):
  file = folder / "adapter_model.safetensors"
  tensors = load_file(file)
  file.unlink()
  for k, name in enumerate(sorted(tensors), 1):
    save_file({name: tensors[name]}, folder / f"adapter_model-{k:05}-of-{len(tensors):05}.safetensors")
  assert [problem["rule"] for problem in run("check", folder, "--serve", "peft", code=1)["problems"]] == ["file"]
  assert run("inspect", folder)["format"] == "peft, in several files"
  run("check", folder, "--serve", "peft", "--write", tmp_path / "served")  # the remedy
  assert run("check", tmp_path / "served", "--serve", "peft")["problems"] == []
  found = load_file(tmp_path / "served" / "adapter_model.safetensors")
  assert found.keys() == tensors.keys()
  for name, tensor in tensors.items():
    np.testing.assert_array_equal(found[name], tensor)


def test_notes_do_not_count(run, folder):
  report = run("check", folder, "--serve", "llama.cpp", code=1)
  assert [note["rule"] for note in report["notes"]] == ["base"]
  assert [problem["rule"] for problem in report["problems"]] == ["scale"]


def test_what_cannot_be_made_is_refused(run, folder, tmp_path, capsys):
  report = run("check", folder, "--serve", "sglang", "--write", tmp_path / "served", code=1)
  assert "sglang, fused: expected that q_proj and v_proj are adapted together" in report["error"]
  assert not (tmp_path / "served").exists()
  report = run("check", folder, "--write", folder, code=1)
  assert "is the folder itself; expected another one" in report["error"]
  with pytest.raises(SystemExit):
    _cli.main(["check", str(folder), "--serve", "vLLM"])
  assert "invalid choice: 'vLLM'" in capsys.readouterr().err


def test_other_methods_and_folders_of_several(run, folder, tmp_path):
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"layer_replication": [[0, 2]]}))
  report = run("check", folder, "--serve", "vllm", code=1)
  assert [problem["rule"] for problem in report["problems"]] == ["scale", "method"]
  assert report["unsupported"]
  report = run("check", folder, "--serve", "vllm", "--write", tmp_path / "served", code=1)
  assert "layer_replication: layers that share their base: not supported" in report["error"]
  report = run("check", tmp_path, code=1)
  assert "Say which one: adapter_name='adapter'" in report["error"]
  assert run("check", tmp_path, "--adapter-name", "adapter", "--serve", "vllm", code=1)["problems"]


def test_every_command_reads_one_of_several_adapters(run, folder, tmp_path, capsys):
  tensors = load_file(folder / "adapter_model.safetensors")
  named = tmp_path / "named"
  named.mkdir()
  (named / "adapter_config.json").write_bytes((folder / "adapter_config.json").read_bytes())
  save_file(
    {
      key.replace(".weight", f".{name}.weight"): value * scale
      for key, value in tensors.items()
      for name, scale in (("default", 1), ("other", 2))
    },
    named / "adapter_model.safetensors",
  )
  save_file(as_torch(PARAMS), tmp_path / "torch.safetensors")
  for place, name in ((tmp_path, "adapter"), (named, "other")):
    for command in (["inspect", place], ["check", place], ["convert", place, tmp_path / "c"],
                    ["merge", tmp_path / "torch.safetensors", place, tmp_path / "merged.safetensors"]):  # fmt: skip
      said = run(*command, code=1)["error"]
      assert "Say which" in said
      assert "adapter_name=" in said
    norm = run("inspect", place, "--adapter-name", name)["leaves"][0]["norm"]
    np.testing.assert_allclose(
      norm, run("inspect", folder)["leaves"][0]["norm"] * (4 if name == "other" else 1), rtol=1e-6
    )
    run("convert", place, tmp_path / f"c {name}", "--adapter-name", name)
    run("merge", tmp_path / "torch.safetensors", place, tmp_path / "merged.safetensors", "--adapter-name", name)


def test_convert_for_a_server(run, folder, tmp_path):
  run("convert", folder, tmp_path / "checkpoint")
  run("convert", tmp_path / "checkpoint", tmp_path / "again", "--serve", "vllm", "--serve", "llama.cpp")
  assert run("check", tmp_path / "again", "--serve", "vllm", "--serve", "llama.cpp")["problems"] == []
  said = run("convert", folder, tmp_path / "no", "--serve", "vllm", code=1)["error"]
  assert "jaxlora check FOLDER --serve READER --write OUT does it" in said


def test_layers_that_a_file_lacks_are_told(run, folder, tmp_path):
  """A file that lost a layer: the commands go on without it, and say so."""
  kept = {key: value for key, value in load_file(folder / "adapter_model.safetensors").items() if "layers.1" not in key}
  save_file(kept, folder / "adapter_model.safetensors")
  path = folder / "adapter_config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": ["q_proj"], "rank_pattern": {}}))
  save_file(as_torch(PARAMS), tmp_path / "torch.safetensors")
  save_file(flat(PARAMS), tmp_path / "flax.safetensors")
  for base in ("torch", "flax"):
    with pytest.warns(peft.PeftWarning, match=r"target_modules names [\w/]*layers.1/q_proj/\w+, and the file holds no"):
      run("merge", tmp_path / f"{base}.safetensors", folder, tmp_path / "merged.safetensors")
  with pytest.warns(peft.PeftWarning, match="target_modules names layers_1/q_proj/kernel"):
    run("convert", folder, tmp_path / "checkpoint", "--base", tmp_path / "flax.safetensors")
