"""What the documentation shows runs: the README's Python, and every example in a docstring."""

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys

import pytest

import jaxlora
from tests.helpers.paths import README

MODULES = ["jaxlora", *(module.name for module in pkgutil.walk_packages(jaxlora.__path__, "jaxlora."))]


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("default")
def test_the_readmes_python_runs(capsys, monkeypatch, tmp_path):
  if not README.exists():
    pytest.skip("the README is not beside the tests")
  blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
  assert len(blocks) >= 3
  assert sum(bool(line.strip()) for line in blocks[0].splitlines()) == 25  # the main job in small
  scope = {}
  monkeypatch.chdir(tmp_path)  # what it saves
  for block in blocks:
    exec(compile(block, str(README), "exec"), scope)
  printed = capsys.readouterr().out
  assert "layers_4/kernel" in printed
  assert "factored" in printed
  assert float(scope["value"]) < 0.1


@pytest.mark.parametrize("module", MODULES)
def test_examples_in_docstrings(module):
  result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
  assert not result.failed


def test_public_names_are_documented():
  for name in jaxlora.__all__:
    doc = getattr(jaxlora, name).__doc__
    assert doc
    assert len(doc.strip().splitlines()[0]) <= 120


def test_importing_loads_jax_and_optax_alone():
  """flax, orbax, chex and what the extras install are loaded by those who use them."""
  code = (
    "import sys, jaxlora; print([m for m in ('flax', 'orbax', 'chex', 'sklearn', 'matplotlib') if m in sys.modules])"
  )
  # optax itself may import chex: compare with what it loads.
  base = code.replace("jaxlora", "jax, optax")
  loaded = [
    subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, check=True) for text in (code, base)
  ]
  assert loaded[0].stdout == loaded[1].stdout
