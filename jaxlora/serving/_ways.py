"""Ways to compute the low-rank part of a mixed batch: every row with the factors of its own adapter, one of a bank.

The transform sees one row, whose weights hold the factors of all adapters and the number of its own; `jax.vmap` makes
rows of it. The base's product has no row of its own and stays the one flat product that it is for a plain batch. Each
way is right for any row and any bank, and differentiable.

Reading order: the ways -> which is cheapest -> the low-rank part in each.
"""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp
from jax.sharding import AxisType, PartitionSpec

from jaxlora._base.dtypes import beside, inexact
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._jax.batched_call import batched_call
from jaxlora._jax.sizes import elements
from jaxlora._platform.policy import Banks, Policy
from jaxlora._transform.pairing import Pairing
from jaxlora._transform.product import shrink_of
from jaxlora._weight.roles import RANK, factor_axes

GATHERED = "gathered"  # the rows' factors laid side by side, then one batched product: at any size
ROWS = "row by row"  # one row after the other, each factor read where it lies: few tokens a row, on CPUs
WIDE = "wide"  # one product with all adapters' factors, of which each row keeps its own ranks: few adapters
WAYS = ("auto", GATHERED, ROWS, WIDE)

# Up to this many tokens in a row, laying out a copy of the row's factors costs more than its products do.
_FEW_TOKENS = 16


class Routing(NamedTuple):
  """A mixed batch, as one row of it knows it.

  Attributes:
    rows: how many there are.
    via: how their low-rank products are to be computed; `"auto"` leaves it to `choose_way`.
    banks: what the compiler likes.
    banks_in_tiles: what one likes that lays arrays out in tiles, where the program is lowered for such a platform.
  """

  rows: int
  via: str
  banks: Banks
  banks_in_tiles: Banks

  def in_tiles(self) -> "Routing":
    """The same in programs for platforms that lay arrays out in tiles."""
    return self._replace(banks=self.banks_in_tiles)


def choose_way(shape: Sequence[int], adapters: int, pairing: Pairing, routing: Routing) -> str:
  """How to compute one row's low-rank part, by what is cheapest.

  Args:
    shape: of the row's input.
    adapters: how many the bank holds.
    pairing: how the input meets the weight.
    routing: the batch that the row is of.
  """
  if routing.via != "auto":
    return routing.via
  met = {*pairing.contracted.values(), *pairing.batched.values()}
  tokens = elements([size for k, size in enumerate(shape) if k not in met])
  if tokens * (adapters - 1) < routing.banks.spare_terms:
    return WIDE
  few = tokens <= _FEW_TOKENS and isinstance(routing.rows, int) and routing.rows > 1  # no loop is of symbolic length
  return ROWS if few and routing.banks.loops else GATHERED


def enters_loops(adapters: int, routing: Routing) -> bool:
  """Whether a weight enters a loop with all its factors: where a single token a row would be computed so.

  Elsewhere the rows' factors are picked once, ahead of the loop, for all of its steps.
  """
  if routing.via != "auto":
    return routing.via != GATHERED
  return routing.banks.loops or adapters - 1 < routing.banks.spare_terms


# ----------------------------------------------------------------------------------------------------------------------
# The low-rank part in each way.


class Row(NamedTuple):
  """The product of one row with one weight of a bank.

  Attributes:
    a, b: the factors of all adapters, on a leading axis.
    roles: of the weight.
    pairing: how the input meets it.
    dtype: of the result.
    base_dtype: of the weight's base, which says the dtype of picked factors.
    policy, looping: how thin products are written.
  """

  a: jax.Array
  b: jax.Array
  roles: str
  pairing: Pairing
  dtype: Any
  base_dtype: Any
  policy: Policy
  looping: bool


def low_rank_part(x: Any, row: Row, slot: jax.Array, way: str) -> jax.Array:
  """The low-rank part of one row's product, laid out as the base's.

  y_t = (x_t A_i^T) B_i,    i the row's adapter
  """
  x = inexact(x, row.a.dtype)
  if way == WIDE:
    return _thin(x, row._replace(a=beside(row.a, row.base_dtype), b=beside(row.b, row.base_dtype)), slot)

  def of_row(x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    a, b = (beside(pick(factor, slot), row.base_dtype) for factor in (a, b))
    return _thin(x, row._replace(a=a, b=b), None)

  if way == GATHERED:
    return of_row(x, row.a, row.b, slot)
  return _row_by_row(of_row, x, row.a, row.b, slot)


def pick(factors: jax.Array, slot: jax.Array) -> jax.Array:
  """What a bank has in one slot; zeros where there is no slot of that number."""
  spec = spec_of_type(factors)
  lies = None if spec is None else PartitionSpec(*spec[1:])  # the type of a gather on an explicit mesh has to be said
  return factors.at[slot].get(mode="fill", fill_value=0, wrap_negative_indices=False, out_sharding=lies)


def spec_of_type(x: Any) -> tuple[Any, ...] | None:
  """The spec that the type of an array carries, with an entry for each axis; `None` where no axis is explicit."""
  sharding = getattr(jax.typeof(x), "sharding", None)
  if sharding is None or AxisType.Explicit not in sharding.mesh.axis_types:
    return None
  return (*sharding.spec, *[None] * (jnp.ndim(x) - len(sharding.spec)))


def _thin(x: jax.Array, row: Row, slot: jax.Array | None) -> jax.Array:
  """Both thin products; with the factors of a whole bank each row keeps, in between, the ranks of its own adapter."""
  pairing, roles = row.pairing, row.roles
  bank = () if slot is None else (_BANK,)
  stack = [d for d in pairing.contracted if roles[d] == "s"]
  shrink = shrink_of(x, roles, pairing, row.dtype, row.looping)
  h = dataclasses.replace(shrink, factor=(*bank, *shrink.factor))(x, row.a)
  if slot is not None:
    h = _own_ranks(h, slot)
  second = Labelled(row.b, (*bank, *factor_axes(roles, "o")))
  if row.policy.flattens:
    second = second.flattened([d for d in pairing.free(len(roles)) if roles[d] == "o"])
  y = pairing.product(h, second, contract, (*bank, RANK, *stack), Result(row.dtype, pairing.precision))
  return y.expanded().ordered(pairing.result_labels(x.ndim, len(roles)))


_BANK = "bank"  # label of the axis over adapters


def _own_ranks(h: Labelled, slot: jax.Array) -> Labelled:
  axis = h.labels.index(_BANK)
  own = lax.broadcasted_iota(slot.dtype, h.array.shape, axis) == slot
  return Labelled(jnp.where(own, h.array, jnp.zeros((), h.array.dtype)), h.labels)


def _row_by_row(of_row: Callable[..., jax.Array], *args: Any) -> jax.Array:
  """`of_row(x, a, b, slot)`, of which `jax.vmap` over rows makes a loop; derivatives are those of all rows at once.

  A loop's own transpose would add up one gradient of the size of the bank per row.
  """

  @jax.custom_jvp
  def one_by_one(x, a, b, slots):
    shape = x.shape[1:]
    like = jax.eval_shape(of_row, x[0], a, b, slots[0])
    # One axis for all of a row: the base's own product has its operand flat, too, and XLA then makes that once.
    y = lax.map(lambda row: of_row(row[0].reshape(shape), a, b, row[1]).ravel(), (x.reshape(len(x), -1), slots))
    return y.reshape(len(x), *like.shape)

  @one_by_one.defjvp
  def _(primals, tangents):
    return jax.jvp(jax.vmap(of_row, in_axes=(0, None, None, 0)), primals, tangents)

  def rule(batched: Sequence[bool], args: Sequence[jax.Array]) -> jax.Array | None:
    x, a, b, slots = args
    if list(batched[1:]) != [False, False, True]:  # another axis than that of the rows
      return None
    return one_by_one(x if batched[0] else jnp.broadcast_to(x, (*slots.shape, *x.shape)), a, b, slots)

  return batched_call(of_row, rule, *args)
