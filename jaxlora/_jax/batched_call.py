"""A call with a say in its batching. `jax.custom_batching.custom_vmap` has no reverse mode where nothing is batched."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.extend import core as jex_core
import jax.numpy as jnp

try:
  from jax.extend.core import Primitive
  from jax.interpreters import ad, batching, mlir

  _ = ad.primitive_jvps, batching.primitive_batchers, mlir.register_lowering, mlir.lower_fun
except (ImportError, AttributeError):  # a JAX that moved them: a batched call is computed plainly
  Primitive = None  # type: ignore[assignment,misc]


def batched_call(fn: Callable[..., Any], rule: Callable[[Sequence[bool], Sequence[Any]], Any], *args: Any) -> Any:
  """`fn(*args)`, of one array, computed by `rule(batched, args)` where `jax.vmap` adds an axis to some of `args`.

  Every derivative is that of `fn`, or of the rule where the axis has come first.

  Args:
    fn: a function of arrays.
    rule: from which arguments have the new axis, as their first one, to the result, which has it, too. `None` for its
      result is as if there were no rule.
    *args: arrays.
  """
  if Primitive is None:
    return fn(*args)
  (out,) = _batched_call_p().bind(*args, jaxpr=jax.make_jaxpr(fn)(*args), rule=rule)
  return out


@functools.cache
def _batched_call_p() -> Any:
  primitive = Primitive("jaxlora_batched_call")
  primitive.multiple_results = True

  def impl(*args, jaxpr, rule):
    del rule
    return jex_core.jaxpr_as_fun(jaxpr)(*args)

  def abstract_eval(*args, jaxpr, rule):
    del args, rule
    return jaxpr.out_avals

  def jvp(primals, tangents, *, jaxpr, rule):
    del rule
    moved = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_moved(*values):
      full = list(primals)
      for k, value in zip(moved, values, strict=True):
        full[k] = value
      return jex_core.jaxpr_as_fun(jaxpr)(*full)

    return jax.jvp(of_moved, [primals[k] for k in moved], [tangents[k] for k in moved])

  def batch(args, dims, *, jaxpr, rule):
    batched = [isinstance(dim, int) for dim in dims]
    leading = [jnp.moveaxis(arg, dim, 0) if one else arg for arg, dim, one in zip(args, dims, batched, strict=True)]
    out = rule(batched, leading)
    if out is not None:
      return [out], [0]
    axes = [0 if one else None for one in batched]
    return jax.vmap(jex_core.jaxpr_as_fun(jaxpr), in_axes=axes)(*leading), [0]

  primitive.def_impl(impl)
  primitive.def_abstract_eval(abstract_eval)
  ad.primitive_jvps[primitive] = jvp
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=True))
  return primitive
