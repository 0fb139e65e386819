"""Functions of their own in the compiled program."""

from collections.abc import Callable
from typing import Any

import jax

try:
  from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:  # a JAX that moved it: XLA's CPU backend keeps more for the backward pass
  set_xla_metadata = None  # type: ignore[assignment]


def apart(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)` as a function of its own in the compiled program: it is not computed inside of what reads its results.

  XLA inlines every call but those that say otherwise; an `optimization_barrier` its CPU backend drops.
  """
  if set_xla_metadata is None:
    return fn(*args)
  with set_xla_metadata(inlineable="false"):
    return jax.jit(fn)(*args)
