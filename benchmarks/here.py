"""Functions and their arguments, compiled for this host: to be looked at, and timed side by side."""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

import jax


class Step(NamedTuple):
  """A function to compile, and its arguments: arrays, or shapes where a chip's compiler is asked."""

  step: Callable[..., Any]
  args: tuple[Any, ...]


def compile_here(steps: Mapping[str, Step], tick: Callable[[str], Any]) -> dict[str, Any]:
  """What the compiler made of each, by name."""
  compiled = {}
  for name, one in steps.items():
    tick(f"compiling {name}")
    compiled[name] = jax.jit(one.step).lower(*one.args).compile()
  return compiled


def runs_of(compiled: Mapping[str, Any], steps: Mapping[str, Step]) -> dict[str, Callable[[], Any]]:
  """Calls without arguments, for `harness.interleave`."""
  return {name: functools.partial(compiled[name], *steps[name].args) for name in steps}
