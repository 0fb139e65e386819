"""Traced weights: an adapted weight as the transform carries it through a program."""

from collections.abc import Callable
import dataclasses
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.dtypes import beside, inexact
from jaxlora._base.explicit import explicitly_sharded, type_of
from jaxlora._base.memory import moved, on_device, space_of
from jaxlora._base.reshape import reshape
from jaxlora._jax.control_flow import Scan, While
from jaxlora._jax.jaxpr import varying_axes
from jaxlora._platform.recipes import Recipe
from jaxlora._weight.roles import RANK, factor_axes, factor_shape, low_rank_delta, times_gain

ADAPTED = "base + A B was formed as one array"
QUANTISED = "the quantised weight was formed as one array of floats"


class Unfactorable(Exception):
  """Why an equation needs the weight as one array."""


class TracedWeight:
  """The kinds of weights that the transform knows. A kind is a dataclass and a pytree, so control flow carries it.

  Rules are registered by kind (`_transform/rule.py`). Where a kind has no rule for a primitive, `simpler` is tried.

  Attributes:
    base: the frozen array that it is made of, or a `Coded` one.
    roles: one letter for each axis of the array that it stands for.
    key: the random key of its dropout, or `None`.
    path: of its leaf.
  """

  base: Any
  roles: str
  key: Any
  path: str

  formed: ClassVar[str] = ADAPTED  # what a report says where it becomes one array

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  def replace(self, **changes: Any) -> Any:
    return dataclasses.replace(self, **changes)  # type: ignore[type-var]

  def array(self) -> jax.Array:
    """The weight as one array: right everywhere, and what the transform exists to avoid."""
    raise NotImplementedError

  def mapped(self, by: Callable[[jax.Array, str], Any], **changes: Any) -> Any:
    """The same with every factor, and a gain, by `by(factor, the role whose axes it holds)`."""
    raise NotImplementedError

  def reshaped(self, shape: tuple[int, ...], roles: str, base: Any) -> Any:
    """The weight reshaped where no group of axes mixes roles; axes of size 1 may change hands between the factors."""
    raise NotImplementedError

  def with_roles(self, roles: str) -> Any:
    """The weight with other roles for its axes of size 1, which lie in both factors as well as in either."""
    return self if roles == self.roles else self.reshaped(self.shape, roles, self.base)

  def flipped(self) -> Any:
    """The same weight with A and B trading places: contracted and free axes trade roles."""
    raise NotImplementedError

  def simpler(self) -> "TracedWeight | None":
    """The same weight as a kind that has more rules; `None` if there is none."""
    return None

  def together(self) -> Any:
    """The same with its factors in the memory of its base, which is where a product computes; codes are fetched."""
    if is_coded(self.base):
      return self
    space = space_of(jax.tree.leaves(self.base)[0])
    apart = [part for part in jax.tree.leaves(self.replace(key=None)) if space_of(part) != space]
    return self.mapped(lambda factor, own: moved(factor, space)) if apart else self

  def along_first(self) -> Any:
    """What a scan over the first axis takes slices of, and a function from the slices to the weight in one step."""
    raise NotImplementedError

  def into(self, structure: Any, operand: int) -> "TracedWeight":
    """The same weight as it enters control flow as the given operand."""
    del operand
    if isinstance(structure, (Scan, While)) and is_coded(self.base):
      return self.replace(base=self.base.replace(varies=False))
    return self


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factored(TracedWeight):
  """The weight `gain (base + sum_r a b)`.

  Invariants:
    1. `base`, `a`, `b` and `roles` obey `LoraWeight`'s invariants 1 and 2 for the array that this value stands for.
    2. The scale is already in `b`, and the factors have the base's dtype; under a base of 8 bits or less, their own.
    3. `key` is `None`, or the random key of this leaf's dropout.
    4. `gain` is `None`, for one, or laid out as a factor of rank 1 over the axes of role `gained`.
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

  @property
  def rank(self) -> int:
    return self.a.shape[self.roles.count("s")]

  def mapped(self, by: Callable[[jax.Array, str], Any], **changes: Any) -> "Factored":
    gain = None if self.gain is None else by(self.gain, self.gained)
    return self.replace(a=by(self.a, "i"), b=by(self.b, "o"), gain=gain, **changes)

  def flipped(self) -> "Factored":
    trade = str.maketrans("io", "oi")
    return self.replace(a=self.b, b=self.a, roles=self.roles.translate(trade), gained=self.gained.translate(trade))

  def reshaped(self, shape: tuple[int, ...], roles: str, base: Any) -> "Factored":
    def sized(factor: jax.Array, own: str) -> jax.Array:
      new = factor_shape(shape, roles, own, rank_of(self, factor))
      names = type_of(base).sharding.spec if explicitly_sharded(base) else None
      axes = factor_axes(roles, own)
      return reshape(
        factor, new, names and jax.sharding.PartitionSpec(*(None if d == RANK else names[d] for d in axes))
      )

    return self.mapped(sized, base=base, roles=roles)

  def along_first(self) -> tuple[dict[str, Any], Callable[[dict[str, Any]], "Factored"]]:
    """What a loop over the first axis takes slices of, and the weight in one step, of the slices.

    A factor that lacks the axis is the same in every step: so is A where a head is cut into chunks of its outputs.
    """
    held = {"base": self.base.along_first() if is_coded(self.base) else self.base}
    for name, own in (("a", "i"), ("b", "o"), ("gain", self.gained)):
      axes, part = factor_axes(self.roles, own), getattr(self, name)
      if part is not None and 0 in axes:
        held[name] = jnp.moveaxis(part, axes.index(0), 0)

    def whole(here: dict[str, Any]) -> "Factored":
      base = here["base"].in_one_step() if is_coded(here["base"]) else here["base"]
      return self.replace(**here | {"base": base}, roles=self.roles[1:])

    return held, whole

  def array(self) -> jax.Array:
    a, b, gain = (on_device(part) for part in (self.a, self.b, self.gain))
    base = decoded(on_device(self.base))
    delta = low_rank_delta(a, b, self.roles)
    whole = times_gain(base.astype(delta.dtype) + delta, gain, self.roles, self.gained)
    whole = whole.astype(self.base.dtype)
    return whole if is_coded(self.base) else moved(whole, space_of(self.base))


def rank_of(w: Factored, factor: jax.Array) -> int:
  """The size of the rank axis of one of its factors, behind the stacked ones; a gain has 1."""
  return factor.shape[w.roles.count("s")]


def factored(weight: Any, path: str, key: jax.Array | None) -> Factored:
  """The traced weight of a `LoraWeight`: base frozen, scale folded into the smaller work."""
  dtype = weight.base.dtype
  parts = {name: part if name == "base" else on_device(part) for name, part in weight.parts().items()}
  weight = weight.with_parts({**parts, "base": lax.stop_gradient(weight.base)})
  a, b = weight.factors()
  on = lambda: dataclasses.replace(weight, base=decoded(on_device(weight.base)))
  gain = None if weight.kind.gain is None else on().gain(a, b)
  return Factored(
    base=weight.base,
    a=beside(a, dtype),
    b=beside(b, dtype),
    gain=None if gain is None else beside(gain, dtype),
    key=key if weight.dropout else None,
    roles=weight.roles,
    dropout=weight.dropout,
    path=path,
  )


def dropped(x: jax.Array, w: Factored, use: int, recipe: Recipe | None) -> tuple[jax.Array, Recipe | None]:
  """The adapter's input with dropout, and how to rematerialise it.

  `use` counts the leaf's uses, so that each has a mask of its own; so has every shard that holds data of its own.
  """
  if w.key is None:
    return x, recipe
  key = jax.random.fold_in(w.key, use)
  for axis in varying_axes(x):
    key = jax.random.fold_in(key, lax.axis_index(axis))
  keep = jax.random.bernoulli(key, 1 - w.dropout, x.shape)

  def drop(x: jax.Array, keep: jax.Array) -> jax.Array:
    return jnp.where(keep, x / jnp.asarray(1 - w.dropout, x.dtype), jnp.zeros((), x.dtype))

  return drop(inexact(x, w.a.dtype), keep), recipe and recipe.then(drop, keep)


def weights_in(values: Any) -> list[TracedWeight]:
  """The traced weights among some values."""
  return [value for value in values if isinstance(value, TracedWeight)]
