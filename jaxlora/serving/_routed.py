"""A weight with the factors of many adapters, and its rules: what the transform knows of mixed batches."""

from collections.abc import Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import beside
from jaxlora._base.explicit import explicitly_sharded
from jaxlora._base.memory import moved, space_of
from jaxlora._jax.control_flow import Branches, Call, Jit, Remat, Scan, While
from jaxlora._platform.policy import Forms
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable
from jaxlora._transform.product import product_of
from jaxlora._transform.rule import AHEAD, Ahead, Op, only_weight, rule
from jaxlora._transform.rules import dot, layout
from jaxlora._weight.roles import factor_shape
from jaxlora.serving._ways import GATHERED, Routing, Row, choose_way, enters_loops, low_rank_part, pick


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoutedWeight(TracedWeight):
  """The weight `base + sum_r a[slot] b[slot]` of one row of a mixed batch.

  Invariants:
    1. `a` and `b` have an axis over the bank's adapters that leads all others, and a dtype of their own; behind it they
       obey `LoraWeight`'s invariant 2 for the array that this value stands for. Scales are in `b`.
    2. Where no adapter has the number `slot`, the value stands for `base`.
    3. Dropout does not act: `key` is `None`.
  """

  base: Any
  a: Any
  b: Any
  slot: Any
  roles: str = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(metadata={"static": True})
  routing: Routing = dataclasses.field(metadata={"static": True})
  key: Any = None

  @property
  def adapters(self) -> int:
    return self.a.shape[0]

  def reshaped(self, shape: tuple[int, ...], roles: str, base: Any) -> "RoutedWeight":
    rank = self.a.shape[1 + self.roles.count("s")]

    def sized(factors: jax.Array, own: str) -> jax.Array:
      return lax.reshape(factors, (self.adapters, *factor_shape(shape, roles, own, rank)))

    return self.replace(a=sized(self.a, "i"), b=sized(self.b, "o"), base=base, roles=roles)

  def together(self) -> "RoutedWeight":
    a, b = (moved(factors, space_of(self.base)) for factors in (self.a, self.b))
    return self.replace(a=a, b=b)

  def flipped(self) -> "RoutedWeight":
    return self.replace(a=self.b, b=self.a, roles=self.roles.translate(str.maketrans("io", "oi")))

  def simpler(self) -> Factored:
    """The weight with the factors of its one adapter, picked from the bank."""
    a, b = (beside(pick(factors, self.slot), self.base.dtype) for factors in (self.a, self.b))
    return Factored(self.base, a, b, gain=None, key=None, roles=self.roles, dropout=0.0, path=self.path)

  def array(self) -> jax.Array:
    return self.simpler().array()

  def into(self, structure: Any, operand: int) -> TracedWeight:
    """Calls and branches are entered whole, loops where that is cheaper than picking the factors ahead of them.

    What a scan runs over it slices along the first axis, which a bank has for itself.
    """
    sliced = isinstance(structure, Scan) and operand >= structure.constants + structure.carries
    if isinstance(structure, (Scan, While)):
      whole = not sliced and enters_loops(self.adapters, self.routing)
    else:
      whole = isinstance(structure, (Jit, Call, Remat, Branches))
    return self if whole else self.simpler()


@rule("dot_general", kind=RoutedWeight)
def _dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  w, x, weight_first = dot.operands(args)
  w, pairing = dot.met(op.params, w, weight_first)
  sharded = explicitly_sharded(x) or explicitly_sharded(jax.tree.leaves(w.base)[0])
  way = GATHERED if sharded else choose_way(jnp.shape(x), w.adapters, pairing, w.routing)
  op.note(way)
  if way == GATHERED:
    return dot.dot_general(op, [arg.simpler() if isinstance(arg, RoutedWeight) else arg for arg in args])
  base = product_of(op.primitive, op.params, x, w, pairing, op.result, op.policy, op.looping).base(x, w.base)
  row = Row(w.a, w.b, w.roles, pairing, base.dtype, w.base.dtype, op.policy, op.looping)
  part = lambda way, x, a, b, slot: low_rank_part(x, row._replace(a=a, b=b), slot, way)
  ways = way, choose_way(jnp.shape(x), w.adapters, pairing, w.routing.in_tiles())
  if ways[0] == ways[1]:
    return [op.policy.sum(base, part(way, x, w.a, w.b, w.slot), op.looping)]
  default, in_tiles = (functools.partial(part, way) for way in ways)
  forms = Forms(default, in_tiles=in_tiles)
  return [op.policy.sum(base, op.policy.lowered(forms, x, w.a, w.b, w.slot), op.looping)]


@rule("convert_element_type", kind=RoutedWeight)
def _cast(op: Op, args: Sequence[Any]) -> list[Any]:
  """Of a bank only what is picked is cast."""
  w = only_weight(args)
  if not jnp.issubdtype(op.params["new_dtype"], jnp.inexact):
    raise Unfactorable(f"a cast to {jnp.dtype(op.params['new_dtype']).name}")
  return [w.replace(base=op.bind(w.base)[0])]


@rule("reshape", kind=RoutedWeight)
def _reshape(op: Op, args: Sequence[Any]) -> list[Any]:
  w = only_weight(args)
  if op.params.get("dimensions") is not None:  # a transposition first
    return layout.reshape(op, [w.simpler()])
  return layout.reshape(op, args)


@rule("squeeze", kind=RoutedWeight)
def _squeeze(op: Op, args: Sequence[Any]) -> list[Any]:
  return layout.squeeze(op, args)


@rule("ragged_dot_general", kind=RoutedWeight)
def _ragged_dot_general(op: Op, args: Sequence[Any]) -> list[Any]:
  """Rows of a mixed batch share the experts of the base; JAX batches a `ragged_dot` where none of it is shared."""
  (path, *_) = (arg.path for arg in args if isinstance(arg, RoutedWeight))
  raise NotImplementedError(
    f"route: {path} meets the rows of a mixed batch in a grouped product (`{op.primitive.name}`), which JAX does not"
    " batch over rows that share their experts. Serve one adapter at a time: jaxlora.wrap on jaxlora.join(frozen,"
    " bank.take(name))."
  )


def _ahead(given: Ahead) -> Any:
  """Only products with gathered factors are computed ahead of the rest."""
  if "s" in given.w.roles:
    return None
  try:
    w, pairing = dot.met(given.params, given.w, given.weight_first)
  except Unfactorable:
    return None
  if choose_way(given.x.shape, w.adapters, pairing, w.routing) != GATHERED:
    return None
  return dot.ahead(given._replace(w=given.w.simpler()))


AHEAD[RoutedWeight] = _ahead
