"""`jaxlora merge` of folders as the Hub has them: which files are the model, and what goes along beside it."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jaxlora
from tests.cli.files import PARAMS, as_torch


@pytest.fixture
def hub(tmp_path):
  """Writes the model into a folder, in files of these stems; returns the folder."""

  def make(*stems, shards=0, inside="base", value=None):
    folder = tmp_path / inside
    folder.mkdir(parents=True, exist_ok=True)
    state = as_torch(PARAMS)
    for stem in stems:
      if not shards:
        save_file(state if value is None else {"other": value}, folder / f"{stem}.safetensors")
        continue
      names = {name: f"{stem}-{1 + k % shards:05d}-of-{shards:05d}.safetensors" for k, name in enumerate(sorted(state))}
      for file in set(names.values()):
        save_file({name: state[name] for name in names if names[name] == file}, folder / file)
      index = {"metadata": {"total_size": 1}, "weight_map": names}
      (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))
    return folder

  return make


def merged(out, tree):
  want = as_torch(jaxlora.merge(tree))
  got = {name: value for file in out.glob("*.safetensors") for name, value in load_file(file).items()}
  assert set(got) == set(want)
  for name, value in want.items():
    np.testing.assert_allclose(got[name], value, rtol=1e-5, atol=1e-6)


BESIDE = {
  "config.json": '{"a": 1}', "tokenizer.json": "{}", "tokenizer.model": "x", "chat_template.jinja": "y",
  "modeling_own.py": "z", "README.md": "r",
}  # fmt: skip
LEFT = ("pytorch_model.bin", "optimizer.pt", "model.gguf", ".gitattributes", "adapter_config.json", "tf_model.h5")


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
@pytest.mark.parametrize("shards", [0, 2])
@pytest.mark.parametrize("given", ["folder", "index"])
def test_a_folder_becomes_a_folder(run, tmp_path, hub, folders, tree, stem, shards, given):
  if given == "index" and not shards:
    pytest.skip("there is no index")
  folder = hub(stem, shards=shards)
  hub("consolidated", value=np.ones(3, np.float32))
  for name, text in BESIDE.items():
    (folder / name).write_text(text)
  for name in LEFT:
    (folder / name).write_text("no part of the merged model")
  (folder / "original").mkdir()
  base = folder if given == "folder" else folder / f"{stem}.safetensors.index.json"
  report = run("merge", base, folders / "peft", tmp_path / "out")
  merged(tmp_path / "out", tree)
  weights = [file.name for file in folder.iterdir() if file.name.startswith(stem) and "safetensors" in file.name]
  assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted([*weights, *BESIDE])
  assert sorted(report["carried"]) == sorted(BESIDE)
  for name, text in BESIDE.items():
    assert (tmp_path / "out" / name).read_text() == text
  if shards:
    assert "exists" in run("merge", base, folders / "peft", tmp_path / "out", code=1)["error"]


def test_a_folder_that_exists_keeps_its_own_files(run, tmp_path, hub, folders, tree):
  folder = hub("model")
  for name in ("config.json", "tokenizer.json"):
    (folder / name).write_text("{}")
  out = tmp_path / "out"
  out.mkdir()
  (out / "config.json").write_text('{"own": 1}')
  assert run("merge", folder, folders / "peft", out)["carried"] == ["tokenizer.json"]
  merged(out, tree)
  assert (out / "config.json").read_text() == '{"own": 1}'


def test_which_of_several_is_meant_has_to_be_said(run, tmp_path, hub, folders, tree):
  folder = hub("model")
  hub("model", shards=2)
  out = tmp_path / "out.safetensors"
  error = run("merge", folder, folders / "peft", out, code=1)["error"]
  assert "found model.safetensors.index.json, model.safetensors. Pass the one that is meant." in error
  run("merge", folder / "model.safetensors", folders / "peft", out)  # the remedy
  two = hub("one", "two", inside="others")
  assert "found one.safetensors, two.safetensors. Pass" in run("merge", two, folders / "peft", out, code=1)["error"]
  run("merge", two / "two.safetensors", folders / "peft", out)
  alone = hub("consolidated", inside="alone")
  run("merge", alone, folders / "peft", out)
  merged(tmp_path, tree)


def test_a_pipeline_names_its_models(run, tmp_path, hub, folders):
  hub("diffusion_pytorch_model", inside="pipeline/unet")
  (tmp_path / "pipeline" / "model_index.json").write_text("{}")
  error = run("merge", tmp_path / "pipeline", folders / "peft", tmp_path / "out", code=1)["error"]
  assert f"pass {tmp_path / 'pipeline' / 'unet'}, for instance" in error
  run("merge", tmp_path / "pipeline" / "unet", folders / "peft", tmp_path / "out")  # the remedy


def test_a_set_of_files_without_an_index_is_whole_or_refused(run, tmp_path, hub, folders, tree):
  folder = hub("model", shards=3)
  (folder / "model.safetensors.index.json").unlink()
  run("merge", folder, folders / "peft", tmp_path / "out")
  merged(tmp_path / "out", tree)
  (folder / "model-00002-of-00003.safetensors").unlink()
  assert "all files of one set" in run("merge", folder, folders / "peft", tmp_path / "o2", code=1)["error"]
