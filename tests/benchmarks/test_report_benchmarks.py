"""benchmarks/report.py: every measured table of the READMEs is what the results say."""

import re
import shutil

import pytest

from tests.helpers import bench_scripts
from tests.helpers.paths import BENCHMARKS

for package in ("sklearn", "matplotlib", "tqdm", "tokenizers", "safetensors"):
  pytest.importorskip(package, reason="benchmarks need jaxlora[bench]")

PAGE = "# Claim\n\n<!-- table: forward -->\n| typed | by hand |\n<!-- end -->\n\nAnd more.\n"


@pytest.fixture(scope="module")
def report():
  with bench_scripts.modules("report") as bench:
    yield bench.report


def test_no_table_is_stale(report, capsys):
  assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_every_result_that_is_kept_is_shown(report):
  text = "".join(document.read_text() for document in report.DOCUMENTS)
  shown = set(re.findall(r"<!-- table: ([\w-]+) -->", text))
  kept = {name for name, table in report.TABLES.items() if table.recorded().exists()}
  assert shown == kept


def test_a_stale_table_is_found_and_written(report, tmp_path, capsys):
  page = tmp_path / "page.md"
  page.write_text(PAGE)
  assert report.main(["--check", str(page)]) == 1
  assert "stale: forward" in capsys.readouterr().err
  assert page.read_text() == PAGE
  assert report.main([str(page)]) == 0
  new = page.read_text()
  assert "| unmerged | 1." in new
  assert "by hand" not in new
  assert new.startswith("# Claim\n\n<!-- table: forward -->\n")
  assert new.endswith("<!-- end -->\n\nAnd more.\n")
  assert report.main(["--check", str(page)]) == 0


def test_another_result_is_another_table(report, tmp_path, capsys):
  page, results = tmp_path / "page.md", tmp_path / "results"
  shutil.copytree(BENCHMARKS / "results" / "forward", results / "forward")
  page.write_text(PAGE)
  report.main([str(page), f"--results={results}"])
  file = results / "forward" / "forward.json"
  file.write_text(re.sub(r'"median": 1\.0\d+', '"median": 7.5', file.read_text()))
  assert report.main(["--check", str(page), f"--results={results}"]) == 1


@pytest.mark.parametrize(
  ("page", "message"),
  [
    (PAGE.replace("forward", "nonsense"), "there is no table 'nonsense'; there are: finetune"),
    (PAGE.replace("<!-- end -->", ""), "has no <!-- end -->"),
    (PAGE.replace("<!-- end -->", "") + PAGE, "has no <!-- end -->"),
    (PAGE, "table 'forward' has no results at {results}/forward/forward.json: run benchmarks/forward.py --record"),
  ],
)
def test_what_cannot_be_made_is_an_error(report, tmp_path, page, message, capsys):
  path = tmp_path / "page.md"
  path.write_text(page)
  assert report.main([str(path), f"--results={tmp_path}"]) == 1
  assert message.format(results=tmp_path) in capsys.readouterr().err
  assert path.read_text() == page


def test_the_check_fits_its_name(report):
  """A hand-typed table of the READMEs would be one outside of the markers that holds a median and its range."""
  for document in report.DOCUMENTS:
    outside = report._TABLE.sub("", document.read_text())
    assert not re.search(r"^\|.*\d\.\d+ \(\d\.\d+-\d\.\d+\)", outside, re.MULTILINE), document
