"""The site's pages: their Python runs, and every public package is on a page of the reference."""

import importlib
import inspect
import pkgutil
import re

import jax
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.docs.test_long_pages import PACKAGES
from tests.helpers.blocks import python_blocks
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
PAGES = (
  "start", "training", "nnx", "nnx_lora", "targeting", "variants", "quantised", "experts", "head", "tokens",
  "preference", "saving", "serving", "arithmetic", "peft", "variant", "explain",
)  # fmt: skip
pytestmark = pytest.mark.skipif(not DOCS.exists(), reason="the site is not beside the tests")


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("page", PAGES)
def test_a_pages_python_runs(page):
  file = DOCS / f"{page}.md"
  scope, blocks = {}, python_blocks(file)
  assert blocks
  for block in blocks:
    exec(compile(block, str(file), "exec"), scope)


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("default")
def test_the_main_job_in_small_adapts_digits(capsys):
  """Pretrained on digits 0-4 and adapted to 5-9, in 25 lines."""
  file = DOCS / "digits.md"
  scope, blocks = {}, python_blocks(file)
  assert sum(bool(line.strip()) for line in blocks[0].splitlines()) == 25
  for block in blocks:
    exec(compile(block, str(file), "exec"), scope)
  assert "layers_4/kernel" in capsys.readouterr().out
  assert float(scope["value"]) < 0.1


@pytest.mark.usefixtures("lenient")
def test_the_page_on_many_devices_runs():
  """On the eight devices that tests have."""
  page = DOCS / "devices.md"
  scope = {}
  for block in python_blocks(page):
    exec(compile(block, str(page), "exec"), scope)
  assert scope["tree"]["up"].a.sharding.spec == scope["P"](None, "data")
  assert scope["losses"][-1] < scope["losses"][0]
  assert scope["step"]._cache_size() == 1
  want = scope["model"](jaxlora.merge(jaxlora.join(scope["frozen"], scope["trainable"])), scope["x"])
  helpers.assert_close(np.asarray(scope["y"]), np.asarray(want), 1e-5)
  assert scope["resumed"].step == 5
  for new, old in zip(jax.tree.leaves(scope["resumed"].opt_state), jax.tree.leaves(scope["state"]), strict=True):
    np.testing.assert_array_equal(new, old)
    assert new.sharding.mesh == scope["other"]


def test_no_page_has_python_that_does_not_run():
  assert {file.stem for file in DOCS.glob("*.md") if python_blocks(file)} == {*PAGES, *PACKAGES, "digits", "devices"}


def test_every_public_package_has_a_page_and_describes_its_names():
  public = {"jaxlora"} | {
    f"jaxlora.{found.name}" for found in pkgutil.iter_modules(jaxlora.__path__) if not found.name.startswith("_")
  }
  shown = {name for file in DOCS.glob("api/*.md") for name in re.findall(r"^::: (\S+)$", file.read_text(), re.M)}
  assert shown == public
  for package in public:  # the reference shows what `__all__` names and a docstring describes
    module = importlib.import_module(package)
    assert module.__all__
    members = {name: getattr(module, name) for name in module.__all__}
    bare = [n for n, m in members.items() if (inspect.isclass(m) or inspect.isfunction(m)) and not m.__doc__]
    assert not bare, package


def test_code_in_descriptions_of_packages_is_indented():
  """Else the reference runs its lines together into one paragraph."""
  for page in DOCS.glob("api/*.md"):
    for package in re.findall(r"^::: (\S+)$", page.read_text(), re.M):
      text = inspect.cleandoc(importlib.import_module(package).__doc__)
      assert not re.findall(r"^\w[\w, ]* = \w.*|^\w+(?:\.\w+)+\(.*", text, re.M), package


def test_every_page_is_in_the_navigation():
  named = set(re.findall(r": (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
  assert named == {file.relative_to(DOCS).as_posix() for file in DOCS.rglob("*.md")}
