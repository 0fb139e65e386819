"""`materialize`: a tree made on its mesh, no array of which is whole on any host."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import AbstractMesh, NamedSharding

from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora.sharding._specs import NAME_DEVICES, check_fits


def materialize(abstract: Any, make: Callable[[jax.Array], Any], key: jax.Array) -> Any:
  """Makes a tree whose arrays lie as those of an abstract one say.

  `make` is compiled with the shardings as those of its results: every device makes its own shards, and no host ever
  holds an array that is whole.

  Args:
    abstract: a tree of `jax.ShapeDtypeStruct`s with shardings, as `adapt` makes of such parameters. A leaf without a
      sharding is placed as JAX likes.
    make: from the key to the tree: initialises and adapts, say. It is traced.
    key: a random key.

  Returns:
    `make(key)`.

  Raises:
    ValueError: if a sharding does not divide its leaf, or is of a mesh without devices; if `make` gives a tree of
      another structure, or leaves of other shapes or dtypes; names them.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    >>> rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    >>> abstract = {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32, sharding=rows)}
    >>> config = jaxlora.LoraConfig(rank=2)
    >>> make = lambda key: jaxlora.adapt({"kernel": jax.random.normal(key, (16, 8))}, config, key)
    >>> tree = materialize(jaxlora.adapt(abstract, config, jax.random.key(0)), make, jax.random.key(0))
    >>> tuple(tree["kernel"].base.sharding.spec), tuple(tree["kernel"].a.sharding.spec)
    (('data',), (None, 'data'))
  """
  for path, leaf in flatten(abstract)[0]:
    _check_sharding(f"materialize: {path}", leaf)
  made = jax.eval_shape(make, key)
  wanted, found = (dict(flatten(tree)[0]) for tree in (abstract, made))
  if problems := list(_differences(wanted, found)):
    raise ValueError(f"materialize: make(key) gives another tree than the abstract one: {listed(problems, 20)}.")
  there: Any = jax.tree.structure(made)
  if there != jax.tree.structure(abstract):
    raise ValueError(
      f"materialize: make(key) gives {there}, expected {jax.tree.structure(abstract)}: adapt both with one config, and"
      " with the same probe."
    )
  shardings = [getattr(leaf, "sharding", None) for leaf in wanted.values()]
  leaves = jax.jit(lambda key: jax.tree.leaves(make(key)), out_shardings=shardings)(key)
  return jax.tree.unflatten(there, leaves)


def _check_sharding(path: str, leaf: Any) -> None:
  """Raises unless the leaf can lie as its sharding says."""
  sharding = getattr(leaf, "sharding", None)
  if not isinstance(sharding, NamedSharding):
    return
  if isinstance(sharding.mesh, AbstractMesh):
    raise ValueError(f"{path}: {sharding.spec} is of a mesh without devices, {sharding.mesh}. {NAME_DEVICES}")
  check_fits(path, leaf.shape, sharding.spec, sharding.mesh)


def _differences(wanted: dict[str, Any], found: dict[str, Any]) -> Iterator[str]:
  for path in wanted | found:  # in the order of the trees, on every run
    if path not in found or path not in wanted:
      yield f"{path} is {'missing' if path in wanted else 'not in the abstract tree'}"
    elif (wanted[path].shape, wanted[path].dtype) != (found[path].shape, found[path].dtype):
      one, other = (f"{leaf.dtype}{list(leaf.shape)}" for leaf in (found[path], wanted[path]))
      yield f"{path} is {one}, expected {other}"
