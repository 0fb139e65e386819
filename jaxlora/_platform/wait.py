"""Residuals that wait: what the backward pass rematerialises must not be made before its cotangent has arrived.

A compiler would otherwise merge the rematerialised value with the original, or schedule it beside it, and keep it all
the same.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.by_platform import EVERYWHERE, Form, by_platform
from jaxlora._jax.jaxpr import without_dead_code
from jaxlora._jax.linear_call import Transposes, linear_call

# From residuals and cotangents, flat, to the residuals: the same values, which depend on the cotangents.
Wait = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]


def late(
  fn: Callable[[Any, Any], Any],
  residuals: Any,
  linear: Any,
  wait: Wait,
  transposes: Transposes | None = None,
) -> Any:
  """`fn(residuals, linear)`, linear in the second argument, whose transpose reads residuals only after its cotangent.

  Forward mode, second derivatives and batching are those of `fn`. Programs for the platforms in `transposes` are given
  that transpose instead.
  """
  return linear_call(fn, wait, residuals, linear, transposes)


@dataclasses.dataclass(frozen=True)
class TransposeOf:
  """The transpose of `fn(residuals, linear)`: one of `late`'s `transposes`.

  `linear` is a pytree of the structure that `treedef` has.
  """

  fn: Callable[[Any, Any], Any]
  treedef: Any
  wait: Wait | None = None  # how residuals wait for their cotangents; `None` where they need not

  def __call__(self, residuals: Any, cotangents: Any, types: Sequence[Any]) -> Sequence[Any]:
    if self.wait is not None:
      leaves, treedef = jax.tree.flatten(residuals)
      residuals = jax.tree.unflatten(treedef, self.wait(leaves, jax.tree.leaves(cotangents)))
    along = lambda *linear: self.fn(residuals, jax.tree.unflatten(self.treedef, linear))
    return jax.linear_transpose(along, *types)(cotangents)


def at_once(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """Waits for nothing: the compiler sees that the forward pass has made the same, and keeps it or not as it likes."""
  del cotangents
  return residuals


def residuals_used(fn: Callable[[Any, Any], Any], residuals: Any, linear: Any) -> list[bool]:
  """Which of the residuals `late(fn, residuals, linear, wait)` keeps."""
  return without_dead_code(jax.make_jaxpr(fn)(residuals, linear))[1][: len(jax.tree.leaves(residuals))]


def by_barrier(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """Waits by `optimization_barrier`."""
  return lax.optimization_barrier((list(residuals), list(cotangents)))[0]


def _by_barrier_of_elements(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  return by_barrier(residuals, [c if 0 in jnp.shape(c) else _first_element(c) for c in cotangents])


_ONE_ELEMENT = Form(_by_barrier_of_elements, single_device=True)


def on_gpus(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """Waits by a barrier, in programs of one device for a single element of each cotangent.

  What a barrier takes is an array of its own: nothing could be fused with what makes a whole cotangent. An element of a
  sharded one would have to reach all devices.
  """
  return by_platform(by_barrier, {EVERYWHERE: _ONE_ELEMENT}, list(residuals), list(cotangents))


def by_compiler(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """Waits as the compiler that the program is lowered for wants it: by a barrier, which XLA's CPU backend drops."""
  return _on_cpus(by_barrier, residuals, cotangents, gpus=_ONE_ELEMENT)


def on_cpus(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """Waits where XLA's CPU backend compiles; others need not."""
  return _on_cpus(at_once, residuals, cotangents)


def codes_by_compiler(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """`by_compiler` of codes: integers wait, too."""
  return _on_cpus(by_barrier, residuals, cotangents, _codes_by_arithmetic)


def _on_cpus(
  elsewhere: Wait,
  residuals: Sequence[Any],
  cotangents: Sequence[Any],
  here: Wait | None = None,
  gpus: Form | None = None,
) -> Sequence[Any]:
  """XLA's CPU backend drops barriers before it fuses and schedules; it is given arithmetic.

  Not for several devices, where one element of a sharded cotangent would have to reach them all.
  """
  if any(0 in jnp.shape(cotangent) for cotangent in cotangents):  # nothing to wait for: no element to depend on
    return residuals
  forms = {"cpu": Form(here or _by_arithmetic, single_device=True)}
  if gpus is not None:
    forms |= {"cuda": gpus, "rocm": gpus}
  return by_platform(elsewhere, forms, list(residuals), list(cotangents))


def by_first_element(wait: Wait, values: Any, x: jax.Array) -> Any:
  """A pytree of arrays that waits for the first element of `x`, in forward passes. Batches of `x` do not batch it."""

  @jax.custom_batching.custom_vmap
  def waiting(values, element):
    leaves, treedef = jax.tree.flatten(values)
    return jax.tree.unflatten(treedef, wait(leaves, [element]))

  @waiting.def_vmap
  def _(size, batched, values, element):
    del size
    of_values, of_element = batched
    one = element[0] if of_element else element
    if not any(jax.tree.leaves(of_values)):
      return waiting(values, one), of_values
    axes = jax.tree.map(lambda is_batched: 0 if is_batched else None, of_values)
    every = jax.tree.map(lambda _: True, of_values)
    return jax.vmap(lambda values: waiting(values, one), in_axes=(axes,))(values), every

  return values if 0 in x.shape else waiting(values, _first_element(x))


def _by_arithmetic(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """Residuals times one, where that one is made of a cotangent's bits.

  For narrow formats, which would be widened and rounded, a bitwise or with such a zero. No compiler pass ahead of code
  generation sees what it is; code generation does, and it costs nothing.
  """
  zero = _zero_of(cotangents[0])
  return [_unchanged(value, zero) if _has_bits(value) else value for value in residuals]


def _codes_by_arithmetic(residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  zero = _zero_of(cotangents[0])
  waits = lambda value: _has_bits(value) or jnp.issubdtype(value.dtype, jnp.integer)
  return [_unchanged(value, zero) if waits(value) else value for value in residuals]


def _zero_of(cotangent: Any) -> jax.Array:
  """A zero that is made of a cotangent's bits."""
  bits = lax.bitcast_convert_type(_first_element(cotangent).astype(jnp.float32), jnp.uint32)
  return lax.shift_right_logical(lax.shift_right_logical(bits, jnp.uint32(31)), jnp.uint32(1))


def _has_bits(value: Any) -> bool:
  return jnp.issubdtype(value.dtype, jnp.floating) and value.ndim > 0


def _unchanged(value: jax.Array, zero: jax.Array) -> jax.Array:
  if jnp.issubdtype(value.dtype, jnp.integer):
    return value | zero.astype(value.dtype)
  if value.dtype.itemsize > 2:
    return value * (1 + zero.astype(value.dtype))
  unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
  return lax.bitcast_convert_type(lax.bitcast_convert_type(value, unsigned) | zero.astype(unsigned), value.dtype)


def _first_element(value: jax.Array) -> jax.Array:
  return lax.reshape(lax.slice(value, (0,) * value.ndim, (1,) * value.ndim), ())
