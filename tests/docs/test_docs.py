"""What the documentation shows runs: the README's Python, and every example in a docstring."""

import doctest
import importlib
import pkgutil
import subprocess
import sys

import pytest

import jaxlora
from tests.helpers.blocks import python_blocks
from tests.helpers.paths import README

MODULES = ["jaxlora", *(module.name for module in pkgutil.walk_packages(jaxlora.__path__, "jaxlora."))]


@pytest.mark.usefixtures("lenient")
@pytest.mark.filterwarnings("default")
def test_the_readmes_python_runs(capsys):
  """On the base installation, which a test of the wheel runs as well."""
  if not README.exists():
    pytest.skip("the README is not beside the tests")
  blocks, scope = python_blocks(README), {}
  assert len(blocks) == 2
  assert sum(bool(line.strip()) and not line.startswith("import") for line in blocks[0].splitlines()) == 10
  for block in blocks:
    exec(compile(block, str(README), "exec"), scope)
  printed = capsys.readouterr().out
  assert "layers_0/kernel" in printed
  assert "factored" in printed
  assert float(scope["value"]) < 0.05
  assert not isinstance(scope["params"]["layers_0"]["kernel"], jaxlora.LoraWeight)


def test_the_readme_is_a_door():
  lines = README.read_text().splitlines()
  assert len(lines) <= 150
  assert max(map(len, lines)) <= 120


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
