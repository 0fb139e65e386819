"""Primitives that call a jaxpr: their results and derivatives are the jaxpr's, batching is the primitive's own."""

from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core as jex_core

try:
  from jax.extend.core import Primitive
  from jax.interpreters import ad, batching, mlir

  _ = ad.primitive_jvps, batching.primitive_batchers, mlir.register_lowering, mlir.lower_fun
except (ImportError, AttributeError):  # a JAX that moved them: whoever asks for a primitive calls the function itself
  Primitive = None  # type: ignore[assignment,misc]


def call_primitive(name: str, batch: Callable[..., Any]) -> Any:
  """A primitive whose parameter `call` is a closed jaxpr of its operands, beside others that it carries along.

  Args:
    name: of its equations.
    batch: its batching rule, `batch(args, dims, *, call, **others)`.
  """
  primitive: Any = Primitive(name)
  primitive.multiple_results = True

  def impl(*args, call, **others):
    del others
    return jex_core.jaxpr_as_fun(call)(*args)

  def abstract_eval(*args, call, **others):
    del args, others
    return call.out_avals

  def jvp(primals, tangents, *, call, **others):
    del others
    # others than these, such as integers, have no tangents
    moved = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_moved(*values):
      full = list(primals)
      for k, value in zip(moved, values, strict=True):
        full[k] = value
      return jex_core.jaxpr_as_fun(call)(*full)

    return jax.jvp(of_moved, [primals[k] for k in moved], [tangents[k] for k in moved])

  primitive.def_impl(impl)
  primitive.to_lojax = impl  # a newer JAX asks for it where the jaxpr holds what it expands first, as some Pallas calls
  primitive.def_abstract_eval(abstract_eval)
  ad.primitive_jvps[primitive] = jvp
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=True))
  return primitive
