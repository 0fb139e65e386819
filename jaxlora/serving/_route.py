"""`route`: a batch whose rows use different adapters."""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
import numpy as np

from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._platform.policy import check_tuning, choose_policy
from jaxlora._transform.coded import Coded
from jaxlora._transform.explain import Observed, observable
from jaxlora._transform.meetings import Unsure, check_roles
from jaxlora._transform.record import ON_MATERIALIZE, Record
from jaxlora._transform.wrap import call
from jaxlora._weight.roles import factor_shape
from jaxlora._weight.tree import is_half_leaf
from jaxlora._weight.weight import is_adapted, parts
from jaxlora.serving._adapters import check_nesting, digests
from jaxlora.serving._bank import NONE, Bank
from jaxlora.serving._caches import update_slice
from jaxlora.serving._routed import RoutedWeight
from jaxlora.serving._rows import Results, Rows
from jaxlora.serving._slots import LowRankSlots, Slots, WholeSlots
from jaxlora.serving._ways import WAYS, Routing, pick, spec_of_type


def route(
  fn: Callable[..., Any],
  *,
  in_axes: Any = 0,
  out_axes: Any = 0,
  via: str = "auto",
  on_materialize: str = "warn",
  recompute: bool = True,
  tuning: str = "auto",
  platform: str | None = None,
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
    on_materialize, recompute, tuning, platform: as in `jaxlora.wrap`.

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
  if via not in WAYS:
    raise ValueError(f"route: via is {via!r}, expected one of {', '.join(map(repr, WAYS))}.")
  check_tuning(tuning, platform, "route")
  options = _Options(in_axes, out_axes, via)
  seen: set[tuple[str, str, str]] = set()

  def routed(frozen: Any, bank: Bank, ids: Any, *args: Any, **kwargs: Any) -> Any:
    policy = choose_policy(tuning, platform, recompute, jax.tree.leaves((frozen, args, kwargs)))
    record = Record(on_materialize, seen, policy, _REWRITES)
    return call_rows(fn, options, record, (frozen, bank, ids, *args), kwargs)

  for name in functools.WRAPPER_ASSIGNMENTS:  # but not `__wrapped__`: the signature is another one
    if name != "__annotations__" and hasattr(fn, name):
      setattr(routed, name, getattr(fn, name))

  def observed_record(values: Sequence[Any]) -> Record:
    return Record("ignore", set(), choose_policy(tuning, platform, recompute, values), _REWRITES)

  observable(routed, Observed(_low_rank_paths, observed_record, functools.partial(call_rows, fn, options)))
  return routed


_REWRITES = {"dynamic_update_slice": update_slice}


class _Options(NamedTuple):
  """What `route` was told."""

  in_axes: Any
  out_axes: Any
  via: str


def _low_rank_paths(*args: Any) -> list[str]:
  """The paths that the banks among some arguments have factors for."""
  return [path for bank in args if isinstance(bank, Bank) for path in bank.low_rank]


def call_rows(
  fn: Callable[..., Any], options: _Options, record: Record, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
  """One call of a routed function."""
  frozen, bank, ids, *rest = args
  if not isinstance(bank, Bank):
    raise TypeError(f"route: found {type(bank).__name__} for the bank, expected what jaxlora.stack gives.")
  ids = _checked_ids(ids, bank)
  base = _checked_base(frozen, bank)
  rows = Rows(tuple(rest), options.in_axes, ids.shape[0])
  results = Results(options.out_axes)
  routing = Routing(ids.shape[0], options.via, record.policy.banks, record.policy.banks_in_tiles)

  def row(slot: jax.Array, *mapped: jax.Array) -> list[jax.Array]:
    params = _params_of_row(base, bank, slot, routing)
    out = call(fn, record, None, (params, *rows.of_one(mapped)), kwargs)
    return results.take(out)

  out = results.of_all(jax.vmap(row, in_axes=(0, *rows.axes))(_as_rows_lie(ids, rows), *rows.mapped))
  check_roles(_unsure(bank, base), record.uses)
  return out


def _as_rows_lie(ids: jax.Array, rows: Rows) -> jax.Array:
  """The ids in the shards of the rows, as `jax.vmap` asks where types say how arrays lie."""
  specs = [(spec_of_type(x), axis) for x, axis in zip(rows.mapped, rows.axes, strict=True)]
  told = [spec[axis] for spec, axis in specs if spec is not None]
  return jax.sharding.reshard(ids, PartitionSpec(told[0])) if told else ids


def _unsure(bank: Bank, base: "_Base") -> dict[str, Unsure]:
  """The weights of a bank whose roles are not certain, by path."""
  return {
    path: Unsure(slots.roles, tuple(jnp.shape(base.leaves[path])))
    for path, slots in bank.factors.items()
    if isinstance(slots, LowRankSlots) and not slots.sure
  }


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
  nodes, treedef = flatten(frozen, is_leaf=is_half_leaf)
  check_nesting(treedef, bank._treedef, "route: frozen", "what the bank's adapters were made for")
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
  known = all(isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(leaves))
  if bank._names.base and known:
    digests(bank._names.base, frozen, "route: frozen")
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
    base = lax.stop_gradient(base)
    base = Coded(base) if is_coded(base) else base
    return RoutedWeight(base, slots.a, slots.b, slot, slots.roles, path, routing)
  value, present = (pick(array, slot) for array in (slots.value, slots.present))
  base = decoded(base)
  return jnp.where(present > 0, value.astype(jnp.asarray(base).dtype), base)
