"""Coded values: how the transform carries an array that is codes, and not floats.

An equation that only rearranges such an array rearranges its parts, or is put off until the array is formed. Products
form it where they need it, forwards and once more backwards: what differentiation keeps are codes.

Reading order: what is put off -> the value -> its products.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any, Protocol

import jax
from jax import lax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora._base.explicit import explicit_mesh
from jaxlora._base.memory import Space, on_device, space_of
from jaxlora._jax.jaxpr import bind
from jaxlora._jax.primitives import CASTS, NEGATIONS, ROUNDINGS, SCALINGS
from jaxlora._jax.trace_cache import traced_once
from jaxlora._platform.codes import LookUp
from jaxlora._platform.layouts import fetched_in_rows
from jaxlora._platform.wait import Wait, by_barrier, by_first_element, late
from jaxlora._quant.array import QuantizedArray

# ----------------------------------------------------------------------------------------------------------------------
# What is put off.

ELEMENTWISE = (*CASTS, *ROUNDINGS, *NEGATIONS, *SCALINGS)  # of one array, and scalars


@dataclasses.dataclass(frozen=True)
class Later:
  """An equation of one array that is bound when that is formed.

  Attributes:
    primitive, given: of the equation, its parameters as pairs.
    place: which of its operands the array is.
    others: how many other operands it has.
    shape, dtype: of its result.
  """

  primitive: Any
  given: tuple[tuple[str, Any], ...]
  place: int
  others: int
  shape: tuple[int, ...]
  dtype: Any

  @property
  def params(self) -> dict[str, Any]:
    return dict(self.given)

  @property
  def is_elementwise(self) -> bool:
    return self.primitive.name in ELEMENTWISE

  def __call__(self, x: jax.Array, others: Sequence[Any]) -> jax.Array:
    return bind(self, [*others[: self.place], x, *others[self.place :]])[0]


# ----------------------------------------------------------------------------------------------------------------------
# The value.


class HowCodes(Protocol):
  """What is asked of a policy: how codes become numbers, turn and wait, and whether products that are alike are one."""

  @property
  def look_up(self) -> LookUp: ...
  @property
  def wait_codes(self) -> Wait: ...
  @property
  def shares_traces(self) -> bool: ...
  @property
  def turns(self) -> tuple[str, ...]: ...
  def lowered_turned(self, default: Callable[..., Any], decoded_first: Callable[..., Any], node: Any) -> Any: ...


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Coded:
  """An array that is codes.

  The codes may rest in the host's memory, whatever the array is used for: its type is that of an array on the device.
  They are fetched where the array is formed, a loop's slice in each of its steps, and once more in a backward pass.

  Attributes:
    node: a `QuantizedArray`, or any node with `shape`, `dtype` and `dequantize()`.
    scalars: the other operands of what is put off.
    steps: what is put off, in order.
    varies: whether it is another one in every step of the innermost loop, so that no compiler moves its floats out.
    turn: the order that its axes are to have in the array, where that is put off: before the steps.
  """

  node: Any
  scalars: tuple[Any, ...] = ()
  steps: tuple[Later, ...] = dataclasses.field(default=(), metadata={"static": True})
  varies: bool = dataclasses.field(default=False, metadata={"static": True})
  turn: tuple[int, ...] | None = dataclasses.field(default=None, metadata={"static": True})

  @property
  def shape(self) -> tuple[int, ...]:
    turned = self.node.shape if self.turn is None else (self.node.shape[d] for d in self.turn)
    return self.steps[-1].shape if self.steps else tuple(turned)

  @property
  def dtype(self) -> Any:
    return jnp.dtype(self.steps[-1].dtype if self.steps else self.node.dtype)

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def like(self) -> jax.ShapeDtypeStruct:
    """The type of the array; where types carry shardings, with that of its codes."""
    if explicit_mesh(*jax.tree.leaves(self.node)) is not None:
      return jax.eval_shape(Coded.dequantize, self)
    return jax.ShapeDtypeStruct(self.shape, self.dtype)

  @property
  def moves(self) -> bool:
    """Whether its parts can be rearranged in the place of the array."""
    return isinstance(self.node, QuantizedArray) and all(step.is_elementwise for step in self.steps)

  @property
  def forms_in_passing(self) -> bool:
    """Whether a product may form it within its own pass: next to nothing is to be computed."""
    return not self.steps and isinstance(self.node, QuantizedArray) and self.node.scales_whole_axes

  @property
  def rests(self) -> bool:
    """Whether its codes rest in the host's memory."""
    return space_of(self.node) != Space.Device

  def fetched(self) -> "Coded":
    """The same with its codes on the device."""
    return self.replace(node=self.here()) if self.rests else self

  def here(self) -> Any:
    """The node with its parts on the device."""
    return jax.tree.map(fetched_in_rows, on_device(self.node)) if self.rests else self.node

  def replace(self, **changes: Any) -> "Coded":
    return dataclasses.replace(self, **changes)

  def moved(self, node: Any) -> "Coded":
    """The same with rearranged parts."""
    steps = tuple(dataclasses.replace(step, shape=tuple(node.shape)) for step in self.steps)
    return self.replace(node=node, steps=steps)

  def turned(self, order: Sequence[int]) -> "Coded":
    """The same with its axes in another order, which is put off: its parts stay as they lie."""
    turn = tuple(order) if self.turn is None else tuple(self.turn[d] for d in order)
    steps = tuple(dataclasses.replace(step, shape=tuple(step.shape[d] for d in order)) for step in self.steps)
    return self.replace(turn=None if turn == tuple(range(len(turn))) else turn, steps=steps)

  def settled(self) -> "Coded":
    """The same with its parts in the order of its axes."""
    return self if self.turn is None else self.replace(node=self.node.transpose(*self.turn), turn=None)

  def later(self, eqn: Any, params: dict[str, Any], args: Sequence[Any]) -> "Coded":
    """The same with an equation put off in which it is the one operand that is no scalar."""
    (place,) = (k for k, arg in enumerate(args) if arg is self)
    others = [arg for k, arg in enumerate(args) if k != place]
    step = Later(eqn.primitive, tuple(sorted(params.items())), place, len(others), (), None)
    out = jax.eval_shape(step, self.like, others)
    step = dataclasses.replace(step, shape=tuple(out.shape), dtype=out.dtype)
    return self.replace(scalars=(*self.scalars, *others), steps=(*self.steps, step))

  def dequantize(self, policy: "HowCodes | None" = None) -> jax.Array:
    """The array in floats."""
    here = self.here()
    how = () if policy is None or not isinstance(here, QuantizedArray) else (policy.look_up,)
    decode, first = _Decoded(how, self.turn), 0
    x = decode(here) if policy is None or self.turn is None else policy.lowered_turned(decode, decode.first, here)
    for step in self.steps:
      x, first = step(x, self.scalars[first : first + step.others]), first + step.others
    return x

  def along_first(self) -> "Coded | None":
    """What a loop over the first axis takes slices of; `None` where slices of the parts are none of the array."""
    if not self.moves:
      return None if self.steps or not _slices(self.node) else self
    here = self.settled()
    node = _whole_along_first(here.node)
    return None if node is None else here.moved(node)

  def in_one_step(self) -> "Coded":
    """The slice of one step of a loop over its first axis, whose parts have been sliced."""
    return self.replace(steps=tuple(dataclasses.replace(s, shape=s.shape[1:]) for s in self.steps), varies=True)


@dataclasses.dataclass(frozen=True)
class _Decoded:
  """From a node to its floats with the axes in another order: equal for equal ways.

  Attributes:
    how: what its `dequantize` is told.
    turn: the order; `None` for its own.
  """

  how: tuple[Any, ...]
  turn: tuple[int, ...] | None

  def __call__(self, node: Any) -> jax.Array:
    return (node if self.turn is None else node.transpose(*self.turn)).dequantize(*self.how)

  def first(self, node: Any) -> jax.Array:
    """The same, decoded before the axes are moved."""
    return lax.transpose(node.dequantize(*self.how), self.turn or range(node.ndim))


def _whole_along_first(node: QuantizedArray) -> QuantizedArray | None:
  """A quantised array whose parts have all steps of a loop over the first axis; `None` where blocks run along it."""
  count, parts = node.shape[0], {}
  for name, part in node.parts().items():
    if isinstance(part, QuantizedArray):
      part = _whole_along_first(part) if part.shape[0] == count else None
    elif part.shape[0] == 1 != count:
      part = lax.broadcast_in_dim(on_device(part), (count, *part.shape[1:]), range(part.ndim))
    elif part.shape[0] != count:
      part = None
    if part is None:
      return None
    parts[name] = part
  return node.with_parts(parts)


def _slices(node: Any) -> bool:
  """Whether the slices of another library's node along its first axis, all parts alike, are nodes for slices of it."""
  first = lambda node: jax.tree.map(lambda part: part[0], node).dequantize()
  try:
    out = jax.eval_shape(first, node)
  except (TypeError, ValueError, IndexError):
    return False
  return tuple(out.shape) == tuple(node.shape[1:]) and out.dtype == node.dtype


# ----------------------------------------------------------------------------------------------------------------------
# Its products.


@dataclasses.dataclass(frozen=True)
class CodedProduct:
  """`fn(x, W, *rest)`, linear in x, of a coded W: equal for products that are alike.

      dy = fn(dx, W),   W formed again of its codes once the cotangent has arrived

  Attributes:
    fn: of the two as arrays, and of what else the product takes: integers, such as sizes of groups.
    policy: how codes become numbers, and how they wait.
    looping: whether this is inside the body of a loop: what is formed there is not to be moved out of it.
  """

  fn: Callable[..., Any]
  policy: HowCodes
  looping: bool

  def __call__(self, x: jax.Array, w: Coded, *rest: jax.Array) -> jax.Array:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
      return self.linear(w, x, *rest)

    @jax.custom_jvp
    def product(x, w, rest):
      return self.fn(x, formed(w, x, self.policy, self.looping), *rest)

    def jvp(primals, tangents):
      (x, w, rest), (dx, dw, _) = primals, tangents
      y = product(x, w, rest)
      along = lambda kept, dx: self.linear(kept[0], dx, *kept[1])
      terms = [] if isinstance(dx, SymbolicZero) else [late(along, (w, rest), dx, how_it_waits(w, self.policy))]
      terms += along_leaves(lambda w: self.linear(w, x, *rest), w, dw)
      return y, functools.reduce(jnp.add, terms) if terms else jnp.zeros_like(y)

    product.defjvp(jvp, symbolic_zeros=True)
    return product(x, w, rest)

  def linear(self, w: Coded, x: jax.Array, *rest: jax.Array) -> jax.Array:
    return self.fn(x, w.dequantize(self.policy), *rest)


def along_leaves(fn: Callable[[Any], jax.Array], w: Any, dw: Any) -> list[jax.Array]:
  """The tangent of `fn(w)` along a weight that has one; none where it has none.

  A base is frozen, but a scalar that multiplies it may train.

  Args:
    fn: of the weight.
    w: an array, or a coded value.
    dw: its tangents, `SymbolicZero` where there are none.
  """
  leaves, treedef = jax.tree.flatten(w)
  steps = jax.tree.leaves(dw, is_leaf=lambda leaf: isinstance(leaf, SymbolicZero))
  moving = [k for k, step in enumerate(steps) if not isinstance(step, SymbolicZero)]
  if not moving:
    return []

  def of(*values: Any) -> jax.Array:
    full = list(leaves)
    for k, value in zip(moving, values, strict=True):
      full[k] = value
    return fn(jax.tree.unflatten(treedef, full))

  return [jax.jvp(of, [leaves[k] for k in moving], [steps[k] for k in moving])[1]]


def formed(w: Any, x: jax.Array, policy: HowCodes, looping: bool) -> jax.Array:
  """The array of a coded value, for a product with `x` that is not itself differentiated; any other as it is."""
  if not isinstance(w, Coded):
    return w
  if looping and not w.varies:
    w = by_first_element(policy.wait_codes, w.fetched(), x)
  return w.dequantize(policy)


def formed_again(w: Any, cotangent: jax.Array, policy: HowCodes, looping: bool) -> jax.Array:
  """The same in a backward pass, for the transpose of a product.

  The codes wait for the cotangent: a compiler would keep the floats of the forward pass. Not so where each step of a
  loop has a weight of its own: the two passes are two loops then.
  """
  if not isinstance(w, Coded):
    return w
  if not (looping and w.varies):
    leaves, treedef = jax.tree.flatten(w)
    w = jax.tree.unflatten(treedef, how_it_waits(w, policy)(leaves, [cotangent]))
  return w.dequantize(policy)


def how_it_waits(w: Any, policy: HowCodes) -> Wait:
  """How codes wait in a backward pass; those that rest on the host by a barrier, as nothing is computed there."""
  return by_barrier if w.rests else policy.wait_codes


def product_with(
  fn: Callable[..., Any], x: jax.Array, w: Coded, policy: HowCodes, looping: bool, *rest: jax.Array
) -> jax.Array:
  """`fn(x, W, *rest)`, linear in x, of a coded W; traced once for all that are alike where `fn` says which are."""
  product = CodedProduct(fn, policy, looping)
  return traced_once(product, x, w, *rest) if policy.shares_traces else product(x, w, *rest)
