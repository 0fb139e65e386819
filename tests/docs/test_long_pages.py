"""Pages that take seconds: on other libraries, with the real package where it is installed, and on a language model.

They run nightly, and in CI's leg of interchange.
"""

import pytest

from tests.helpers.blocks import python_blocks
from tests.helpers.paths import ROOT

DOCS = ROOT / "docs"
PACKAGES = {
  "equinox": "equinox",
  "haiku": "haiku",
  "penzai": "penzai",
  "keras": "keras",
  "qwix": "qwix",
  "llm": "safetensors",
}
pytestmark = [
  pytest.mark.nightly,
  pytest.mark.usefixtures("lenient"),
  pytest.mark.filterwarnings("default"),
  pytest.mark.skipif(not DOCS.exists(), reason="the site is not beside the tests"),
]


@pytest.mark.parametrize("page", PACKAGES)
def test_a_pages_python_runs(page, monkeypatch):
  monkeypatch.setenv("KERAS_BACKEND", "jax")
  pytest.importorskip(PACKAGES[page], reason="needs jaxlora[interchange]")
  file, scope = DOCS / f"{page}.md", {}
  for block in python_blocks(file):
    exec(compile(block, str(file), "exec"), scope)
  assert "tree" in scope
