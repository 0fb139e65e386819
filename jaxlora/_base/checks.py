"""Checks of values, where they are known: under `jit` they are not."""

from collections.abc import Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.coded import is_coded
from jaxlora._base.text import listed


def is_known(*arrays: Any) -> bool:
  """Whether the values of all arrays are known, as they are outside of a transformation, and none is traced."""
  return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def is_abstract(leaf: Any) -> bool:
  """Whether a leaf is only a shape and a dtype, such as a `jax.ShapeDtypeStruct`, and no array of any kind."""
  if is_coded(leaf):
    return any(map(is_abstract, jax.tree.leaves(leaf)))
  array = isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or hasattr(leaf, "__array__")
  array = array or hasattr(leaf, "__jax_array__")
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not array


def is_foreign(leaf: Any) -> bool:
  """Whether a leaf is like an array and of a type that JAX cannot trace: it is no pytree node either."""
  known = isinstance(leaf, (jax.Array, np.ndarray, np.generic)) or is_coded(leaf)
  return hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not known and not is_abstract(leaf)


def check_finite(named: Sequence[tuple[str, Any]], what: str) -> None:
  """Raises if an array whose values are known has NaN or infinite elements, with the names of all such arrays."""
  with jax.ensure_compile_time_eval():  # known values can be closed over under jit, too
    broken = [name for name, x in named if is_known(x) and not all_finite(x)]
  if broken:
    raise ValueError(
      f"{what}: found NaN or infinite values in {listed(broken)}, expected finite numbers. If they come from training,"
      " it has diverged: go back to an earlier checkpoint."
    )


@jax.jit
def all_finite(x: jax.Array) -> jax.Array:
  return jnp.isfinite(x).all()


def check_number(value: Any, what: str) -> None:
  """Raises unless `value` is one real number, and finite where it is known."""
  number = isinstance(value, (int, float, np.number, np.ndarray, jax.Array)) and not isinstance(value, bool)
  if not number or jnp.ndim(value) != 0 or jnp.issubdtype(jnp.result_type(value), jnp.complexfloating):
    raise TypeError(f"{what} is {value!r}, expected one real number.")
  if is_known(value) and not math.isfinite(float(value)):
    raise ValueError(f"{what} is {value!r}, expected a finite number.")


def positive(value: Any, what: str) -> int:
  """`value`, or an error unless it is a whole number above 0."""
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"{what} is {value!r}, expected a whole number above 0.")
  return value
