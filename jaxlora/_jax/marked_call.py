"""A call that a jaxpr shows as one equation, with what is known of its function; derivatives are the function's own."""

from collections.abc import Callable
import functools
from typing import Any

import jax
from jax.extend import core as jex_core

from jaxlora._jax.call_primitive import Primitive, call_primitive

NAME = "jaxlora_product"


def marked_call(fn: Callable[..., jax.Array], mark: Any, *args: jax.Array) -> jax.Array:
  """`fn(*args)` as one equation.

  Differentiated or batched it is what differentiating or batching `fn` gives, without the mark.

  Args:
    fn: of arrays, with one array as its result.
    mark: the parameter `mark` of the equation; it has a name.
    *args: arrays.

  Raises:
    TypeError: where `fn` returns anything but an array.
    ValueError: where it holds arrays of a trace that it does not take as arguments.
  """
  if Primitive is None:  # calls are seen no longer, and compute the same
    return fn(*args)
  traced, like = jax.make_jaxpr(fn, return_shape=True)(*args)
  if not hasattr(like, "shape"):
    raise TypeError(f"{mark.name}: returns {like!r}, expected one array.")
  if any(isinstance(const, jax.core.Tracer) for const in traced.consts):
    raise ValueError(f"{mark.name}: closes over an array of the trace that it is called in; pass that as an argument.")
  (out,) = _marked_call_p().bind(*args, call=traced, mark=mark)
  return out


@functools.cache
def _marked_call_p() -> Any:
  def batch(args, dims, *, call, mark):
    del mark
    out = jax.vmap(jex_core.jaxpr_as_fun(call), in_axes=tuple(dims))(*args)
    return out, [0] * len(out)

  return call_primitive(NAME, batch)
