"""Functions whose derivative is JAX's own, computed in a cheaper way."""

from collections.abc import Callable
from typing import Any

import jax

from jaxlora._jax.control_flow import SHORTCUT


def shortcut(fn: Callable[..., Any], forwards: Callable[..., Any], backwards: Callable[..., Any], static: int) -> Any:
  """`fn` with the derivative of `forwards` and `backwards`, as `jax.custom_vjp` takes them with symbolic zeros.

  The derivative must be that of `fn` to rounding: where an operand of `fn` is an adapted weight, the transform keeps it
  factored by leaving this derivative out, and JAX differentiates `fn`.

  Args:
    fn: the function.
    forwards, backwards: its derivative.
    static: the place of the one argument that is no array.
  """

  def named(*args: Any) -> Any:
    return fn(*args)

  named.__name__ = SHORTCUT
  whole = jax.custom_vjp(jax.jit(named, static_argnums=static), nondiff_argnums=(static,))
  whole.defvjp(forwards, backwards, symbolic_zeros=True)
  return whole
