"""The text: docstrings of Python's standard library and of installed packages, as summary lines and bodies (PEP 257).

They are read from the source files with `ast`, and nothing is imported. Splits are made of whole files, so that
docstrings of one file are never in two splits.
"""

import ast
from collections.abc import Iterator, Sequence
import hashlib
import importlib.metadata
import importlib.util
from pathlib import Path
import platform
import re
import sysconfig
from typing import NamedTuple
import warnings

PYTHON = "python"  # the standard library
# Packages that `pip install jaxlora[bench]` installs and that have hundreds of docstrings, with their distributions.
PACKAGES = {
  PYTHON: PYTHON,
  "numpy": "numpy",
  "scipy": "scipy",
  "sklearn": "scikit-learn",
  "matplotlib": "matplotlib",
  "fontTools": "fonttools",
  "jax": "jax",
  "flax": "flax",
  "optax": "optax",
  "orbax": "orbax-checkpoint",
}
SPLITS = {"train": 0.6, "validation": 0.15, "test": 0.25}
SHORTEST, LONGEST, SHORTEST_BODY = 15, 160, 60  # characters of a summary and of a body
_LEFT_OUT = {"site-packages", "test", "tests", "idlelib", "lib2to3", "ensurepip", "_vendor", "__pycache__"}
# Names by which a text would tell its package: of packages, modules and imports.
_NAMES = re.compile(
  r"\b(?:c?python\d*|numpy|np|ndarray|scipy|sklearn|scikit(?:-learn)?|matplotlib|mpl|plt|pyplot|font-?tools|ttlib|"
  r"jax|jnp|jaxlib|lax|xla|flax|nnx|linen|optax|orbax|ocp)\b\.?",
  re.IGNORECASE,
)


class Pair(NamedTuple):
  """A docstring: its package, the split of its file, its summary line and its body."""

  package: str
  split: str
  summary: str
  body: str


def read(packages: Sequence[str] = tuple(PACKAGES)) -> list[Pair]:
  """All pairs of these packages, in the order of their files, without repeated summaries or bodies.

  Raises:
    ValueError: if a package is not installed.
  """
  seen: set[str] = set()
  pairs = []
  for package in packages:
    for root in _roots(package):
      for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root)
        if _LEFT_OUT.isdisjoint(name.parts):
          split = _split(f"{package}/{name.as_posix()}")
          for summary, body in docstrings(file):
            if summary not in seen and body not in seen:
              seen |= {summary, body}
              pairs.append(Pair(package, split, summary, body))
  return pairs


def _roots(package: str) -> list[Path]:
  """The folders of a package's source."""
  if package == PYTHON:
    return [Path(sysconfig.get_path("stdlib"))]
  spec = importlib.util.find_spec(package)
  if spec is None:
    raise ValueError(f"the package {package} is not installed, whose docstrings are read: pip install 'jaxlora[bench]'")
  return [Path(place) for place in spec.submodule_search_locations or ()]


def _split(name: str) -> str:
  """A file's split, by the hash of its name: other files do not change it."""
  place = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64
  for split, share in SPLITS.items():
    if place < share:
      return split
    place -= share
  return split


def docstrings(file: Path) -> Iterator[tuple[str, str]]:
  """Summary and body of every class and function whose docstring has both, with whitespace collapsed."""
  try:
    with warnings.catch_warnings(action="ignore"):  # invalid escape sequences in their strings
      tree = ast.parse(file.read_bytes())
  except (SyntaxError, ValueError):  # templates, and code for another version of Python
    return
  for node in ast.walk(tree):
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
      summary, _, body = (ast.get_docstring(node) or "").partition("\n\n")
      summary, body = " ".join(summary.split()), " ".join(body.split())
      if SHORTEST <= len(summary) <= LONGEST and len(body) >= SHORTEST_BODY:
        yield summary, body


def without_names(text: str) -> str:
  """The text without names that would tell its package."""
  return _NAMES.sub("", text)


def versions(packages: Sequence[str] = tuple(PACKAGES)) -> dict[str, str]:
  """Versions of these packages."""
  return {
    name: platform.python_version() if name == PYTHON else importlib.metadata.version(PACKAGES[name])
    for name in packages
  }


def digest(pairs: Sequence[Pair]) -> str:
  """A short hash of the text."""
  return hashlib.sha256("\n".join(map("\t".join, pairs)).encode()).hexdigest()[:16]
