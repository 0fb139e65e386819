"""A call with a say in its batching. `jax.custom_batching.custom_vmap` has no reverse mode where nothing is batched."""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
from jax.extend import core as jex_core
import jax.numpy as jnp

from jaxlora._jax.call_primitive import Primitive, call_primitive


def batched_call(fn: Callable[..., Any], rule: Callable[[Sequence[bool], Sequence[Any]], Any], *args: Any) -> Any:
  """`fn(*args)`, of one array, computed by `rule(batched, args)` where `jax.vmap` adds an axis to some of `args`.

  Every derivative is that of `fn`, or of the rule where the axis has come first.

  Args:
    fn: a function of arrays.
    rule: from which arguments have the new axis, as their first one, to the result, which has it, too. `None` for its
      result is as if there were no rule.
    *args: arrays.
  """
  if Primitive is None:  # a batched call is computed plainly
    return fn(*args)
  (out,) = _batched_call_p().bind(*args, call=jax.make_jaxpr(fn)(*args), rule=rule)
  return out


@functools.cache
def _batched_call_p() -> Any:
  def batch(args, dims, *, call, rule):
    batched = [isinstance(dim, int) for dim in dims]
    leading = [jnp.moveaxis(arg, dim, 0) if one else arg for arg, dim, one in zip(args, dims, batched, strict=True)]
    out = rule(batched, leading)
    if out is not None:
      return [out], [0]
    axes = [0 if one else None for one in batched]
    return jax.vmap(jex_core.jaxpr_as_fun(call), in_axes=axes)(*leading), [0]

  return call_primitive("jaxlora_batched_call", batch)
