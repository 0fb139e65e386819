"""What a seeded bug is, and how a test of the suite is run on it."""

from collections.abc import Callable
import contextlib
from pathlib import Path
import sys
import tempfile
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest


class Bug(NamedTuple):
  """A change of the library in this process, the test that fails on it, and that test's arguments.

  Where the arguments name `x64` or `tmp_path`, the test is given what those fixtures give.
  """

  seed: Callable[[pytest.MonkeyPatch], None]
  test: Callable[..., None]
  arguments: dict[str, Any] = {}  # noqa: RUF012


def each(bugs: list[Bug]) -> Any:
  """Runs a test once for each bug, by the bug's name."""
  return pytest.mark.parametrize("bug", bugs, ids=[bug.seed.__name__ for bug in bugs])


def assert_caught(bug: Bug) -> None:
  """The test fails by an assertion, not by an error of shapes."""
  marks = {name for mark in marks_of(bug.test) if mark.name == "usefixtures" for name in mark.args}
  arguments = dict(bug.arguments)
  with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
    if "x64" in {*arguments, *marks}:
      stack.enter_context(jax.enable_x64(True))
    if "lenient" in marks:
      stack.enter_context(jax.numpy_dtype_promotion("standard"))
      stack.enter_context(jax.numpy_rank_promotion("allow"))
    if "tmp_path" in arguments:
      arguments["tmp_path"] = Path(stack.enter_context(tempfile.TemporaryDirectory()))
    bug.seed(patch)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
      bug.test(**arguments)


def marks_of(test: Callable[..., None]) -> list[Any]:
  """A test's own marks and those of its file."""
  of_file = getattr(sys.modules[test.__module__], "pytestmark", [])
  return [*getattr(test, "pytestmark", ()), *(of_file if isinstance(of_file, list) else [of_file])]


def altered(module: Any, **members: Any) -> Any:
  """A module with some members replaced, for those who import it by name."""
  return SimpleNamespace(**{name: getattr(module, name) for name in dir(module)} | members)
