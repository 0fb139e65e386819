"""Where benchmarks and studies write: into an ignored folder, and into recorded results with --record alone."""

import importlib
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import pytest

import jaxlora
from tests.helpers import bench_scripts
from tests.helpers.paths import BENCHMARKS, EXAMPLES, ROOT

for package in ("sklearn", "matplotlib", "rouge_score", "tqdm", "tokenizers", "safetensors"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

CLAIMS = ("train_step", "forward", "memory", "compile_time", "serving", "variants")
STUDIES = ("finetune", "summarize", "sentence_encoder")
TINY = ["--d=64", "--layers=1", "--batch=2", "--seq=8", "--rank=2", "--vocabulary=32", "--rounds=1", "--quiet"]


@pytest.fixture(scope="module")
def bench():
  with bench_scripts.modules(*CLAIMS, *STUDIES, "harness", "report") as found:
    yield found


@pytest.fixture
def elsewhere(bench, tmp_path, monkeypatch):
  """Moves a script's folders below `tmp_path`: they are found by the script's file."""

  def move(name: str) -> Path:
    home = EXAMPLES if name in STUDIES else BENCHMARKS
    monkeypatch.setattr(getattr(bench, name), "__file__", str(tmp_path / home.name / f"{name}.py"))
    return tmp_path / home.name / "results"

  return move


@pytest.mark.parametrize(
  ("name", "command"),
  [
    pytest.param(
      "finetune_conv",
      ["examples/finetune.py", "--quick", "--model=conv", "--steps=2", "--pretrain-steps=2", "--rounds=1"],
      marks=pytest.mark.nightly,  # studies write as benchmarks do, by the same functions
    ),
    ("forward", ["benchmarks/forward.py", "--quick", *TINY]),
  ],
)
def test_a_run_leaves_a_checkout_clean(tmp_path, name, command):
  if shutil.which("git") is None or not (ROOT / ".gitignore").exists():
    pytest.skip("needs git, and a checkout")
  checkout = tmp_path / "checkout"
  for folder in (BENCHMARKS, EXAMPLES):
    shutil.copytree(folder, checkout / folder.name, ignore=shutil.ignore_patterns("__pycache__"))
  shutil.copy(ROOT / ".gitignore", checkout)

  def git(*args: str) -> str:
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    return subprocess.run(["git", *identity, *args], cwd=checkout, check=True, capture_output=True, text=True).stdout

  git("init", "--quiet")
  git("add", "--all")
  git("commit", "--quiet", "--message=all")
  # jaxlora is the one that these tests import, whether or not it is installed.
  path = os.pathsep.join([str(Path(jaxlora.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])])
  subprocess.run(
    [sys.executable, *command], cwd=checkout, check=True, capture_output=True, env={**os.environ, "PYTHONPATH": path}
  )
  script = Path(command[0]).stem
  assert {path.name for path in (checkout / "out" / name).iterdir()} >= {f"{script}.json", f"{script}.png"}
  assert git("status", "--porcelain") == ""


def test_recorded_results_are_what_tables_are_made_from(bench, elsewhere, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(bench.harness, "calls_per_turn", bench_scripts.one_call)
  results = elsewhere("forward")
  bench.forward.main([*TINY, "--record"])
  assert "Recorded in" in capsys.readouterr().err
  for folder in (tmp_path / "out", results):
    assert {path.name for path in (folder / "forward").iterdir()} == {"forward.json", "forward.png"}
  recorded = json.loads((results / "forward" / "forward.json").read_text())
  assert "record" not in recorded["settings"]
  assert not any(str(tmp_path) in text for text in map(str, recorded["settings"].values()))
  page = tmp_path / "page.md"
  page.write_text("<!-- table: forward -->\n<!-- end -->\n")
  assert bench.report.main([str(page), f"--results={results}"]) == 0
  assert bench.forward.tables(recorded) in page.read_text()


@pytest.mark.parametrize("name", [*CLAIMS, *STUDIES])
def test_a_quick_run_cannot_be_recorded(bench, elsewhere, name, capsys, tmp_path):
  elsewhere(name)
  with pytest.raises(SystemExit) as caught:
    getattr(bench, name).main(["--quick", "--record"])
  assert caught.value.code == 2
  assert "--quick measures too little for a table; leave one of them out" in capsys.readouterr().err
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", [*CLAIMS, *STUDIES])
def test_a_table_belongs_to_its_script(bench, name):
  """Every script that can record has a table, and records where the table looks for its result."""
  home = EXAMPLES if name in STUDIES else BENCHMARKS
  tables = [table for table in bench.report.TABLES.values() if (ROOT / table.script) == home / f"{name}.py"]
  parser = getattr(bench, name).make_parser() if hasattr(getattr(bench, name), "make_parser") else None
  recorded = parser.get_default("recorded") if parser else home / "results" / name
  assert recorded / f"{name}.json" in {table.recorded() for table in tables}
  for table in tables:
    module, function = table.function.split(":")
    assert callable(getattr(importlib.import_module(module), function))


def test_another_result_of_a_script_has_folders_of_its_own(bench):
  parser = bench.train_step.make_parser()
  args = bench.harness.parse(parser, ["--suite", "--record"])
  bench.harness.rename(parser, args, "train_step_suite")
  assert args.out == ROOT / "out" / "train_step_suite"
  assert args.recorded == BENCHMARKS / "results" / "train_step_suite"
  args = parser.parse_args(["--out=/somewhere"])
  bench.harness.rename(parser, args, "train_step_suite")
  assert args.out == Path("/somewhere")  # as it was asked for


def test_finished_runs_are_not_reused_after_a_change_anywhere_in_the_library(bench, tmp_path, monkeypatch):
  (tmp_path / "inner" / "folder").mkdir(parents=True)
  file = tmp_path / "inner" / "folder" / "module.py"
  file.write_text("x = 1\n")
  monkeypatch.setattr(jaxlora, "__file__", str(tmp_path / "__init__.py"))
  before = bench.harness.source_digest()
  file.write_text("x = 2\n")
  assert bench.harness.source_digest() != before


@pytest.mark.parametrize("document", ["README.md", "benchmarks/README.md", "examples/README.md"])
def test_documents_name_scripts_and_plots_that_exist(document):
  text = (ROOT / document).read_text()
  scripts = set(re.findall(r"(?<![\w/])((?:benchmarks|examples)/[\w/]+\.py)\b", text))
  plots = {f"{Path(document).parent}/{plot}" for plot in re.findall(r"!\[\]\(([^)]+)\)", text)}
  assert scripts
  assert [name for name in sorted(scripts | plots) if not (ROOT / name).exists()] == []
