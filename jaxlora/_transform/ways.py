"""Ways to compute the low-rank part of a mixed batch."""

from collections.abc import Callable, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import beside, inexact
from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._jax.batched_call import batched_call
from jaxlora._transform.factored import Factored, picked
from jaxlora._transform.product import Pairing, shrinking
from jaxlora._weight.roles import RANK, factor_axes

GATHERED = "gathered"  # the rows' factors laid side by side, then one batched product: at any size

ROWS = "row by row"  # one row after the other, each factor read where it lies: few tokens a row, on CPUs

WIDE = "wide"  # one product with all adapters' factors, of which each row keeps its own ranks: few adapters

WAYS = ("auto", GATHERED, ROWS, WIDE)

# Up to this many tokens in a row, laying out a copy of the row's factors costs more than its products do.
_FEW_TOKENS = 16


# A wide product does `adapters - 1` times more work than needed, per token; and reads no factor twice. Up to this many
# superfluous terms that work costs less than the copies that the other ways make.
_SPARE_TERMS = {"cpu": 8}


_SPARE_TERMS_ELSEWHERE = 128  # where arithmetic is cheaper by far than memory


def _spare_terms() -> int:
  return _SPARE_TERMS.get(jax.default_backend(), _SPARE_TERMS_ELSEWHERE)


def choose_way(shape: Sequence[int], w: Factored, pairing: Pairing) -> str:
  """How to compute one row's low-rank part of an input and `w`, a weight of a bank, by what is cheapest.

  Args:
    shape: of the row's input.
    w: the weight.
    pairing: how the two meet.
  """
  assert w.routing is not None
  if w.routing.via != "auto":
    return w.routing.via
  adapters = w.a.shape[0]
  met = {*pairing.contracted.values(), *pairing.batched.values()}
  tokens = math.prod(size for k, size in enumerate(shape) if k not in met)
  if tokens * (adapters - 1) < _spare_terms():
    return WIDE
  few = tokens <= _FEW_TOKENS and w.routing.rows > 1
  return ROWS if few and jax.default_backend() == "cpu" else GATHERED


def stays_whole(w: Factored) -> bool:
  """Whether a weight of a bank enters a loop with all its factors: where a single token a row would be computed so.

  Elsewhere the rows' factors are picked once, ahead of the loop, for all of its steps.
  """
  if w.slot is None or w.routing is None:
    return True
  if w.routing.via != "auto":
    return w.routing.via != GATHERED
  return jax.default_backend() == "cpu" or w.a.shape[0] - 1 < _spare_terms()


def low_rank_part(x: Any, w: Factored, pairing: Pairing, dtype: Any, way: str, looping: bool) -> jax.Array:
  """The low-rank part of one row's product, laid out as the base's.

  y_t = (x_t A_i^T) B_i,    i the row's adapter
  """
  x = inexact(x, w.a.dtype)
  if way == WIDE:
    dtypes = {name: beside(getattr(w, name), w.base.dtype) for name in ("a", "b")}
    return _thin(x, w.replace(**dtypes), pairing, dtype, looping)
  shape = jax.ShapeDtypeStruct(w.base.shape, w.base.dtype)

  def of_row(x: jax.Array, a: jax.Array, b: jax.Array, slot: jax.Array) -> jax.Array:
    return _thin(x, picked(w.replace(base=shape, a=a, b=b, slot=slot)), pairing, dtype, looping)

  return _row_by_row(of_row, x, w.a, w.b, w.slot)


def _thin(x: jax.Array, w: Factored, pairing: Pairing, dtype: Any, looping: bool) -> jax.Array:
  """Both thin products; with the factors of a whole bank each row keeps, in between, the ranks of its own adapter."""
  bank = (_BANK,) if w.slot is not None else ()
  stack = [d for d in pairing.contracted if w.roles[d] == "s"]
  shrink = shrinking(x, w, pairing, dtype, looping=looping)
  h = dataclasses.replace(shrink, factor=(*bank, *shrink.factor))(x, w.a)
  if bank:
    h = _own_ranks(h, w.slot)
  second = Labelled(w.b, (*bank, *factor_axes(w.roles, "o"))).merged(
    [d for d in pairing.free(len(w.roles)) if w.roles[d] == "o"]
  )
  y = pairing.product(h, second, contract, (*bank, RANK, *stack), Result(dtype, pairing.precision))
  return y.expanded().ordered(pairing.result_labels(x.ndim, len(w.roles)))


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


def update_slice(bind: Callable[..., list[Any]], operand: Any, update: Any, *starts: Any) -> list[Any]:
  """A `dynamic_update_slice` in one row, such as a cache's: where all rows write to one place it stays one.

  JAX makes a scatter of it, whose bounds XLA checks with two copies of the whole cache.
  """

  def rule(batched: Sequence[bool], args: Sequence[Any]) -> jax.Array | None:
    if any(batched[2:]):
      return None
    operand, update, *starts = args
    (count,) = {array.shape[0] for array, one in zip(args, batched, strict=True) if one}
    operand, update = (
      array if one else jnp.broadcast_to(array, (count, *array.shape))
      for array, one in zip((operand, update), batched, strict=False)
    )
    # A batch of one row has an axis for it already. With two XLA does not see that the update is one in place.
    whole = operand.shape
    if operand.shape[1] == 1:
      operand, update = (lax.reshape(array, (count, *array.shape[2:])) for array in (operand, update))
      starts = starts[1:]
    zero = jnp.zeros((), starts[0].dtype) if starts else 0
    return lax.dynamic_update_slice(operand, update, (zero, *starts), allow_negative_indices=False).reshape(whole)

  return [batched_call(lambda *args: bind(*args)[0], rule, operand, update, *starts)]
