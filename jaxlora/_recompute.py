"""What the backward pass makes again, from what it keeps anyway, instead of keeping it, too.

The gradient of A needs the input x of its product, which a frozen weight alone would not; and x is mostly a few cheap
operations away from values that are kept in any case. The walk notes what made each value (`Origins`), a `Recipe` says
how to make x again, and `late` sees to it that nothing is made again before its cotangent has arrived: a compiler would
otherwise merge the copy with the original, or schedule it beside it, and keep it all the same.

Norms, softmaxes and activations, which keep more than one array when they are differentiated equation by equation, are
in `_regions.py`.

Reading order: where values come from -> the recipe -> the linear call that waits.
"""

from collections.abc import Callable, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora import _compat

# ----------------------------------------------------------------------------------------------------------------------
# Where values come from.

# Linear in their one large operand: differentiating them keeps nothing, so a recipe goes on through them.
_LINEAR = {
  "add", "sub", "neg", "mul", "div", "convert_element_type", "reshape", "transpose", "squeeze", "expand_dims",
  "broadcast_in_dim", "copy", "rev", "slice", "select_n", "name", "stop_gradient",
}  # fmt: skip
# Differentiating these keeps their operands: a recipe ends with them.
_KEEPS_OPERANDS = {
  "mul", "div", "max", "min", "clamp", "pow", "integer_pow", "square", "abs", "sign", "sin", "cos", "log", "log1p",
  "erf", "select_n", "custom_jvp_call", "region",
}  # fmt: skip
# What differentiating these keeps is their result, which is one array more.
KEEPS_RESULT = {"exp", "exp2", "expm1", "tanh", "logistic", "erf", "erfc", "log1p", "sqrt", "rsqrt", "cbrt"}
_COMPARES = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite"}
REGION = "region"
ELEMENTWISE = _LINEAR | _KEEPS_OPERANDS | KEEPS_RESULT | _COMPARES | {REGION}
SMALL = 8  # an operand with a share of less than 1/8 of the input's elements costs nothing to keep


class Origin(NamedTuple):
  """How a value came about: by what kind of operation, how to repeat that, and on what."""

  name: str
  again: Callable[[Sequence[Any]], Any]
  operands: Sequence[Any]
  value: Any  # keeps the value alive, and with it its identity


class Recipe(NamedTuple):
  """How to make a value again: `again(leaves)`."""

  leaves: tuple[Any, ...]
  again: Callable[[Sequence[Any]], Any]

  def then(self, step: Callable[[Any, Any], Any], extra: Any) -> "Recipe":
    """The recipe of `step(value, extra)`."""
    return Recipe((*self.leaves, extra), lambda leaves: step(self.again(leaves[:-1]), leaves[-1]))


def _picking(bind: Callable[[Sequence[Any]], list[Any]], k: int) -> Callable[[Sequence[Any]], Any]:
  return lambda operands: bind(operands)[k]


class Origins:
  """What made the values of one walk, as far as it was cheap."""

  def __init__(self) -> None:
    self.known: dict[int, Origin] = {}
    self.recipes: dict[int, Recipe | None] = {}
    self.halves: dict[int, Any] = {}  # by an equation's identity: what was computed of it ahead

  def note(
    self, name: str, bind: Callable[[Sequence[Any]], list[Any]], operands: Sequence[Any], out: list[Any]
  ) -> None:
    """Takes down what made the results `out`, if it was elementwise."""
    if name not in ELEMENTWISE:
      return
    for k, value in enumerate(out):
      if isinstance(value, jax.core.Tracer):  # outside of any trace nothing is differentiated
        self.known[id(value)] = Origin(name, _picking(bind, k), operands, value)

  def recipe(self, value: Any) -> Recipe | None:
    """How to make `value` again from what is kept anyway; `None` where it is better kept itself."""
    if id(value) not in self.recipes:
      self.recipes[id(value)] = _Cook(self.known, value).recipe()
    return self.recipes[id(value)]


# ----------------------------------------------------------------------------------------------------------------------
# The recipe.


class _Step(NamedTuple):
  origin: Origin
  operands: list[Any]  # each a `_Step`, or the number of a leaf


class _Cook:
  """Goes back from one value to what is kept anyway."""

  def __init__(self, known: dict[int, Origin], value: Any):
    self.known = known
    self.value = value
    self.elements = math.prod(jnp.shape(value))
    self.leaves: list[Any] = []

  def recipe(self) -> Recipe | None:
    steps = self.back(self.value)
    if steps is None or not any(self.is_large(leaf) and _is_float(leaf) for leaf in self.leaves):
      return None
    return Recipe(tuple(map(jnp.asarray, self.leaves)), lambda leaves: _evaluate(steps, leaves))

  def back(self, value: Any) -> _Step | None:
    """The steps to a value; `None` if they end in something that nobody keeps."""
    origin = self.known.get(id(value))
    if origin is None:
      return None
    name = origin.name
    operands = [self.small(operand) for operand in origin.operands]
    large = [k for k, operand in enumerate(operands) if operand is None]
    if name in _LINEAR and len(large) == 1 and not (name == "div" and large == [1]):
      operands[large[0]] = self.back(origin.operands[large[0]])
      return None if operands[large[0]] is None else _Step(origin, operands)
    if name in _KEEPS_OPERANDS and large:
      return _Step(origin, [self.leaf(origin.operands[k]) if k in large else step for k, step in enumerate(operands)])
    return None

  def small(self, value: Any) -> _Step | int | None:
    """A value that costs little to keep, or what it was broadcast from; `None` for large ones."""
    if not self.is_large(value) or _is_bool(value):
      return self.leaf(value)
    origin = self.known.get(id(value))
    if origin is None or origin.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
      return None
    source = self.small(origin.operands[0])
    return None if source is None else _Step(origin, [source])

  def leaf(self, value: Any) -> int:
    for k, known in enumerate(self.leaves):
      if known is value:
        return k
    self.leaves.append(value)
    return len(self.leaves) - 1

  def is_large(self, value: Any) -> bool:
    return math.prod(jnp.shape(value)) * SMALL > self.elements


def _is_float(value: Any) -> bool:
  return jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.floating)


def _is_bool(value: Any) -> bool:
  return jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.bool_)


def _evaluate(step: _Step | int, leaves: Sequence[Any]) -> Any:
  if isinstance(step, int):
    return leaves[step]
  return step.origin.again([_evaluate(operand, leaves) for operand in step.operands])


# ----------------------------------------------------------------------------------------------------------------------
# The linear call that waits.


def late(fn: Callable[[Any, Any], Any], leaves: Sequence[Any], linear: Any) -> Any:
  """`fn(leaves, linear)`, linear in the second argument, whose transpose uses the leaves only after its cotangent.

  Forward mode, second derivatives and batching are those of `fn`.
  """
  return _compat.linear_call(fn, _wait, tuple(leaves), linear)


def uses(fn: Callable[[Any, Any], Any], leaves: Any, linear: Any) -> list[bool]:
  """Which of the leaves `late(fn, leaves, linear)` keeps."""
  return _compat.without_dead_code(jax.make_jaxpr(fn)(leaves, linear))[1][: len(jax.tree.leaves(leaves))]


def _wait(leaves: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
  """The leaves, unchanged, but as values that depend on the cotangents.

  `optimization_barrier` says this, but XLA's CPU backend drops it before it fuses and schedules. There the dependence
  is one of arithmetic: times one, where that one is made of a cotangent's bits; for narrow formats, which would be
  widened and rounded, a bitwise or with such a zero. No compiler pass ahead of code generation sees what it is; code
  generation does, and it costs nothing. Not with several devices, where one element of a sharded cotangent would have
  to reach them all.
  """
  if jax.default_backend() != "cpu" or jax.device_count() > 1:
    return lax.optimization_barrier((list(leaves), list(cotangents)))[0]
  bits = lax.bitcast_convert_type(_first_element(cotangents[0]).astype(jnp.float32), jnp.uint32)
  zero = lax.shift_right_logical(lax.shift_right_logical(bits, jnp.uint32(31)), jnp.uint32(1))
  return [_unchanged(leaf, zero) if _is_float(leaf) and leaf.ndim else leaf for leaf in leaves]


def _unchanged(value: jax.Array, zero: jax.Array) -> jax.Array:
  if value.dtype.itemsize > 2:
    return value * (1 + zero.astype(value.dtype))
  unsigned = jnp.dtype(f"uint{8 * value.dtype.itemsize}")
  return lax.bitcast_convert_type(lax.bitcast_convert_type(value, unsigned) | zero.astype(unsigned), value.dtype)


def _first_element(value: jax.Array) -> jax.Array:
  return lax.reshape(lax.slice(value, (0,) * value.ndim, (1,) * value.ndim), ())
