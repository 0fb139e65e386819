"""The open doors: workflows that name what exists, pinned actions, one version everywhere."""

from pathlib import Path
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import yaml

import jaxlora
from tests.helpers.paths import ROOT

GITHUB = ROOT / ".github"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOWS = sorted(GITHUB.glob("workflows/*.yml"))
PROGRAMS = {"python", "pip"}
MODULES = {"pip": None, "pytest": "test", "mkdocs": "docs"}  # what `python -m` runs, and the extra that has it
pytestmark = pytest.mark.skipif(not GITHUB.exists(), reason="the workflows are not beside the tests")


def steps(file: Path) -> list[dict]:
  return [step for job in yaml.safe_load(file.read_text())["jobs"].values() for step in job["steps"]]


def test_there_are_the_workflows_and_forms_that_contributors_look_for():
  assert {file.stem for file in WORKFLOWS} == {"tests", "docs", "nightly", "release"}
  for file in (*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"):
    assert isinstance(yaml.safe_load(file.read_text()), dict), file
  for form in GITHUB.glob("ISSUE_TEMPLATE/*.yml"):
    if form.name != "config.yml":
      fields = yaml.safe_load(form.read_text())
      assert {"name", "description", "body"} <= set(fields)
      assert all({"type", "attributes"} <= set(field) for field in fields["body"])


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_actions_are_pinned_by_their_commits_and_jobs_have_few_rights(file):
  used = re.findall(r"uses: (\S+)@(\S+)(.*)", file.read_text())
  assert len(used) == sum("uses" in step for step in steps(file))
  for name, commit, comment in used:
    assert re.fullmatch(r"[0-9a-f]{40}", commit), name
    assert re.fullmatch(r" # v\d+\.\d+\.\d+", comment), name
  workflow = yaml.safe_load(file.read_text())
  assert workflow["permissions"] == {"contents": "read"}
  checkouts = [step for step in steps(file) if step.get("uses", "").startswith("actions/checkout@")]
  assert checkouts
  assert not any(step["with"]["persist-credentials"] for step in checkouts)


def test_one_commit_for_each_action():
  used = {found for file in WORKFLOWS for found in re.findall(r"uses: (\S+)@(\S+)", file.read_text())}
  assert len(used) == len(dict(used))


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.stem)
def test_what_workflows_run_exists(file):
  lines = [line for step in steps(file) for line in step.get("run", "").splitlines()]
  assert lines
  for line in lines:
    words = shlex.split(line.removeprefix("! "))
    if words[:2] == ["python", "-m"]:
      assert words[2] in MODULES, line
      extras = PROJECT["optional-dependencies"]
      assert MODULES[words[2]] is None or any(need.startswith(words[2]) for need in extras[MODULES[words[2]]])
    elif words[0] == "python":
      assert (ROOT / words[1]).exists(), line
    else:
      assert words[0] == "grep" or (ROOT / words[0]).stat().st_mode & 0o111, line
    named = [extra for word in words for extra in re.findall(r"^\.\[(.+)\]$", word)]
    assert set(named) <= set(PROJECT["optional-dependencies"])


def test_hooks_run_what_ci_runs():
  hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
  ci = (ROOT / ".ci/run").read_text()
  for hook in hooks:
    assert hook["entry"].removesuffix(" --fix") in ci


def test_a_release_is_refused_while_the_project_has_no_address():
  """The step's own command, on the metadata as it is and as it is to be."""
  (step,) = (step for step in steps(GITHUB / "workflows/release.yml") if "OWNER" in step.get("run", ""))
  command = step["run"]
  owned = "/OWNER/" not in PROJECT["urls"]["Repository"]
  assert (subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True).returncode == 0) == owned


def test_one_version_everywhere():
  version = jaxlora.__version__
  assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
  heading = re.search(r"^## (\S+)( \(.+\))?$", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
  assert heading[1] == version
  release = (ROOT / ".ci/release").read_text()
  assert "'v' + jaxlora.__version__" in release


def test_links_of_a_built_site_are_checked(tmp_path):
  (tmp_path / "other").mkdir()
  (tmp_path / "other/index.html").write_text('<h2 id="there">There</h2><a href="..">up</a>')
  page = tmp_path / "index.html"
  check = lambda: subprocess.run([sys.executable, ROOT / "docs/links.py", tmp_path], capture_output=True, text=True)
  page.write_text('<a href="other/#there">there</a><a href="https://example.org/x">out</a>')
  assert check().returncode == 0
  page.write_text('<a href="other/#gone">gone</a><img src="none.png">')
  assert check().returncode == 1
  assert check().stderr.splitlines() == ["index.html: other/#gone", "index.html: none.png"]
