"""`stack`: makes a bank."""

from collections.abc import Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from jaxlora._base.checks import positive
from jaxlora._base.dtypes import wider_dtype
from jaxlora._weight.placement import put_on
from jaxlora._weight.weight import FullWeight, LoraWeight
from jaxlora.serving._adapters import adapter_nodes, check_name, check_nesting, joint_base
from jaxlora.serving._bank import Bank, Names
from jaxlora.serving._slots import (
  LowRankSlots,
  Slots,
  WholeSlots,
  arrays_of,
  check_finite_parts,
  check_fits,
  lies_on_a_mesh,
  values_for,
  with_rank,
)


def stack(adapters: Mapping[str, Any], capacity: int | None = None, rank: int | None = None) -> Bank:
  """Puts adapters of one base side by side in a `Bank`.

  They may differ in rank, alpha, scaling and dtype, and in the leaves that they adapt: the bank has every leaf that one
  of them has, and zero factors where an adapter leaves it alone. Leaves trained whole (`LoraConfig.train`) are held per
  adapter, too; a row that uses one then has an array of its own there, which biases and norms hardly notice, while a
  whole kernel per row costs what it costs.

  Args:
    adapters: name -> the trainable half that `split` gives, or a whole tree, whose base is then left out.
    capacity: how many adapters the bank has room for; by default those that are given.
    rank: the rank of every leaf of the bank; by default the largest that an adapter has there.

  Returns:
    A `Bank`, of the adapters' own bytes (padded to the rank) for each slot; in the shards of adapters that lie on a
    mesh.

  Raises:
    ValueError: naming the adapter and the leaf, what was found and what was expected: no adapters, more than the
      capacity, a rank above the bank's, adapters of different bases, NaN or infinite factors.
    TypeError: on a name that is no string.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> def adapter(seed, rank):
    ...   return jaxlora.adapt(params, jaxlora.LoraConfig(rank=rank), jax.random.key(seed))
    >>> bank = jaxlora.stack({"translate": adapter(0, 1), "summarise": adapter(1, 2)}, capacity=8)
    >>> bank.factors["kernel"].a.shape, bank.names
    ((8, 2, 4), ('translate', 'summarise'))
    >>> bank.remove("translate").put("correct", adapter(2, 2)).names
    ('correct', 'summarise')

  Source: Sheng et al., "S-LoRA: Serving Thousands of Concurrent LoRA Adapters", arXiv:2311.03285, section 5.
  """
  if not adapters:
    raise ValueError("stack: no adapters; expected at least one, whose leaves tell the bank's.")
  for name in adapters:
    check_name(name)
  capacity = len(adapters) if capacity is None else positive(capacity, "stack: capacity")
  if capacity < len(adapters):
    raise ValueError(f"stack: {len(adapters)} adapters, but a capacity of {capacity}. Raise it, or stack fewer.")
  rank = None if rank is None else positive(rank, "stack: rank")
  (first, *_), treedef = adapters, None
  nodes: dict[str, dict[str, Any]] = {}
  for name, adapter in adapters.items():
    nodes[name], other = adapter_nodes(adapter, f"stack: {name!r}")
    treedef = other if treedef is None else treedef
    check_nesting(other, treedef, f"stack: {name!r}", repr(first))
  by_path: dict[str, dict[str, Any]] = {}
  for name, own in nodes.items():
    for path, node in own.items():
      by_path.setdefault(path, {})[name] = node
  empty = {path: _form(path, owners, capacity, rank) for path, owners in sorted(by_path.items())}
  base: dict[str, str] = {}
  for name, adapter in adapters.items():
    base = joint_base(base, adapter, f"stack: {name!r}")
  filled = {path: _filled(by_path[path], form, list(adapters)) for path, form in empty.items()}
  return Bank(filled, treedef, Names((*adapters, *[None] * (capacity - len(adapters))), base))


def _form(path: str, owners: dict[str, Any], capacity: int, rank: int | None) -> Slots:
  """The types of a leaf's slots; raises unless all its owners fit."""
  (first, example), *_ = owners.items()

  def dtype_of(part: str) -> Any:
    return functools.reduce(wider_dtype, (getattr(node, part).dtype for node in owners.values() if hasattr(node, part)))

  present = jax.ShapeDtypeStruct((capacity,), np.dtype("float32"))
  form: Slots
  if isinstance(example, FullWeight):
    form = WholeSlots(jax.ShapeDtypeStruct((capacity, *example.value.shape), dtype_of("value")), present)
  else:
    widest = max(node.rank for node in owners.values() if isinstance(node, LoraWeight)) if rank is None else rank
    place = example.roles.count("s")
    a, b = (
      jax.ShapeDtypeStruct((capacity, *with_rank(factor.shape, place, widest)), dtype_of(part))
      for part, factor in (("a", example.a), ("b", example.b))
    )
    form = LowRankSlots(a, b, present, example.roles, all(getattr(node, "sure", True) for node in owners.values()))
  for name, node in owners.items():
    check_fits(node, form, f"stack: {name!r}: {path}", f"those of {first!r}")
    check_finite_parts(node, f"stack: {name!r}: {path}")
  return form


def _filled(owners: dict[str, Any], form: Slots, names: Sequence[str]) -> Slots:
  """A leaf's slots with the adapters in them, in order."""
  values = {slot: values_for(owners[name], form) for slot, name in enumerate(names) if name in owners}
  filled: dict[str, Any] = {
    part: _side_by_side(kind, {slot: value[part] for slot, value in values.items()})
    for part, kind in arrays_of(form).items()
  }
  return dataclasses.replace(form, **filled)


def _side_by_side(kind: jax.ShapeDtypeStruct, values: dict[int, Any]) -> jax.Array:
  """One array of all slots, zero in those without a value; on the mesh of the first value that lies on one."""
  there = next((value.sharding for value in values.values() if lies_on_a_mesh(value)), None)
  if there is not None:
    return _on_mesh(kind, values, there)
  array = np.zeros(kind.shape, kind.dtype)
  for slot, value in values.items():
    array[slot] = np.asarray(value)
  return jnp.asarray(array)


def _on_mesh(kind: jax.ShapeDtypeStruct, values: dict[int, Any], there: NamedSharding) -> jax.Array:
  """The same in shards: the axis of slots whole, and no value goes through the host."""
  placed = {slot: put_on(value, there) for slot, value in values.items()}

  def fill(placed: dict[int, Any]) -> jax.Array:
    empty = jnp.zeros_like(next(iter(placed.values())))  # in shards, too, where types say so
    return jnp.stack([placed.get(slot, empty) for slot in range(kind.shape[0])])

  lies = NamedSharding(there.mesh, PartitionSpec(None, *there.spec))
  return jax.jit(fill, out_shardings=lies)(placed)
