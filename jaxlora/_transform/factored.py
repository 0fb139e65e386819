"""A weight as the transform carries it through a program."""

from collections.abc import Callable
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import beside, inexact
from jaxlora._jax.jaxpr import varying_axes
from jaxlora._platform.recipes import Recipe
from jaxlora._weight.roles import low_rank_delta, times_gain
from jaxlora._weight.weight import LoraWeight


class Routing(NamedTuple):
  """A mixed batch, as one row of it knows it.

  Attributes:
    rows: how many there are.
    via: how their low-rank products are to be computed; `"auto"` leaves it to `_banked.way`.
  """

  rows: int
  via: str


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored:
  """A weight on its way through a program, standing for `gain (base + sum_r a b)`.

  Invariants:
    1. `base`, `a`, `b` and `roles` obey `LoraWeight`'s invariants 1 and 2 for the array that this value stands for.
    2. The scale is already in `b`, and the factors have the base's dtype; under a base of 8 bits or less, their own.
    3. `key` is `None`, or the random key of this leaf's dropout.
    4. `gain` is `None`, for one, or laid out as a factor of rank 1 over the axes of role `gained`.
    5. `slot` is `None`; or `a` and `b` hold the factors of many adapters, on an axis that leads all others and in a
       dtype of their own, and the value stands for `base` with those of the adapter numbered `slot`; with none, where
       there is no such adapter. `routing` then says how many rows do this together. Only `picked` and `_banked.py`
       look into such factors. There is no gain then.
  """

  base: Any
  a: Any
  b: Any
  gain: Any
  key: Any
  roles: str = dataclasses.field(metadata={"static": True})
  dropout: float = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(metadata={"static": True})
  gained: str = dataclasses.field(default="o", metadata={"static": True})
  slot: Any = None
  routing: "Routing | None" = dataclasses.field(default=None, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  def mapped(self, by: Callable[[jax.Array, str], jax.Array], **changes: Any) -> "Factored":
    """The same with every factor, and the gain, by `by(factor, the role whose axes it holds)`."""
    gain = None if self.gain is None else by(self.gain, self.gained)
    return self.replace(a=by(self.a, "i"), b=by(self.b, "o"), gain=gain, **changes)

  def replace(self, **changes: Any) -> "Factored":
    return dataclasses.replace(self, **changes)

  def flipped(self) -> "Factored":
    """The same weight with A and B trading places: contracted and free axes trade roles."""
    trade = str.maketrans("io", "oi")
    return self.replace(a=self.b, b=self.a, roles=self.roles.translate(trade), gained=self.gained.translate(trade))


def enter(weight: LoraWeight, path: str, key: jax.Array | None) -> Factored:
  """The value that stands for `weight` inside the function: base frozen, scale folded into the smaller work."""
  dtype = weight.base.dtype
  base = lax.stop_gradient(weight.base)
  weight = dataclasses.replace(weight, base=base)
  a, b = weight.factors()
  gain = weight.gain(a, b)
  return Factored(
    base=base,
    a=beside(a, dtype),
    b=beside(b, dtype),
    gain=None if gain is None else beside(gain, dtype),
    key=key if weight.dropout else None,
    roles=weight.roles,
    dropout=weight.dropout,
    path=path,
  )


def picked(w: Factored) -> Factored:
  """The weight with the factors of its one adapter; of zero, where there is none of that number."""
  if w.slot is None:
    return w
  a, b = (beside(of_slot(bank, w.slot), w.base.dtype) for bank in (w.a, w.b))
  return w.replace(a=a, b=b, slot=None, routing=None)


def of_slot(bank: jax.Array, slot: jax.Array) -> jax.Array:
  """What a bank has in one slot; zeros where the number is none of a slot."""
  return bank.at[slot].get(mode="fill", fill_value=0, wrap_negative_indices=False)


def materialize(w: Factored) -> jax.Array:
  """`gain (base + a b)` as one array: right everywhere, and what the transform exists to avoid."""
  w = picked(w)
  delta = low_rank_delta(w.a, w.b, w.roles)
  return times_gain(w.base.astype(delta.dtype) + delta, w.gain, w.roles, w.gained).astype(w.base.dtype)


def gained(x: jax.Array, gain: jax.Array) -> jax.Array:
  """`x` times a gain that lies along some of its axes."""
  return x * gain.astype(x.dtype)


def dropped(x: jax.Array, w: Factored, use: int, recipe: Recipe | None) -> tuple[jax.Array, Recipe | None]:
  """The adapter's input with dropout, and how to make it again.

  `use` counts the leaf's uses, so that each has a mask of its own; so has every shard that holds data of its own.
  """
  if w.key is None:
    return x, recipe
  key = jax.random.fold_in(w.key, use)
  for axis in varying_axes(x):
    key = jax.random.fold_in(key, lax.axis_index(axis))
  keep = jax.random.bernoulli(key, 1 - w.dropout, x.shape)

  def drop(x, keep):
    return jnp.where(keep, x / jnp.asarray(1 - w.dropout, x.dtype), jnp.zeros((), x.dtype))

  return drop(inexact(x, w.a.dtype), keep), recipe and recipe.then(drop, keep)
