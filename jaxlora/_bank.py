"""Many adapters on one base: `stack` makes a bank of them, `route` runs a batch whose rows use different ones.

A bank is one pytree of arrays with an axis over adapters; which adapter is where is known outside of it, to people. A
compiled function sees numbers alone: other adapters, other mixes and other names compile nothing.

Reading order: the bank -> making one -> one adapter in a bank's form -> a batch of rows.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
import dataclasses
import functools
import types
from typing import Any, NamedTuple
import weakref

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np

from jaxlora import _banked, _compat, _lowrank, _paths, _transform
from jaxlora._adapt import adapted_leaves
from jaxlora._axes import factor_shape
from jaxlora._fingerprint import prints
from jaxlora._lowrank import Factored, Routing
from jaxlora._targets import listed
from jaxlora._transform import ON_MATERIALIZE, Record
from jaxlora._weight import FullWeight, LoraWeight, is_adapted, parts, wider_dtype

NONE = -1  # the id of the base alone


# ----------------------------------------------------------------------------------------------------------------------
# The bank.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LowRankSlots:
  """The factors that the adapters of a bank have at one weight; zero for those that leave it alone.

  Attributes:
    a: (adapters, *stack, rank, *in).
    b: (adapters, *stack, rank, *out), each adapter's scale in it.
    present: (adapters,), above 0 for those that adapt this weight.
    roles: one letter per axis of the weight.
  """

  a: Any
  b: Any
  present: Any
  roles: str = dataclasses.field(metadata={"static": True})

  @property
  def rank(self) -> int:
    return self.a.shape[1 + self.roles.count("s")]


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


class _Names:
  """Which adapter is in which slot, and of which base they are, as far as they came with it: leaf path -> digest.

  Equal to any other: what a bank is called decides nothing about its compilation.
  """

  def __init__(self, slots: tuple[str | None, ...] | None, base: Mapping[str, str] | None = None):
    self.slots = slots
    self.base = dict(base or {})

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Names)

  def __hash__(self) -> int:
    return hash(_Names)


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

  def __init__(self, factors: dict[str, Slots], treedef: Any, names: _Names):
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
    return cls(factors, treedef, _Names(None) if traced else names)

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
    return Bank(self.factors, self._treedef, _Names(slots, other._names.base))

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
    _check_name(name)
    values = self._fitted(name, adapter)
    base = _joint_base(self._names.base, adapter, f"bank.put: {name!r}")
    if name not in slots and None not in slots:
      raise ValueError(
        f"bank.put: the bank is full: {self.capacity} adapters. Remove one (bank.remove(name)), or stack them anew with"
        f" a larger capacity; {name!r} was not put in."
      )
    slot = slots.index(name if name in slots else None)
    return self._written(slot, name, values, donate, base)

  def remove(self, name: str, *, donate: bool = False) -> "Bank":
    """The bank without one adapter: rows with its number then have the base alone.

    Args:
      name: which one.
      donate: as in `put`.

    Raises:
      ValueError: if it is not there.
    """
    return self._written(self._slot(name, "remove"), None, {}, donate, self._names.base)

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
    paths = [path for path, _ in _paths.flatten(jax.tree.unflatten(self._treedef, [0] * self._treedef.num_leaves))[0]]
    return jax.tree.unflatten(self._treedef, [nodes.get(path) for path in paths])

  def _fitted(self, name: str, adapter: Any) -> dict[str, dict[str, Any]]:
    """What an adapter writes at each leaf, in the bank's ranks and dtypes."""
    what = f"bank.put: {name!r}"
    nodes, treedef = _adapter_nodes(adapter, what)
    _check_nesting(treedef, self._treedef, what, "the bank's adapters")
    if foreign := sorted(set(nodes) - set(self.factors)):
      raise ValueError(
        f"{what} adapts {listed(foreign)}, for which the bank has no room: it holds {listed(sorted(self.factors))}."
        " Stack a bank anew with an adapter that has those leaves, or leave them out of this one."
      )
    for path, node in nodes.items():
      _check_fits(node, self.factors[path], f"{what}: {path}")
      _check_finite(node, f"{what}: {path}")
    return {path: _values(nodes[path], self.factors[path]) for path in nodes}

  def _written(
    self, slot: int, name: str | None, values: dict[str, dict[str, Any]], donate: bool, base: Mapping[str, str]
  ) -> "Bank":
    """The bank with one slot written anew; leaves without values are emptied there."""
    full = {path: values.get(path) or _nothing(slots) for path, slots in self.factors.items()}
    write = _write_in_place if donate else _write
    factors = write(self.factors, full, jnp.asarray(slot, jnp.int32))
    slots = self._slots("put")
    return Bank(factors, self._treedef, _Names((*slots[:slot], name, *slots[slot + 1 :]), base))


def _write_slot(factors: dict[str, Slots], values: dict[str, dict[str, Any]], slot: jax.Array) -> dict[str, Slots]:
  def written(slots: Slots, new: dict[str, Any]) -> Slots:
    return dataclasses.replace(
      slots, **{part: lax.dynamic_update_index_in_dim(getattr(slots, part), new[part], slot, 0) for part in new}
    )

  return {path: written(slots, values[path]) for path, slots in factors.items()}


_write = jax.jit(_write_slot)
_write_in_place = jax.jit(_write_slot, donate_argnums=0)


def _nothing(slots: Slots) -> dict[str, Any]:
  """What an adapter writes at a leaf that it leaves alone."""
  return {part: np.zeros(array.shape[1:], array.dtype) for part, array in _arrays(slots).items()}


def _arrays(slots: Slots) -> dict[str, Any]:
  return {f.name: getattr(slots, f.name) for f in dataclasses.fields(slots) if not f.metadata.get("static")}


def _values(node: Any, slots: Slots) -> dict[str, Any]:
  """What an adapter writes at a leaf of its own."""
  present = np.ones((), slots.present.dtype)
  if isinstance(slots, WholeSlots):
    return {"value": jnp.asarray(node.value, slots.value.dtype), "present": present}
  a, b = padded(node, slots.rank)
  return {"a": a.astype(slots.a.dtype), "b": b.astype(slots.b.dtype), "present": present}


def _taken(slots: Slots, slot: int) -> Any:
  if isinstance(slots, WholeSlots):
    return FullWeight(base=None, value=slots.value[slot])
  return _plain(slots.a[slot], slots.b[slot], slots.roles, None)


# ----------------------------------------------------------------------------------------------------------------------
# Making one.


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
    A `Bank`, of the adapters' own bytes (padded to the rank) for each slot.

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
    _check_name(name)
  capacity = len(adapters) if capacity is None else _positive(capacity, "capacity")
  if capacity < len(adapters):
    raise ValueError(f"stack: {len(adapters)} adapters, but a capacity of {capacity}. Raise it, or stack fewer.")
  rank = None if rank is None else _positive(rank, "rank")
  (first, *_), treedef = adapters, None
  nodes: dict[str, dict[str, Any]] = {}
  for name, adapter in adapters.items():
    nodes[name], other = _adapter_nodes(adapter, f"stack: {name!r}")
    treedef = other if treedef is None else treedef
    _check_nesting(other, treedef, f"stack: {name!r}", repr(first))
  by_path: dict[str, dict[str, Any]] = {}
  for name, own in nodes.items():
    for path, node in own.items():
      by_path.setdefault(path, {})[name] = node
  empty = {path: _form(path, owners, capacity, rank) for path, owners in sorted(by_path.items())}
  base: dict[str, str] = {}
  for name, adapter in adapters.items():
    base = _joint_base(base, adapter, f"stack: {name!r}")
  filled = {path: _filled(by_path[path], form, list(adapters)) for path, form in empty.items()}
  return Bank(filled, treedef, _Names((*adapters, *[None] * (capacity - len(adapters))), base))


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
      jax.ShapeDtypeStruct((capacity, *_with_rank(factor.shape, place, widest)), dtype_of(part))
      for part, factor in (("a", example.a), ("b", example.b))
    )
    form = LowRankSlots(a, b, present, example.roles)
  for name, node in owners.items():
    _check_fits(node, form, f"stack: {name!r}: {path}", f"those of {first!r}")
    _check_finite(node, f"stack: {name!r}: {path}")
  return form


def _filled(owners: dict[str, Any], form: Slots, names: Sequence[str]) -> Slots:
  """A leaf's slots with the adapters in them, in order."""
  arrays = {part: np.zeros(kind.shape, kind.dtype) for part, kind in _arrays(form).items()}
  for slot, name in enumerate(names):
    if name in owners:
      for part, value in _values(owners[name], form).items():
        arrays[part][slot] = np.asarray(value)
  filled: dict[str, Any] = {part: jnp.asarray(array) for part, array in arrays.items()}
  return dataclasses.replace(form, **filled)


def _check_name(name: Any) -> None:
  if not isinstance(name, str):
    raise TypeError(f"an adapter's name is a string; found {name!r}.")


def _positive(value: Any, what: str) -> int:
  if isinstance(value, bool) or not isinstance(value, int) or value < 1:
    raise ValueError(f"stack: {what} is {value!r}, expected a whole number above 0.")
  return value


def _is_half_leaf(node: Any) -> bool:
  return node is None or is_adapted(node)


def _adapter_nodes(adapter: Any, what: str) -> tuple[dict[str, Any], Any]:
  """What an adapter has at its leaves, and the nesting of its tree."""
  nodes, treedef = _paths.flatten(adapter, is_leaf=_is_half_leaf)
  own = {path: node for path, node in nodes if is_adapted(node)}
  if not own:
    raise ValueError(
      f"{what} has no adapted leaf; expected the trainable half that jaxlora.split gives, or what jaxlora.adapt gave."
    )
  for path, node in own.items():
    half = any(part is None for part in parts(node).values())
    if half and isinstance(node, LoraWeight) and (node.variant != "lora" or node.extra):
      raise ValueError(
        f"{what}: {path}: an adapter of the variant {node.variant!r} has parts that are frozen, in the other half. Pass"
        " the whole tree, jaxlora.join(frozen, trainable)."
      )
    if missing := [name for name, part in parts(node).items() if part is None and name != "base"]:
      raise ValueError(
        f"{what}: {path}: {', '.join(missing)} missing: this is the frozen half of a tree. Pass the trainable one:"
        " frozen, trainable = jaxlora.split(tree)."
      )
  return {path: _as_lora(node, f"{what}: {path}") for path, node in own.items()}, treedef


def _as_lora(node: Any, what: str) -> Any:
  """A variant's weight as the plain LoRA that it comes to; raises where it comes to none."""
  if not isinstance(node, LoraWeight) or (node.variant == "lora" and not node.extra):
    return node
  if node.kind.gain is not None:
    raise ValueError(
      f"{what}: the variant {node.variant!r} scales the outputs of base and update alike, which no pair of factors"
      " beside the base can do. Merge that adapter (jaxlora.merge), or train one of another variant."
    )
  a, b = node.factors()
  return _plain(a, b, node.roles, node.base)


def _check_nesting(found: Any, expected: Any, what: str, of: str) -> None:
  if found != expected:
    raise ValueError(
      f"{what}: the tree is nested otherwise than {of}: {found}, expected {expected}. Adapters of one bank are made for"
      " one base: adapt the same parameters."
    )


def _joint_base(known: Mapping[str, str], adapter: Any, what: str) -> dict[str, str]:
  """What is known of a bank's base with what an adapter brings; raises if that is another base."""
  if all(node.base is None for _, node in adapted_leaves(adapter)):
    return dict(known)  # a trainable half
  return {**known, **_digests(known, adapter, what)}


def _digests(known: Mapping[str, str], tree: Any, what: str) -> dict[str, str]:
  """The digests of a base; raises if they are others than those that are known, naming the leaves."""
  found = {path: str(leaf) for path, leaf in prints(tree).items() if leaf.digest}
  if others := [path for path in found if known.get(path, found[path]) != found[path]]:
    raise ValueError(f"{what}: the base is another one than the bank's, in {listed(others)}. {_OTHER}")
  return found


def _check_finite(node: Any, what: str) -> None:
  """Raises if an adapter has diverged: products that run over several adapters would spread it."""
  broken = [name for name, part in parts(node).items() if name != "base" and not np.isfinite(np.asarray(part)).all()]
  if broken:
    raise ValueError(
      f"{what}: found NaN or infinite values in {listed(broken)}, expected finite ones. Training has diverged: go back"
      " to an earlier checkpoint."
    )


def _check_fits(node: Any, slots: Slots, what: str, of: str = "the bank's") -> None:
  """Raises unless an adapter's leaf is of the form, and at most of the rank, that a bank has for it."""
  kinds = {LoraWeight: "low-rank", FullWeight: "trained whole"}
  whole = isinstance(slots, WholeSlots)
  if isinstance(node, FullWeight) != whole:
    raise ValueError(
      f"{what} is {kinds[type(node)]}, expected a leaf {kinds[FullWeight] if whole else 'with low-rank factors'} as"
      f" {of}. Adapters of one bank treat a leaf alike, or leave it alone."
    )
  if isinstance(slots, WholeSlots):
    if tuple(node.value.shape) != tuple(slots.value.shape[1:]):
      raise ValueError(
        f"{what}: value has shape {tuple(node.value.shape)}, expected {tuple(slots.value.shape[1:])} as {of}. {_OTHER}"
      )
    return
  if node.roles != slots.roles:
    raise ValueError(f"{what}: roles {node.roles!r}, expected {slots.roles!r} as {of}. {_OTHER}")
  if node.rank > slots.rank:
    raise ValueError(
      f"{what}: rank {node.rank} is above the bank's, {slots.rank}. Stack a bank with a higher one"
      f" (jaxlora.stack(..., rank={node.rank}))."
    )
  for name in ("a", "b"):
    found = tuple(getattr(node, name).shape)
    expected = _with_rank(getattr(slots, name).shape[1:], slots.roles.count("s"), node.rank)
    if found != expected:
      raise ValueError(f"{what}: factor {name} has shape {found}, expected {expected} as {of}. {_OTHER}")


_OTHER = "It belongs to another base; adapters of one bank are made for one."


def _with_rank(shape: Sequence[int], place: int, rank: int) -> tuple[int, ...]:
  return (*shape[:place], rank, *shape[place + 1 :])


# ----------------------------------------------------------------------------------------------------------------------
# One adapter in a bank's form.


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


def _plain(a: Any, b: Any, roles: str, base: Any) -> LoraWeight:
  """A weight of scale 1: its structure says nothing of the adapter but its rank."""
  rank = a.shape[roles.count("s")]
  return LoraWeight(base=base, a=a, b=b, roles=roles, rank=rank, alpha=float(rank))


def pad(tree: Any, rank: int | None = None) -> Any:
  """The same adapter at another, higher rank and at scale 1: adapters of one shape then have one structure.

      A -> [A; 0],   B -> [scale * B; 0],   alpha -> rank

  A weight's rank and alpha are static, so that a compiled function takes no other ones. Padded to one rank, adapters of
  any alpha and any lower rank are served by the same compiled function: `jaxlora.join(frozen, jaxlora.pad(half, 16))`.

  Args:
    tree: a combined tree, or the trainable half that `split` gives.
    rank: of every adapted weight afterwards; `None` keeps each one's, and folds the scales alone.

  Returns:
    The tree, without dropout, which is for training.

  Raises:
    ValueError: if a weight's rank is higher already, naming the leaf, or if nothing is adapted.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, alpha=8), jax.random.key(0))
    >>> jaxlora.pad(tree, 3)["kernel"].b.shape, jaxlora.pad(tree, 3)["kernel"].scale
    ((3, 3), 1.0)
  """
  if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or rank < 1):
    raise ValueError(f"pad: rank is {rank!r}, expected a whole number above 0, or None.")
  own, treedef = _adapter_nodes(tree, "pad: the tree")
  for path, node in own.items():
    if rank is not None and isinstance(node, LoraWeight) and node.rank > rank:
      raise ValueError(f"pad: {path}: rank {node.rank} is above {rank}. Pad to at least the highest rank of the tree.")

  def one(path: str, node: Any) -> Any:
    if not isinstance(own.get(path), LoraWeight):
      return node
    weight = own[path]
    return _plain(*padded(weight, weight.rank if rank is None else rank), weight.roles, weight.base)

  nodes, _ = _paths.flatten(tree, is_leaf=_is_half_leaf)
  return jax.tree.unflatten(treedef, [one(path, node) for path, node in nodes])


# ----------------------------------------------------------------------------------------------------------------------
# A batch of rows.


def route(
  fn: Callable[..., Any],
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  via: str = "auto",
  on_materialize: str = "warn",
  recompute: bool = True,
) -> Callable[..., Any]:
  """Makes a function of a batch run every row with an adapter of its own.

      route(fn)(frozen, bank, ids, x)[i] = wrap(fn)(join(frozen, adapter ids[i]), x[i : i + 1])[0]

  All rows share the base's products, each one flat product as for a plain batch. `ids` are data: another mix of
  adapters, or another bank of the same form, compiles nothing. It composes with `jit`, `grad`, `vmap`, `checkpoint`,
  `scan`; an adapter has gradients from its own rows alone, so that many can be trained in one batch. Dropout does not
  act.

  `fn` is the function of a batch that it always was; it sees batches of one row. What it does over the whole batch,
  such as a batch norm's statistics, it does over that row.

  Args:
    fn: a pure function `fn(params, *args, **kwargs)`.
    in_axes: which axis of the positional arguments after the parameters runs over rows: a number for all, or a tuple
      with one entry per argument, a number or a tree of them as for `jax.vmap`. `None`: all rows share it. Numbers
      without axes, and whatever is no array, are shared in any case; so are keyword arguments.
    out_axes: the same for the results. There `fn` gives each row an axis of size 1. A result without axes becomes one
      per row, unless it is the same for all.
    via: how the low-rank part of a mixed batch is computed; `"auto"` chooses by the sizes of each product.
      `"gathered"`: the rows' factors are laid side by side for one batched product. `"row by row"`: a loop over rows,
      each with its factors where they lie. `"wide"`: all adapters' factors in one product, of which each row keeps its
      own ranks. Values are the same to rounding; `jaxlora.explain(routed, ...)` says what is chosen.
    on_materialize, recompute: as in `jaxlora.wrap`.

  Returns:
    `routed(frozen, bank, ids, *args, **kwargs)`. `frozen` is the base: plain parameters, or the frozen half of any of
    the adapters' trees. `ids` is an array of integers, one per row (`bank.ids(names)`); -1 is the base alone. An id
    that no adapter has raises where its value is known; inside `jit`, where it is not, it is the base alone, too.

  Raises:
    ValueError: on options that it does not know; when called, naming the leaf, if the bank is not of this base (by
      shapes; outside of `jit` by values, too, where an adapter was put in with its base), or if there is not one id for
      each row.
    TypeError: on a bank that is none, or ids that are no integers.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((4, 3))}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> bank = jaxlora.stack({"translate": tree}, capacity=8)
    >>> routed = jax.jit(jaxlora.route(lambda p, x: x @ p["kernel"]))
    >>> routed(params, bank, bank.ids(["translate", None]), jnp.ones((2, 5, 4))).shape
    (2, 5, 3)

  Source: Chen et al., "Punica: Multi-Tenant LoRA Serving", arXiv:2310.18547, section 4.
  """
  if on_materialize not in ON_MATERIALIZE:
    raise ValueError(
      f"route: on_materialize is {on_materialize!r}, expected one of {', '.join(map(repr, ON_MATERIALIZE))}."
    )
  if via not in _banked.WAYS:
    raise ValueError(f"route: via is {via!r}, expected one of {', '.join(map(repr, _banked.WAYS))}.")
  options = _Options(in_axes, out_axes, via)
  seen: set[tuple[str, str, str]] = set()

  def routed(frozen: Any, bank: Bank, ids: Any, *args: Any, **kwargs: Any) -> Any:
    record = Record(on_materialize, seen, recompute, of_rows=True)
    return call_rows(fn, options, record, (frozen, bank, ids, *args), kwargs)

  for name in functools.WRAPPER_ASSIGNMENTS:  # but not `__wrapped__`: the signature is another one
    if name != "__annotations__" and hasattr(fn, name):
      setattr(routed, name, getattr(fn, name))
  _ROUTED[routed] = fn, options
  return routed


class _Options(NamedTuple):
  """What `route` was told."""

  in_axes: Any
  out_axes: Any
  via: str


# What `route` returned, for `explain`.
_ROUTED: weakref.WeakKeyDictionary[Callable[..., Any], tuple[Callable[..., Any], _Options]] = (
  weakref.WeakKeyDictionary()
)


def recorded(fn: Callable[..., Any], record: Record) -> Callable[..., Any] | None:
  """What `route` returned, as a function that `record` watches; `None` for other functions."""
  if not isinstance(fn, types.FunctionType) or fn not in _ROUTED:
    return None
  inner, options = _ROUTED[fn]
  return lambda *args, **kwargs: call_rows(inner, options, record, args, kwargs)


def call_rows(
  fn: Callable[..., Any], options: _Options, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
  """One call of a routed function."""
  frozen, bank, ids, *rest = args
  if not isinstance(bank, Bank):
    raise TypeError(f"route: found {type(bank).__name__} for the bank, expected what jaxlora.stack gives.")
  ids = _checked_ids(ids, bank)
  base = _checked_base(frozen, bank)
  rows = _Rows(tuple(rest), options.in_axes, ids.shape[0])
  results = _Results(options.out_axes)
  routing = Routing(ids.shape[0], options.via)

  def row(slot: jax.Array, *mapped: jax.Array) -> list[jax.Array]:
    params = _params_of_row(base, bank, slot, routing)
    out = _transform.call(fn, record, None, (params, *rows.of_one(mapped)), kwargs)
    return results.take(out)

  return results.of_all(jax.vmap(row, in_axes=(0, *rows.axes))(ids, *rows.mapped))


def _checked_ids(ids: Any, bank: Bank) -> jax.Array:
  """The ids as an array; raises on any that no adapter has, as far as values are known."""
  array = ids if hasattr(ids, "dtype") else np.asarray(ids)
  if not jnp.issubdtype(array.dtype, jnp.integer):
    raise TypeError(
      f"route: ids have dtype {array.dtype}, expected integers, one per row: bank.ids(names) makes them of names."
    )
  if array.ndim != 1:
    raise ValueError(
      f"route: ids have shape {tuple(array.shape)}, expected one axis, with one id per row of the batch."
    )
  if isinstance(array, jax.core.Tracer):
    return array
  values = np.asarray(array)
  slots = bank._names.slots
  for row, value in enumerate(values):
    if not NONE <= value < bank.capacity:
      raise ValueError(
        f"route: ids[{row}] is {value}, expected -1 (the base alone) or a slot of the bank, 0 to {bank.capacity - 1}."
        " bank.ids(names) makes ids of names."
      )
    if value != NONE and slots is not None and slots[value] is None:
      raise ValueError(
        f"route: ids[{row}] is {value}, a slot of the bank that no adapter is in. Its adapters: {listed(bank.names)}."
      )
  return jnp.asarray(values, jnp.int32)


class _Base(NamedTuple):
  """The base's leaves by path, and their nesting."""

  leaves: dict[str, Any]
  treedef: Any


def _checked_base(frozen: Any, bank: Bank) -> _Base:
  """The base of a frozen half, or plain parameters; raises unless the bank's adapters fit it."""
  nodes, treedef = _paths.flatten(frozen, is_leaf=_is_half_leaf)
  _check_nesting(treedef, bank._treedef, "route: frozen", "what the bank's adapters were made for")
  leaves = {}
  for path, node in nodes:
    if is_adapted(node):
      if node.base is None or any(part is not None for name, part in parts(node).items() if name != "base"):
        raise ValueError(
          f"route: {path}: expected the base alone: plain parameters, or the frozen half that jaxlora.split gives;"
          f" found {'a trainable half' if node.base is None else 'a whole tree, with an adapter of its own'}."
        )
      node = node.base
    leaves[path] = node
  for path, slots in bank.factors.items():
    _check_of_base(path, slots, leaves[path])
  known = all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in leaves.values())
  if bank._names.base and known:
    _digests(bank._names.base, frozen, "route: frozen")
  return _Base(leaves, treedef)


def _check_of_base(path: str, slots: Slots, base: Any) -> None:
  shape = tuple(jnp.shape(base))
  expected: dict[str, Any]
  found: dict[str, Any]
  if isinstance(slots, WholeSlots):
    expected, found = {"value": shape}, {"value": tuple(slots.value.shape[1:])}
  else:
    found = {"a": tuple(slots.a.shape[1:]), "b": tuple(slots.b.shape[1:])}
    fits = len(shape) == len(slots.roles)
    expected = {
      name: factor_shape(shape, slots.roles, own, slots.rank) if fits else None
      for name, own in (("a", "i"), ("b", "o"))
    }
  if found != expected:
    raise ValueError(
      f"route: {path}: the base has shape {shape}, the bank's adapters there have {found}, roles"
      f" {getattr(slots, 'roles', 'none')!r}: they were made for another base."
    )


def _params_of_row(base: _Base, bank: Bank, slot: jax.Array, routing: Routing) -> Any:
  """The parameters as one row has them."""
  leaves = dict(base.leaves)
  for path, slots in bank.factors.items():
    leaves[path] = _weight_of_row(path, slots, leaves[path], slot, routing)
  return jax.tree.unflatten(base.treedef, list(leaves.values()))


def _weight_of_row(path: str, slots: Slots, base: Any, slot: jax.Array, routing: Routing) -> Any:
  if isinstance(slots, LowRankSlots):
    return Factored(
      base=lax.stop_gradient(base),
      a=slots.a,
      b=slots.b,
      gain=None,
      key=None,
      roles=slots.roles,
      dropout=0.0,
      path=path,
      slot=slot,
      routing=routing,
    )
  value, present = (_lowrank.of_slot(array, slot) for array in (slots.value, slots.present))
  return jnp.where(present > 0, value.astype(jnp.asarray(base).dtype), base)


class _Rows:
  """The arguments of a batch, as what rows share and what each has of its own."""

  def __init__(self, args: tuple[Any, ...], axes: Any, count: int):
    nodes, self.treedef = jax.tree_util.tree_flatten_with_path(args)
    self.leaves = [leaf for _, leaf in nodes]
    self.place: dict[int, int] = {}  # leaf -> its axis of rows
    for k, ((path, leaf), axis) in enumerate(zip(nodes, _axis_of_each(axes, args, "in_axes"), strict=True)):
      if axis is None or not isinstance(leaf, (jax.Array, np.ndarray)) or leaf.ndim == 0:
        continue
      if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != count:
        raise ValueError(
          f"route: argument {_paths.path_string(path)} has shape {tuple(leaf.shape)}, expected {count} rows along axis"
          f" {axis}, one for each id. Say where its rows are, or that they share it: route(fn, in_axes=...)."
        )
      self.place[k] = axis % leaf.ndim
    self.axes = tuple(self.place.values())
    self.mapped = [self.leaves[k] for k in self.place]

  def of_one(self, mapped: Sequence[Any]) -> tuple[Any, ...]:
    """The arguments of one row, a batch of one."""
    leaves = list(self.leaves)
    for (k, axis), value in zip(self.place.items(), mapped, strict=True):
      leaves[k] = jnp.expand_dims(value, axis)
    return jax.tree.unflatten(self.treedef, leaves)


def _axis_of_each(axes: Any, tree: Any, what: str) -> list[int | None]:
  """For each leaf of a tree what a prefix of it says."""
  found: list[int | None] = []

  def note(axis: Any, part: Any) -> None:
    if axis is not None and (isinstance(axis, bool) or not isinstance(axis, int)):
      raise ValueError(f"route: {what} holds {axis!r}, expected numbers of axes, or None.")
    found.extend([axis] * len(jax.tree.leaves(part)))

  if isinstance(axes, list):
    axes = tuple(axes)
  try:
    jax.tree.map(note, axes, tree, is_leaf=lambda node: node is None)
  except (ValueError, TypeError) as error:
    if str(error).startswith("route:"):
      raise
    raise ValueError(f"route: {what}={axes!r} does not fit what it is for: {error}") from error
  return found


class _Results:
  """The results of one row, and of what they make up for all."""

  def __init__(self, axes: Any):
    self.axes = axes

  def take(self, out: Any) -> list[jax.Array]:
    """One row's arrays, without the axes of size 1 that rows go along."""
    nodes, self.treedef = jax.tree_util.tree_flatten_with_path(out)
    self.leaves = [leaf for _, leaf in nodes]
    self.place: dict[int, int | None] = {}  # array -> its axis of rows; none where rows may share it
    self.varies: dict[int, Callable[[], bool]] = {}
    arrays = []
    for k, ((path, leaf), axis) in enumerate(zip(nodes, _axis_of_each(self.axes, out, "out_axes"), strict=True)):
      if not isinstance(leaf, (jax.Array, np.ndarray)):
        continue
      name = _paths.path_string(path)
      if axis is None or leaf.ndim == 0:
        self.place[k], self.varies[k] = None, _differs_by_row(leaf)
        if axis is None and self.varies[k]():
          raise ValueError(
            f"route: out_axes says that rows share the result {name}, but it differs from row to row. Name its axis."
          )
        arrays.append(jnp.asarray(leaf))
        continue
      if not -leaf.ndim <= axis < leaf.ndim or leaf.shape[axis] != 1:
        raise ValueError(
          f"route: the result {name} of a batch of one row has shape {tuple(leaf.shape)}, expected size 1 along axis"
          f" {axis}. Say where its rows are, or that they share it: route(fn, out_axes=...)."
        )
      self.place[k] = axis % leaf.ndim
      arrays.append(jnp.squeeze(jnp.asarray(leaf), self.place[k]))
    return arrays

  def of_all(self, arrays: Sequence[jax.Array]) -> Any:
    """All rows' results, from arrays that lead with the rows."""
    leaves = list(self.leaves)
    for (k, axis), array in zip(self.place.items(), arrays, strict=True):
      if axis is not None:
        leaves[k] = jnp.moveaxis(array, 0, axis)
      else:
        leaves[k] = array if self.varies[k]() else array[0]
    return jax.tree.unflatten(self.treedef, leaves)


def _differs_by_row(value: Any) -> Callable[[], bool]:
  """Whether the `vmap` around this maps a value, or all of its rows share it."""
  seen = False

  def rule(batched: Sequence[bool], args: Sequence[jax.Array]) -> None:
    nonlocal seen
    del batched, args
    seen = True

  _compat.batched_call(lambda value: value, rule, lax.stop_gradient(value))
  return lambda: seen
