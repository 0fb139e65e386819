"""Functions that are equal are traced, differentiated and lowered once."""

from collections.abc import Callable
import functools
from typing import Any

import jax

try:
  from jax._src.core import is_concrete
except ImportError:  # a JAX that moved it: layers that are alike are traced one by one

  def is_concrete(x: Any) -> Any:
    del x
    return True


def staged(value: Any) -> bool:
  """Whether an array is only traced, and nothing is computed yet."""
  return isinstance(value, jax.core.Tracer) and not is_concrete(value)


@functools.lru_cache(maxsize=512)
def _once(fn: Callable[..., Any]) -> Callable[..., Any]:
  def call(*args: Any) -> Any:
    return fn(*args)

  call.__name__ = call.__qualname__ = type(fn).__name__.strip("_").lower()  # in profiles
  return jax.jit(call)


def traced_once(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)`, where functions that are equal are traced, differentiated and lowered once for operands of one type.

  Layers that are alike then cost a fraction of what each would alone. Where arrays are there to compute with, as it is
  outside of `jax.jit`, `fn` is called plainly.
  """
  if all(staged(leaf) for leaf in jax.tree.leaves(args)):
    return _once(fn)(*args)
  return fn(*args)
