"""The command line itself: exit codes, help, and the ways to start it."""

import json
from pathlib import Path
import subprocess
import sys

import pytest

import jaxlora
from jaxlora import _cli


def test_bad_files_are_code_1_and_usage_is_code_2(run, capsys, tmp_path, folders):
  (tmp_path / "empty").mkdir()
  (tmp_path / "broken").mkdir()
  (tmp_path / "broken" / "adapter_config.json").write_text("{")
  for path in ("nothing", "empty", "broken"):
    assert path in run("inspect", tmp_path / path, code=1)["error"]
  assert _cli.main(["inspect", str(tmp_path / "nothing")]) == 1
  out, err = capsys.readouterr()
  assert not out
  assert err.startswith("jaxlora: ")
  assert "Traceback" not in err
  error = run("merge", tmp_path / "no.safetensors", folders / "peft", tmp_path / "out", code=1)["error"]
  assert "no.safetensors" in error
  (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"w": "../../etc/passwd"}}')
  assert "in its own folder" in run("merge", tmp_path, folders / "peft", tmp_path / "out", code=1)["error"]
  for arguments in ([], ["inspect"], ["merge", "a"], ["unknown"], ["inspect", "a", "--unknown"]):
    with pytest.raises(SystemExit) as usage:
      _cli.main(arguments)
    assert usage.value.code == 2


def test_help_shows_an_example_of_each(capsys):
  for command in ("inspect", "check", "convert", "merge", "summary", "explain"):
    with pytest.raises(SystemExit) as done:
      _cli.main([command, "--help"])
    assert done.value.code == 0
    text = capsys.readouterr().out
    assert f"example:\n  jaxlora {command} " in text
    assert "exit codes: 0 done; 1" in text


def test_python_m_jaxlora(run, folders):
  done = subprocess.run(
    [sys.executable, "-m", "jaxlora", "inspect", folders / "checkpoint", "--json"],
    capture_output=True,
    text=True,
    check=True,
    cwd=Path(jaxlora.__file__).parent.parent,
  )
  assert json.loads(done.stdout)["step"] == 0
  assert not done.stderr
