"""How codes become the values that a book has for them."""

from collections.abc import Callable, Sequence
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._jax.by_platform import Form, by_platform

LookUp = Callable[[jax.Array, Sequence[float]], jax.Array]

_FEW = 16


def by_selects(codes: jax.Array, book: Sequence[float]) -> jax.Array:
  """By a tree of selects over the bits of a code, for units that have no memory to look up in; a long book by index."""
  if len(book) > _FEW:
    return by_index(codes, book)
  wide = codes.astype(jnp.uint8)
  values = [jnp.full(codes.shape, value, jnp.float32) for value in np.asarray(book, np.float32)]
  bit = 1
  while len(values) > 1:
    is_set = (wide & jnp.uint8(bit)) != 0
    values = [jnp.where(is_set, high, low) for low, high in zip(values[::2], values[1::2], strict=True)]
    bit *= 2
  return values[0]


def by_index(codes: jax.Array, book: Sequence[float]) -> jax.Array:
  """By an index into the book."""
  return jnp.asarray(book, jnp.float32).at[codes.astype(jnp.uint8)].get(mode="promise_in_bounds")


def look_up_by_compiler(codes: jax.Array, book: Sequence[float]) -> jax.Array:
  """As the compiler that the program is lowered for wants it.

  XLA's CPU backend is given an index: out of loops it moves every constant of a select, each as an array of all codes.
  """
  return by_platform(_Way(by_selects, tuple(book)), {"cpu": Form(_Way(by_index, tuple(book)))}, codes)


@dataclasses.dataclass(frozen=True)
class _Way:
  """A look-up in one book: equal for equal ones."""

  by: LookUp
  book: tuple[float, ...]

  def __call__(self, codes: jax.Array) -> jax.Array:
    return self.by(codes, self.book)
