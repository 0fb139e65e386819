"""Caches of a mixed batch: rows that write to one place write together."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.batched_call import batched_call


def update_slice(bind: Callable[..., list[Any]], operands: Sequence[Any]) -> list[Any]:
  """A `dynamic_update_slice` in one row, such as a cache's: where all rows write to one place it stays one.

  JAX makes a scatter of it, whose bounds XLA checks with two copies of the whole cache.
  """

  def rule(batched: Sequence[bool], args: Sequence[Any]) -> jax.Array | None:
    if any(batched[2:]):
      return None
    operand, update, *starts = args
    (count,) = {array.shape[0] for array, one in zip(args, batched, strict=True) if one}
    operand, update = (
      array if one else jnp.broadcast_to(array, (count, *array.shape))
      for array, one in zip((operand, update), batched, strict=False)
    )
    # A batch of one row has an axis for it already. With two XLA does not see that the update is one in place.
    whole = operand.shape
    if operand.shape[1] == 1:
      operand, update = (lax.reshape(array, (count, *array.shape[2:])) for array in (operand, update))
      starts = starts[1:]
    zero = jnp.zeros((), starts[0].dtype) if starts else 0
    return lax.dynamic_update_slice(operand, update, (zero, *starts), allow_negative_indices=False).reshape(whole)

  return [batched_call(lambda *args: bind(args)[0], rule, *operands)]
