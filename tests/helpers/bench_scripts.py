"""What the tests of the benchmarks share: their modules, imported for one test file, and what a run of one leaves."""

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

from tests.helpers.paths import BENCHMARKS


@contextlib.contextmanager
def modules(*names: str) -> Iterator[SimpleNamespace]:
  """The named modules of the benchmarks; afterwards all of theirs are forgotten.

  optax and the peers mix dtypes and ranks, which the strict promotion of these tests forbids.
  """
  before = set(sys.modules)
  with (
    pytest.MonkeyPatch.context() as patch,
    jax.numpy_dtype_promotion("standard"),
    jax.numpy_rank_promotion("allow"),
  ):
    patch.syspath_prepend(BENCHMARKS)
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
  for name in set(sys.modules) - before:
    file = getattr(sys.modules[name], "__file__", None)
    if file and Path(file).parent == BENCHMARKS:
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
