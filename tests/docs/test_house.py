"""The house: one-way imports, short chains, small files, and the two rooms that alone hold certain names."""

import ast
import functools
from pathlib import Path
import re
import statistics
import tokenize

import pytest

import jaxlora

ROOT = Path(jaxlora.__file__).parent
# From the ground floor up. A folder imports from those before it, never from those behind it.
FLOORS = (
  "_version", "_base", "_files", "_jax", "_platform", "_weight", "_quant", "_transform", "_adapt", "_train", "svd",
  "arithmetic", "init", "quant", "sharding", "losses", "serving", "checkpoint", "peft", "nnx", "hub", "_cli",
)  # fmt: skip
LONGEST_CHAIN = 12
MOST_LINES = 350
MEDIAN_LINES = 150
# What only `_jax` may say, and what only `_platform` may.
PRIVATE = re.compile(r"jax\._src|jax\.interpreters|jax\.extend|from jax\.core|jax\.core\.(?!Tracer)")
BACKENDS = re.compile(
  r"\bdefault_backend\b|\bdevice_count\b|\.platform\b|[\"'](?:cpu|tpu|gpu|cuda|rocm)[\"']|\bXLA:(?:CPU|TPU|GPU)\b"
)


@functools.cache
def files() -> dict[str, Path]:
  """Module name -> file."""
  found = {}
  for file in ROOT.rglob("*.py"):
    parts = ("jaxlora", *file.relative_to(ROOT).with_suffix("").parts)
    found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
  return found


def imported(module: str) -> set[str]:
  """The modules of this library that a module names in its imports, anywhere in it."""
  names = set()
  for node in ast.walk(ast.parse(files()[module].read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom) and node.module:
      whole = {f"{node.module}.{alias.name}" for alias in node.names}
      names |= {name if name in files() else node.module for name in whole}
  return {name for name in names if name in files()} - {module}


@functools.cache
def graph() -> dict[str, set[str]]:
  return {module: imported(module) for module in files()}


def floor(module: str) -> int:
  room = module.split(".")[1] if "." in module else None
  if room in (None, "__main__"):
    return len(FLOORS)  # the face, and the door
  return FLOORS.index(room)


def test_every_module_is_on_a_floor():
  assert {module.split(".")[1] for module in files() if "." in module} <= {*FLOORS, "__main__"}


def test_no_import_runs_up():
  up = [(a, b) for a, others in graph().items() for b in others if floor(a) < floor(b)]
  assert not up


def test_no_import_is_part_of_a_cycle_and_no_chain_is_longer_than_twelve():
  longest: dict[str, list[str]] = {}
  on_the_way: list[str] = []

  def chain(module: str) -> list[str]:
    assert module not in on_the_way, f"a cycle: {' -> '.join([*on_the_way, module])}"
    if module not in longest:
      on_the_way.append(module)
      longest[module] = [module, *max(map(chain, sorted(graph()[module])), key=len, default=[])]
      on_the_way.pop()
    return longest[module]

  found = max(map(chain, graph()), key=len)
  assert len(found) <= LONGEST_CHAIN, " -> ".join(found)


def test_files_are_small():
  lines = {module: len(file.read_text().splitlines()) for module, file in files().items()}
  assert not {module: count for module, count in lines.items() if count > MOST_LINES}
  assert (
    statistics.median(count for module, count in lines.items() if files()[module].name != "__init__.py") < MEDIAN_LINES
  )


def test_every_room_says_what_it_is_for():
  for folder in (path for path in ROOT.rglob("*") if path.is_dir() and list(path.glob("*.py"))):
    text = (folder / "README.md").read_text().strip().splitlines()
    assert 2 <= len(text) <= 8, folder


def code_of(file: Path) -> str:
  """A file's code and strings, without its comments and docstrings."""
  docstrings = {
    node.body[0].lineno: node.body[0].end_lineno
    for node in ast.walk(ast.parse(file.read_text()))
    if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
  }
  inside = {line for start, end in docstrings.items() for line in range(start, (end or start) + 1)}
  with file.open("rb") as stream:
    comments = {(t.start[0], t.start[1]) for t in tokenize.tokenize(stream.readline) if t.type == tokenize.COMMENT}
  starts = dict(comments)
  lines = file.read_text().splitlines()
  return "\n".join(
    line[: starts.get(number, len(line))] for number, line in enumerate(lines, 1) if number not in inside
  )


@pytest.mark.parametrize(("room", "names"), [("_jax", PRIVATE), ("_platform", BACKENDS)])
def test_certain_names_are_in_one_room(room, names):
  outside = [file for file in files().values() if file.relative_to(ROOT).parts[0] != room]
  found = {str(file.relative_to(ROOT)): names.findall(code_of(file)) for file in outside}
  assert not {file: said for file, said in found.items() if said}


def test_the_walk_would_find_what_it_looks_for(tmp_path):
  seeded = tmp_path / "seeded.py"
  seeded.write_text(
    '"""On "cpu"."""\n\nimport jax  # jax.default_backend()\n\nwhere = jax.devices()[0].platform == "tpu"\n'
  )
  assert BACKENDS.findall(code_of(seeded)) == [".platform", '"tpu"']
  seeded.write_text("from jax._src import core\nfrom jax.interpreters import ad\n")
  assert len(PRIVATE.findall(code_of(seeded))) == 2
