"""What a bank holds for one leaf."""

from collections.abc import Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from jaxlora._base.checks import all_finite
from jaxlora._base.export import serialised_dataclass
from jaxlora._base.text import listed
from jaxlora._weight.aside import Aside
from jaxlora._weight.placement import put_on
from jaxlora._weight.weight import FullWeight, LoraWeight, parts


@serialised_dataclass
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankSlots:
  """The factors that the adapters of a bank have at one weight; zero for those that leave it alone.

  Attributes:
    a: (adapters, *stack, rank, *in).
    b: (adapters, *stack, rank, *out), each adapter's scale in it.
    present: (adapters,), above 0 for those that adapt this weight.
    roles: one letter per axis of the weight.
    sure: whether something tells them for certain.
  """

  a: Any
  b: Any
  present: Any
  roles: str = dataclasses.field(metadata={"static": True})
  sure: bool = dataclasses.field(default=True, metadata={"static": True})

  def __post_init__(self) -> None:
    object.__setattr__(self, "sure", Aside(self.sure))

  @property
  def rank(self) -> int:
    return self.a.shape[1 + self.roles.count("s")]


@serialised_dataclass
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class WholeSlots:
  """The values that the adapters of a bank have for one leaf that they train whole.

  Attributes:
    value: (adapters, *shape).
    present: (adapters,), above 0 for those that have a value; the others take the base's.
  """

  value: Any
  present: Any


Slots = LowRankSlots | WholeSlots


def arrays_of(slots: Slots) -> dict[str, Any]:
  return {f.name: getattr(slots, f.name) for f in dataclasses.fields(slots) if not f.metadata.get("static")}


def as_sure(slots: Slots, sure: bool) -> Slots:
  """The slots, whose roles something tells for certain, or not: a compiled function may have mixed that up."""
  return dataclasses.replace(slots, sure=sure) if isinstance(slots, LowRankSlots) else slots


OTHER_BASE = "It belongs to another base; adapters of one bank are made for one."


def with_rank(shape: Sequence[int], place: int, rank: int) -> tuple[int, ...]:
  return (*shape[:place], rank, *shape[place + 1 :])


def check_fits(node: Any, slots: Slots, what: str, of: str = "the bank's") -> None:
  """Raises unless an adapter's leaf is of the form, and at most of the rank, that a bank has for it."""
  kinds: dict[type, str] = {LoraWeight: "low-rank", FullWeight: "trained whole"}
  whole = isinstance(slots, WholeSlots)
  if isinstance(node, FullWeight) != whole:
    raise ValueError(
      f"{what} is {kinds[type(node)]}, expected a leaf {kinds[FullWeight] if whole else 'with low-rank factors'} as"
      f" {of}. Adapters of one bank treat a leaf alike, or leave it alone."
    )
  if isinstance(slots, WholeSlots):
    if tuple(node.value.shape) != tuple(slots.value.shape[1:]):
      raise ValueError(
        f"{what}: value has shape {tuple(node.value.shape)}, expected {tuple(slots.value.shape[1:])} as {of}."
        f" {OTHER_BASE}"
      )
    return
  if node.roles != slots.roles:
    raise ValueError(f"{what}: roles {node.roles!r}, expected {slots.roles!r} as {of}. {OTHER_BASE}")
  if node.rank > slots.rank:
    raise ValueError(
      f"{what}: rank {node.rank} is above the bank's, {slots.rank}. Stack a bank with a higher one"
      f" (jaxlora.stack(..., rank={node.rank}))."
    )
  for name in ("a", "b"):
    found = tuple(getattr(node, name).shape)
    expected = with_rank(getattr(slots, name).shape[1:], slots.roles.count("s"), node.rank)
    if found != expected:
      raise ValueError(f"{what}: factor {name} has shape {found}, expected {expected} as {of}. {OTHER_BASE}")


def check_finite_parts(node: Any, what: str) -> None:
  """Raises if an adapter has diverged: products that run over several adapters would spread it."""
  broken = [name for name, part in parts(node).items() if name != "base" and not _is_finite(part)]
  if broken:
    raise ValueError(
      f"{what}: found NaN or infinite values in {listed(broken)}, expected finite ones. Training has diverged: go back"
      " to an earlier checkpoint."
    )


def _is_finite(part: Any) -> bool:
  """Whether all values are; an array in shards is asked where it lies."""
  return bool(all_finite(part) if lies_on_a_mesh(part) else np.isfinite(np.asarray(part)).all())


def lies_on_a_mesh(array: Any) -> bool:
  """Whether an array is in shards, or copies, on several devices of a mesh."""
  known = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
  return known and isinstance(array.sharding, NamedSharding) and array.sharding.num_devices > 1


def beside(value: Any, slots: Any) -> Any:
  """What goes into one slot of a bank's array, in the shards of that array."""
  if not lies_on_a_mesh(slots):
    return value
  spec = (*slots.sharding.spec, *[None] * (slots.ndim - len(slots.sharding.spec)))
  return put_on(jnp.asarray(value), NamedSharding(slots.sharding.mesh, PartitionSpec(*spec[1:])))


def padded(weight: LoraWeight, rank: int) -> tuple[jax.Array, jax.Array]:
  """The effective factors with zeros for the ranks that they lack."""
  place = weight.roles.count("s")

  def wider(factor: jax.Array) -> jax.Array:
    missing = rank - factor.shape[place]
    if not missing:
      return factor
    return jnp.pad(factor, [(0, missing if axis == place else 0) for axis in range(factor.ndim)])

  a, b = weight.factors()
  return wider(a), wider(b)


def values_for(node: Any, slots: Slots) -> dict[str, Any]:
  """What an adapter writes at a leaf of its own."""
  present = np.ones((), slots.present.dtype)
  if isinstance(slots, WholeSlots):
    return {"value": jnp.asarray(node.value, slots.value.dtype), "present": present}
  a, b = padded(node, slots.rank)
  return {"a": a.astype(slots.a.dtype), "b": b.astype(slots.b.dtype), "present": present}
