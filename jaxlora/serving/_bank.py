"""`Bank`: adapters of one base, side by side."""

from collections.abc import Collection, Iterable, Mapping
import dataclasses
import json
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.export import serialised
from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._weight.weight import FullWeight, LoraWeight
from jaxlora.serving._adapters import adapter_nodes, check_name, check_nesting, joint_base
from jaxlora.serving._slots import (
  LowRankSlots,
  Slots,
  WholeSlots,
  arrays_of,
  as_sure,
  beside,
  check_finite_parts,
  check_fits,
  values_for,
)

NONE = -1  # the id of the base alone


class Names:
  """Which adapter is in which slot, and of which base they are, as far as they came with it: leaf path -> digest.

  Equal to any other: what a bank is called decides nothing about its compilation.
  """

  def __init__(self, slots: tuple[str | None, ...] | None, base: Mapping[str, str] | None = None):
    self.slots = slots
    self.base = dict(base or {})

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, Names)

  def __hash__(self) -> int:
    return hash(Names)


@jax.tree_util.register_pytree_with_keys_class
class Bank:
  """Adapters of one base, side by side.

      y_i = x_i W + (x_i A[id_i]^T) B[id_i]          for row i of a batch, in `jaxlora.route`

  A pytree whose leaves all have a leading axis over the `capacity` adapters that it holds at most; ranks are padded
  with zeros, scales folded into B, the dropout of training left behind. Banks of one form share compiled functions
  whatever is in them. A bank is immutable: `put` and `remove` return another one.

  Inside transformed functions (`jit`, `grad`) a bank is arrays alone, without names, and so is one that comes out of
  them: `new.named_as(old)` gives them back. Train a bank as any pytree, `jax.grad` with respect to it included.

  Attributes:
    factors: leaf path -> the adapters' factors there, or their values of a leaf trained whole.
  """

  def __init__(self, factors: dict[str, Slots], treedef: Any, names: Names):
    self.factors = factors
    self._treedef = treedef
    self._names = names

  def tree_flatten_with_keys(self) -> tuple[Any, Any]:
    children = [(jax.tree_util.DictKey(path), slots) for path, slots in self.factors.items()]
    return children, (tuple(self.factors), self._treedef, self._names)

  @classmethod
  def tree_unflatten(cls, aux: Any, children: Iterable[Any]) -> "Bank":
    paths, treedef, names = aux
    factors = dict(zip(paths, children, strict=True))
    # A compiled function remembers the names that its first bank had: it is not to hand them to another one.
    traced = any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(factors))
    return cls(factors, treedef, Names(None) if traced else names)

  # Who is there.

  @property
  def capacity(self) -> int:
    """How many adapters there is room for."""
    return next(iter(self.factors.values())).present.shape[0]

  @property
  def names(self) -> tuple[str, ...]:
    """The adapters there are, by slot."""
    return tuple(name for name in self._slots("names") if name is not None)

  @property
  def low_rank(self) -> tuple[str, ...]:
    """The paths of the leaves with low-rank factors."""
    return tuple(path for path, slots in self.factors.items() if isinstance(slots, LowRankSlots))

  def __len__(self) -> int:
    return len(self.names)

  def __contains__(self, name: Any) -> bool:
    return name is not None and name in self._slots("in")

  def __repr__(self) -> str:
    held = "names unknown" if self._names.slots is None else f"{len(self)} of {self.capacity} slots in use"
    leaves = jax.tree.leaves(self.factors)
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves if hasattr(leaf, "dtype"))
    return f"Bank({held}, {len(self.factors)} leaves, {size:,} bytes)"

  def ids(self, names: Iterable[str | None]) -> jax.Array:
    """The numbers of adapters, one for each row of a batch; `None` is the base alone.

    Raises:
      ValueError: on a name that the bank does not hold.
    """
    return jnp.asarray([NONE if name is None else self._slot(name, "ids") for name in names], jnp.int32)

  def named_as(self, other: "Bank") -> "Bank":
    """The same bank with the names of another one: for a bank that comes out of a compiled function.

    Raises:
      ValueError: if the other one has no names, or another capacity.
    """
    slots = other._slots("named_as")
    if len(slots) != self.capacity:
      raise ValueError(
        f"named_as: the other bank has {len(slots)} slots, this one {self.capacity}. Take the names of the bank that"
        " this one was made from."
      )
    return Bank(self.factors, self._treedef, Names(slots, other._names.base))

  def _slots(self, what: str) -> tuple[str | None, ...]:
    if self._names.slots is None:
      raise ValueError(
        f"bank.{what}: names stay outside of transformed functions, and this bank is in one, or has come out of one."
        " Use names outside (bank.ids), and give a bank that a function returns its names again: new.named_as(old)."
      )
    return self._names.slots

  def _slot(self, name: str, what: str) -> int:
    slots = self._slots(what)
    if name is None or name not in slots:
      raise ValueError(
        f"bank.{what}: there is no adapter {name!r}; the bank holds {listed(list(map(repr, self.names))) or 'none'}."
      )
    return slots.index(name)

  # Who comes and goes.

  def put(self, name: str, adapter: Any, *, donate: bool = False) -> "Bank":
    """The bank with one adapter more, or with another one under a name that is there.

    Args:
      name: what to call it.
      adapter: the trainable half that `split` gives, or a whole tree, whose base is then left out. It may leave out
        leaves of the bank, but have no others; its ranks are at most the bank's.
      donate: whether to write into this bank's own memory, instead of a copy of it. This bank is of no use afterwards.

    Returns:
      The new bank. Compiled functions that took this one take it as it is.

    Raises:
      ValueError: if the bank is full or the adapter does not fit, naming the leaf. This bank is then what it was.
      TypeError: if the name is not a string.
    """
    slots = self._slots("put")
    check_name(name)
    values, unsure = self._fitted(name, adapter)
    base = joint_base(self._names.base, adapter, f"bank.put: {name!r}")
    if name not in slots and None not in slots:
      raise ValueError(
        f"bank.put: the bank is full: {self.capacity} adapters. Remove one (bank.remove(name)), or stack them anew with"
        f" a larger capacity; {name!r} was not put in."
      )
    slot = slots.index(name if name in slots else None)
    return self._written(slot, name, values, unsure, donate, base)

  def remove(self, name: str, *, donate: bool = False) -> "Bank":
    """The bank without one adapter: rows with its number then have the base alone.

    Args:
      name: which one.
      donate: as in `put`.

    Raises:
      ValueError: if it is not there.
    """
    return self._written(self._slot(name, "remove"), None, {}, set(), donate, self._names.base)

  def take(self, name: str) -> Any:
    """One adapter, as the trainable half of a tree, for `jaxlora.join` with a frozen half.

    It has the bank's ranks and scale 1: all adapters of a bank that have the same leaves share one structure, so that
    functions compiled for one serve all of them. See `pad` for the same of an adapter in no bank.

    Raises:
      ValueError: if it is not there.
    """
    slot = self._slot(name, "take")
    present = {path: float(slots.present[slot]) > 0 for path, slots in self.factors.items()}
    nodes = {path: _taken(slots, slot) for path, slots in self.factors.items() if present[path]}
    paths = [path for path, _ in flatten(jax.tree.unflatten(self._treedef, [0] * self._treedef.num_leaves))[0]]
    return jax.tree.unflatten(self._treedef, [nodes.get(path) for path in paths])

  def _fitted(self, name: str, adapter: Any) -> tuple[dict[str, dict[str, Any]], set[str]]:
    """What an adapter writes at each leaf, in the bank's ranks and dtypes, and where its roles are not certain."""
    what = f"bank.put: {name!r}"
    nodes, treedef = adapter_nodes(adapter, what)
    check_nesting(treedef, self._treedef, what, "the bank's adapters")
    if foreign := sorted(set(nodes) - set(self.factors)):
      raise ValueError(
        f"{what} adapts {listed(foreign)}, for which the bank has no room: it holds {listed(sorted(self.factors))}."
        " Stack a bank anew with an adapter that has those leaves, or leave them out of this one."
      )
    for path, node in nodes.items():
      check_fits(node, self.factors[path], f"{what}: {path}")
      check_finite_parts(node, f"{what}: {path}")
    unsure = {path for path, node in nodes.items() if not getattr(node, "sure", True)}
    return {path: values_for(nodes[path], self.factors[path]) for path in nodes}, unsure

  def _written(
    self,
    slot: int,
    name: str | None,
    values: dict[str, dict[str, Any]],
    unsure: Collection[str],
    donate: bool,
    base: Mapping[str, str],
  ) -> "Bank":
    """The bank with one slot written anew; leaves without values are emptied there."""
    full = {path: _beside(values.get(path) or _nothing(slots), slots) for path, slots in self.factors.items()}
    write = _write_in_place if donate else _write
    sure = {path: path not in unsure and getattr(slots, "sure", True) for path, slots in self.factors.items()}
    written = write(self.factors, full, jnp.asarray(slot, jnp.int32))
    factors = {path: as_sure(slots, sure[path]) for path, slots in written.items()}
    slots = self._slots("put")
    return Bank(factors, self._treedef, Names((*slots[:slot], name, *slots[slot + 1 :]), base))


def _write_slot(factors: dict[str, Slots], values: dict[str, dict[str, Any]], slot: jax.Array) -> dict[str, Slots]:
  def written(slots: Slots, new: dict[str, Any]) -> Slots:
    return dataclasses.replace(
      slots, **{part: lax.dynamic_update_index_in_dim(getattr(slots, part), new[part], slot, 0) for part in new}
    )

  return {path: written(slots, values[path]) for path, slots in factors.items()}


_write = jax.jit(_write_slot)

_write_in_place = jax.jit(_write_slot, donate_argnums=0)


def _beside(values: dict[str, Any], slots: Slots) -> dict[str, Any]:
  """Values of one slot, in the shards that the bank's arrays have."""
  return {part: beside(value, getattr(slots, part)) for part, value in values.items()}


def _nothing(slots: Slots) -> dict[str, Any]:
  """What an adapter writes at a leaf that it leaves alone."""
  return {part: np.zeros(array.shape[1:], array.dtype) for part, array in arrays_of(slots).items()}


def _taken(slots: Slots, slot: int) -> Any:
  if isinstance(slots, WholeSlots):
    return FullWeight(base=None, value=slots.value[slot])
  return LoraWeight.from_factors(None, slots.a[slot], slots.b[slot], slots.roles, sure=slots.sure)


def _written(aux: Any) -> bytes:
  paths, treedef, _ = aux
  try:
    nesting = treedef.serialize_using_proto()
  except ValueError as error:
    raise ValueError(
      f"a bank for parameters of the nesting {treedef} cannot be an argument of a serialised function: only dicts,"
      " lists and tuples can be written. Close over the bank, or make it for such a tree."
    ) from error
  return json.dumps([list(paths), nesting.hex()]).encode()


def _read(text: bytes) -> Any:
  paths, nesting = json.loads(text)
  treedef = jax.tree_util.PyTreeDef.deserialize_using_proto(jax.tree_util.default_registry, bytes.fromhex(nesting))
  return tuple(paths), treedef, Names(None)


serialised(Bank, _written, _read, Bank.tree_unflatten)
