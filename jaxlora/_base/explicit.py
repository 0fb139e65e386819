"""Operations on arrays whose types carry shardings, as they do on meshes of Explicit axes.

There JAX asks how results lie wherever it is not plain. On all other arrays these are what `jax.numpy` has.

Reading order: asking types -> operations that say how results lie -> functions that leave it to the compiler.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

# ----------------------------------------------------------------------------------------------------------------------
# Asking types.


def type_of(x: Any) -> Any:
  """The type of an array; a type is its own."""
  try:
    return jax.typeof(x)
  except TypeError:
    return x


def explicitly_sharded(x: Any) -> bool:
  """Whether the type of `x` carries its sharding: flattening its axes would then have to give one, too."""
  return any(axis is not None for axis in getattr(getattr(type_of(x), "sharding", None), "spec", ()))


def explicit_mesh(*arrays: Any) -> Any:
  """The mesh in the types of some arrays; `None` where no type splits an array over one."""
  return next((type_of(x).sharding.mesh for x in arrays if explicitly_sharded(x)), None)


# ----------------------------------------------------------------------------------------------------------------------
# Operations that say how their results lie.


def sharded_as(x: jax.Array, like: jax.Array) -> jax.Array:
  """`x`, of as many axes as `like` and of size 1 along some, lying as that does."""
  if explicit_mesh(x, like) is None:
    return x
  there = type_of(like).sharding
  names = (None if size == 1 else name for size, name in zip(x.shape, there.spec, strict=True))
  return jax.sharding.reshard(x, NamedSharding(there.mesh, PartitionSpec(*names)))


def einsum(x: jax.Array, x_axes: Sequence[int], y: jax.Array, y_axes: Sequence[int], out: Sequence[int]) -> jax.Array:
  """`jnp.einsum` of two arrays by numbers of axes, at full precision; the result lies as the operands do."""
  mesh, sharding = explicit_mesh(x, y), None
  if mesh is not None:
    named = [pair for array, axes in ((y, y_axes), (x, x_axes)) for pair in zip(axes, _names(array), strict=True)]
    names = dict(pair for pair in named if pair[1] is not None)
    sharding = NamedSharding(mesh, PartitionSpec(*_once([names.get(axis) for axis in out])))
  return jnp.einsum(x, list(x_axes), y, list(y_axes), list(out), precision="highest", out_sharding=sharding)


def _names(x: Any) -> Sequence[Any]:
  """What each axis is split over."""
  return type_of(x).sharding.spec if explicitly_sharded(x) else (None,) * jnp.ndim(x)


def _once(names: Sequence[Any]) -> list[Any]:
  """Names of which the first use of each stands: no axis of a mesh splits two of an array."""
  used: set[Any] = set()
  out: list[Any] = []
  for name in names:
    axes = {*name} if isinstance(name, tuple) else {name} - {None}
    out.append(None if axes & used else name)
    used |= axes
  return out


# ----------------------------------------------------------------------------------------------------------------------
# Functions that leave it to the compiler.


def placed_by_compiler(fn: Callable[..., Any], like: Callable[..., Any] | None = None) -> Callable[..., Any]:
  """A function of arrays and of other values in which no type carries a sharding.

  So decompositions, which JAX refuses to make of split matrices.

  Args:
    fn: the function.
    like: of the same arguments, the array that the result lies as; `None` for results that are whole.
  """

  @functools.wraps(fn)
  def call(*args: Any, **options: Any) -> Any:
    leaves, treedef = jax.tree.flatten(args)
    mesh = explicit_mesh(*leaves)
    if mesh is None:
      return fn(*args, **options)
    arrays = {k: leaf for k, leaf in enumerate(leaves) if isinstance(leaf, jax.Array)}

    def on(arrays: dict[int, Any]) -> Any:
      return fn(*jax.tree.unflatten(treedef, [arrays.get(k, leaf) for k, leaf in enumerate(leaves)]), **options)

    spec = PartitionSpec() if like is None else PartitionSpec(*_names(like(*args)))
    return jax.sharding.auto_axes(on, out_sharding=NamedSharding(mesh, spec))(arrays)

  return call
