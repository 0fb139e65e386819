"""What a seeded bug is, and how a test of the suite is run on it."""

from collections.abc import Callable, Iterator
import contextlib
import inspect
from pathlib import Path
import sys
import tempfile
import textwrap
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import pytest

from jaxlora._jax import trace_cache
from tests import helpers
from tests.helpers import profiles


class Bug(NamedTuple):
  """A change of the library in this process, the test that fails on it, and that test's arguments.

  Where the arguments name `x64` or `tmp_path`, the test is given what those fixtures give.
  """

  seed: Callable[[pytest.MonkeyPatch], None]
  test: Callable[..., None]
  arguments: dict[str, Any] = {}  # noqa: RUF012


def each(bugs: list[Bug]) -> Any:
  """Runs a test once for each bug, by the bug's name; the default run takes every second."""
  return pytest.mark.parametrize("bug", profiles.halved(bugs), ids=[bug.seed.__name__ for bug in bugs])


def assert_can_be_seeded(bugs: list[Bug]) -> None:
  """What each bug changes is still where the bug looks for it: the default run holds that for all of them."""
  for bug in bugs:
    with pytest.MonkeyPatch.context() as patch:
      bug.seed(patch)


def assert_caught(bug: Bug) -> None:
  """The test fails by an assertion, not by an error of shapes."""
  marks = {name for mark in marks_of(bug.test) if mark.name == "usefixtures" for name in mark.args}
  arguments = dict(bug.arguments)
  with nothing_shared(), pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
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


@contextlib.contextmanager
def nothing_shared() -> Iterator[None]:
  """What the tests share, traces and adapted trees, was made without the bug, and what is made here goes again."""
  forget()
  try:
    yield
  finally:
    forget()


def forget() -> None:
  trace_cache._once.cache_clear()
  for name, module in list(sys.modules.items()):
    if name.partition(".")[0] == "jaxlora":
      for member in list(vars(module).values()):
        if hasattr(member, "clear_cache"):  # a function that the library compiles
          member.clear_cache()
  for build in helpers.BUILDERS.values():
    build.cache_clear()


def marks_of(test: Callable[..., None]) -> list[Any]:
  """A test's own marks and those of its file."""
  of_file = getattr(sys.modules[test.__module__], "pytestmark", [])
  return [*getattr(test, "pytestmark", ()), *(of_file if isinstance(of_file, list) else [of_file])]


def altered(module: Any, **members: Any) -> Any:
  """A module with some members replaced, for those who import it by name."""
  return SimpleNamespace(**{name: getattr(module, name) for name in dir(module)} | members)


def edited(fn: Callable[..., Any], old: str, new: str) -> Any:
  """A function of the library with one piece of its source replaced; its decorators are left out.

  It fails where that piece is no longer there, so that no bug is seeded into nothing.
  """
  source = textwrap.dedent(inspect.getsource(fn))
  source = source[source.index("def ") :]
  assert source.count(old) == 1, f"{fn.__qualname__} has {old!r} {source.count(old)} times, expected once"
  made: dict[str, Any] = {}
  exec(source.replace(old, new), fn.__globals__, made)  # names are looked up where the library has them
  return made[fn.__name__]
