"""`value_and_grad` and `grad`: derivatives with respect to the trainable leaves alone."""

from collections.abc import Callable, Sequence
import functools
import operator
from typing import Any

import jax

from jaxlora._adapt.halves import join, split
from jaxlora._weight.tree import check_adapted


def value_and_grad(
  fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
  """`jax.value_and_grad` with respect to the trainable leaves of combined trees alone.

  The base gets no gradient buffers at all, and may hold integers.

  Args:
    fn: a function that returns a scalar, or `(scalar, aux)`; it takes combined trees and calls `wrap`ped functions.
    argnums: which positional arguments are combined trees to differentiate.
    has_aux: whether `fn` returns `(scalar, aux)`.

  Returns:
    A function that returns `(value, gradients)`; the gradients have the structure of `split(tree)[1]`, with `None` in
    the places of frozen leaves.

  Raises:
    TypeError: if `argnums` is no integer or sequence of them.
    ValueError: when called, if `argnums` names no positional argument, or one twice, or one without an adapted leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> apply = jaxlora.wrap(lambda params, x: x @ params["kernel"])
    >>> value, grads = value_and_grad(lambda tree, x: apply(tree, x).sum())(tree, jnp.ones((2, 6)))
    >>> float(value), grads
    (60.0, {'kernel': LoraWeight(6x5 io, rank 2, f32, without base)})
  """
  return _differentiated(fn, argnums, has_aux, "value_and_grad")


def _differentiated(
  fn: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, what: str
) -> Callable[..., Any]:
  numbers, single = _argument_numbers(argnums, what)

  @functools.wraps(fn)
  def differentiated(*args: Any, **kwargs: Any) -> Any:
    places = _places(numbers, len(args), what)
    for n in places:
      check_adapted(args[n], f"{what}: argument {n}")
    halves = {n: split(args[n]) for n in places}
    frozen = tuple(halves[n][0] if n in halves else arg for n, arg in enumerate(args))

    def of_trainable(trainables, args):
      full = list(args)
      for n, trainable in zip(places, trainables, strict=True):
        full[n] = join(args[n], trainable)
      return fn(*full, **kwargs)

    value, grads = jax.value_and_grad(of_trainable, has_aux=has_aux)(tuple(halves[n][1] for n in places), frozen)
    return value, grads[0] if single else grads

  return differentiated


def _argument_numbers(argnums: Any, what: str) -> tuple[tuple[int, ...], bool]:
  """The numbers in `argnums`, and whether it is a single number."""
  try:
    return (operator.index(argnums),), True
  except TypeError:
    pass
  try:
    return tuple(map(operator.index, argnums)), False
  except TypeError:
    raise TypeError(
      f"{what}: argnums is {argnums!r}, expected the number of a positional argument, or a sequence of such numbers."
    ) from None


def _places(numbers: Sequence[int], count: int, what: str) -> list[int]:
  """The positions, out of `count`, that the numbers mean; negative ones count from the end."""
  for n in numbers:
    if not -count <= n < count:
      raise ValueError(
        f"{what}: argnums has {n}, but the call has {count} positional arguments"
        + (f"; expected a number from {-count} to {count - 1}." if count else ".")
        + " Pass the tree by position, not by keyword."
      )
  places = [n % count for n in numbers]
  if len(set(places)) != len(places):
    raise ValueError(f"{what}: argnums {tuple(numbers)} names an argument twice; name each once.")
  return places


def grad(fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
  """`jax.grad` with respect to the trainable leaves of combined trees alone.

  Args:
    fn, argnums, has_aux: as for `value_and_grad`.

  Returns:
    A function that returns the gradients, or `(gradients, aux)`.

  Raises:
    TypeError, ValueError: as `value_and_grad`.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> apply = jaxlora.wrap(lambda params, x: x @ params["kernel"])
    >>> grad(lambda tree, x: apply(tree, x).sum())(tree, jnp.ones((2, 6)))
    {'kernel': LoraWeight(6x5 io, rank 2, f32, without base)}
  """
  both = _differentiated(fn, argnums, has_aux, "grad")

  @functools.wraps(fn)
  def differentiated(*args: Any, **kwargs: Any) -> Any:
    value, grads = both(*args, **kwargs)
    return (grads, value[1]) if has_aux else grads

  return differentiated
