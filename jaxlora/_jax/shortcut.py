"""Functions whose derivative is JAX's own, computed in a cheaper way."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from jaxlora._jax.control_flow import SHORTCUT


class Shortcut(NamedTuple):
  """A function with its derivative.

  Attributes:
    fn: the function, of arrays alone.
    forwards, backwards: its derivative, as `jax.custom_vjp` takes them with symbolic zeros. It must be that of `fn` to
      rounding.
    factored: `(call, operands) -> results`: the same where one of the operands is an adapted weight, with a derivative
      of its own. `call(f, *operands)` is `f` of them, with products that stay factored.
  """

  fn: Callable[..., Any]
  forwards: Callable[..., Any]
  backwards: Callable[..., Any]
  factored: Callable[[Callable[..., list[Any]], Sequence[Any]], Sequence[Any]]


SHORTCUTS: dict[str, Shortcut] = {}  # by the name of the jit that is all that a function does


def shortcut(which: Shortcut, name: str) -> Any:
  """The function with its derivative; where an operand is an adapted weight, the transform takes `factored`.

  Args:
    which: the function and its derivative.
    name: one of its own.
  """

  def named(*args: Any) -> Any:
    return which.fn(*args)

  named.__name__ = f"{SHORTCUT}_{name}"
  SHORTCUTS[named.__name__] = which
  whole = jax.custom_vjp(jax.jit(named))
  whole.defvjp(which.forwards, which.backwards, symbolic_zeros=True)
  return whole
