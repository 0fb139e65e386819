"""`jaxlora summary` and `explain` of a model given as module:function; pictures, completion, tables on terminals."""

import json
import subprocess
import sys

import pytest

from jaxlora import _cli
from jaxlora._cli import completion, show

MODEL = "tests.cli.small_models"


def test_summary_adapts_shapes_as_the_options_say(run, capsys, tmp_path):
  report = run("summary", f"{MODEL}:shapes", "--rank", 2, "--targets", "layers_(0|1)/kernel")
  assert [leaf["path"] for leaf in report["leaves"]] == ["layers_0/kernel", "layers_1/kernel"]
  assert report["trainable_parameters"] == 2 * 2 * 16
  assert report["leaves"][0]["roles"] == "io"
  file = tmp_path / "config.json"
  file.write_text(json.dumps({"rank": 4, "variant": "dora", "overrides": {".*_3/.*": {"rank": 1}}}))
  report = run("summary", f"{MODEL}:alone", "--config", file, "--rank", 3)
  assert [leaf["rank"] for leaf in report["leaves"]] == [3, 3, 3, 1]
  assert _cli.main(["summary", f"{MODEL}:shapes"]) == 0
  printed = capsys.readouterr().out
  assert "layers_{0-2}/kernel" in printed
  assert "trainable 384 of 256 parameters" in printed
  assert _cli.main(["summary", f"{MODEL}:shapes", "--all"]) == 0
  assert "layers_2/kernel" in capsys.readouterr().out


def test_explain_says_where_a_weight_is_materialised(run, capsys):
  report = run("explain", f"{MODEL}:adapted")
  assert report["materialized"] == 1
  assert {use["factored"] for use in report["uses"]} == {True, False}
  assert _cli.main(["explain", f"{MODEL}:shapes", "--rank", "2"]) == 0
  printed = capsys.readouterr().out
  assert "MATERIALISED" in printed
  assert "small_models.py" in printed
  assert "policy: " in printed


@pytest.mark.parametrize(
  ("arguments", "error"),
  [
    (["summary", "no_colon"], "found no module:function; expected a function of no argument"),
    (["summary", "no.such.module:f"], "ModuleNotFoundError: No module named 'no'"),
    (["summary", f"{MODEL}:nothing"], "has no attribute 'nothing'"),
    (["explain", f"{MODEL}:broken"], "RuntimeError: no weights here"),
    (["explain", f"{MODEL}:alone"], "found parameters alone; expected (function, parameters, *arguments)"),
    (["explain", f"{MODEL}:adapted", "--rank", "2"], "its parameters are adapted; expected plain ones beside --rank"),
    (["summary", f"{MODEL}:shapes", "--targets", "nowhere"], "nowhere"),
    (["summary", f"{MODEL}:shapes", "--config", "nowhere.json"], "nowhere.json"),
  ],
)
def test_what_cannot_be_reported_is_an_error(run, arguments, error):
  assert error in run(*arguments, code=1)["error"]


def test_config_files_hold_fields(run, tmp_path):
  file = tmp_path / "config.json"
  for text, error in (("[1]", "expected a JSON object"), ('{"ranks": 2}', "ranks"), ("{", "Expecting")):
    file.write_text(text)
    assert error in run("summary", f"{MODEL}:shapes", "--config", file, code=1)["error"]


def test_remedies_that_name_fields_of_the_config_are_ones_of_the_command(run, tmp_path):
  error = run("summary", f"{MODEL}:alone", "--rank", 9, code=1)["error"]
  assert "LoraConfig(overrides={'layers_0/kernel': {'rank': 8}})" in error
  assert "In a command LoraConfig(...) is --config FILE, in JSON." in error
  file = tmp_path / "config.json"
  file.write_text('{"overrides": {"layers_./kernel": {"rank": 8}}}')
  assert run("summary", f"{MODEL}:alone", "--rank", 9, "--config", file)["leaves"][0]["rank"] == 8


def test_a_module_in_the_folder_is_found(run, monkeypatch, tmp_path):
  """The installed command has its own folder ahead of the path, not the one it is started in."""
  (tmp_path / "mine.py").write_text(
    "import jax\n\ndef model():\n  return {'kernel': jax.ShapeDtypeStruct((4, 4), 'float32')}\n"
  )
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "path", [folder for folder in sys.path if folder])
  assert run("summary", "mine:model", "--rank", 2)["total_parameters"] == 16


def test_inspect_draws_a_picture(run, folders, tmp_path):
  pytest.importorskip("matplotlib", reason="pictures need jaxlora[cli]")
  file = tmp_path / "adapter.svg"
  report = run("inspect", folders / "checkpoint", "--plot", file)
  assert report["plot"] == str(file)
  assert "<svg" in file.read_text()
  assert "not supported" in run("inspect", folders / "peft", "--plot", tmp_path / "adapter.xyz", code=1)["error"]


def test_inspect_says_what_pictures_need(folders, monkeypatch, capsys, tmp_path):
  monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
  assert _cli.main(["inspect", str(folders / "peft"), "--plot", str(tmp_path / "a.png")]) == 2
  assert "pip install 'jaxlora[cli]'" in capsys.readouterr().err


def test_shells_complete_commands_and_files(capsys):
  pytest.importorskip("shtab", reason="completion needs jaxlora[cli]")
  for shell in ("bash", "zsh", "tcsh"):
    with pytest.raises(SystemExit) as done:
      _cli.main(["--print-completion", shell])
    assert done.value.code == 0
    script = capsys.readouterr().out
    assert all(command in script for command in ("inspect", "merge", "summary"))
    if shell == "bash":
      assert "--untie" in script
      assert "_shtab_compgen_files" in script
      assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_completion_says_what_it_needs(monkeypatch, capsys):
  monkeypatch.setattr(completion.importlib.util, "find_spec", lambda _: None)
  with pytest.raises(SystemExit) as done:
    _cli.main(["--print-completion", "bash"])
  assert done.value.code == 2
  assert "pip install 'jaxlora[cli]'" in capsys.readouterr().err


def test_tables_are_drawn_on_terminals_alone(monkeypatch, capsys):
  pytest.importorskip("rich")
  lines = ["head", show.Table([("leaf", "rank"), ("a/[b]", "8")])]
  show.show(lines)
  plain = capsys.readouterr().out
  assert plain == "head\nleaf   rank\n-----  ----\na/[b]  8\n"
  monkeypatch.setattr(show.sys.stdout, "isatty", lambda: True, raising=False)
  show.show(lines)
  drawn = capsys.readouterr().out
  assert "a/[b]" in drawn
  assert "─" in drawn or "━" in drawn
  monkeypatch.setitem(sys.modules, "rich.table", None)
  show.show(lines)
  assert capsys.readouterr().out == plain
