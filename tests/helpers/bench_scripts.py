"""Scripts of `benchmarks/` and `examples/` in tests: their modules, imported for one test file, and runs of them."""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import importlib
import io
from pathlib import Path
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest

from tests.helpers.paths import BENCHMARKS, EXAMPLES

FOLDERS = (BENCHMARKS, EXAMPLES)


@contextlib.contextmanager
def modules(*names: str, folder: Path | None = None) -> Iterator[SimpleNamespace]:
  """Modules of benchmarks and examples, by the last part of their names; they are unloaded afterwards.

  With a `folder`, scripts in it are found ahead of others of the same name.

  optax and the peers mix dtypes and ranks, which the strict promotion of these tests forbids.
  """
  before = set(sys.modules)
  with (
    pytest.MonkeyPatch.context() as patch,
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    for place in (*FOLDERS, *([folder] if folder else [])):
      patch.syspath_prepend(place)
    yield SimpleNamespace(**{name.rpartition(".")[2]: importlib.import_module(name) for name in names})
  for name in set(sys.modules) - before:
    file = getattr(sys.modules[name], "__file__", None)
    if file and any(Path(file).is_relative_to(folder) for folder in FOLDERS):
      del sys.modules[name]


class Finished(NamedTuple):
  args: list[str]
  out: Path
  results: dict[str, Any]
  printed: str


def finish(main: Callable[[list[str]], dict[str, Any]], args: Sequence[str], out: Path) -> Finished:
  """A run of a script's `main`, to its end."""
  given, printed = [*args, f"--out={out}"], io.StringIO()
  with contextlib.redirect_stdout(printed):
    results = main(given)
  return Finished(given, out, results, printed.getvalue())


def one_call(runs: Any) -> int:
  """In the place of `harness.calls_per_turn`: where no figure counts, a turn need not last."""
  return 1
