"""Recomputing the input of an adapted product for the backward pass, instead of keeping it.

The gradient of A needs the input x of its product; a frozen weight alone would not. Mostly x is a few cheap operations
away from values that the rest of the backward pass keeps anyway: a normalised activation from the centred one, a gelu's
result from its operands. The walk notes what made each value (`Origins`), a `Recipe` says how to make x again, and
`late` makes sure that it is made only once its cotangent has arrived: a compiler would otherwise merge the copy with the
original, or schedule it beside it, and keep it all the same.

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
  "erf", "select_n", "custom_jvp_call",
}  # fmt: skip
# What differentiating these keeps is their result, which is one array more.
_KEEPS_RESULT = {"exp", "exp2", "expm1", "tanh", "logistic", "erf", "erfc", "log1p", "sqrt", "rsqrt", "cbrt"}
_COMPARES = {"eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite"}
_ELEMENTWISE = _LINEAR | _KEEPS_OPERANDS | _KEEPS_RESULT | _COMPARES
_SMALL = 8  # an operand with a share of less than 1/8 of the input's elements costs nothing to keep


class Origin(NamedTuple):
  """The equation that made a value, its operands, and which of its results the value is."""

  eqn: Any
  operands: Sequence[Any]
  which: int
  value: Any  # keeps the value alive, and with it its identity


class Recipe(NamedTuple):
  """How to make a value again: `again(leaves)`."""

  leaves: tuple[Any, ...]
  again: Callable[[Sequence[Any]], Any]

  def then(self, step: Callable[[Any, Any], Any], extra: Any) -> "Recipe":
    """The recipe of `step(value, extra)`."""
    return Recipe((*self.leaves, extra), lambda leaves: step(self.again(leaves[:-1]), leaves[-1]))


class Origins:
  """What made the values of one walk, as far as it was cheap."""

  def __init__(self) -> None:
    self.known: dict[int, Origin] = {}
    self.recipes: dict[int, Recipe | None] = {}

  def note(self, eqn: Any, operands: Sequence[Any], results: Sequence[Any]) -> None:
    if eqn.primitive.name in _ELEMENTWISE or is_elementwise_call(eqn):
      for k, value in enumerate(results):
        if isinstance(value, jax.core.Tracer):  # outside of any trace nothing is differentiated
          self.known[id(value)] = Origin(eqn, operands, k, value)

  def recipe(self, value: Any) -> Recipe | None:
    """How to make `value` again from what is kept anyway; `None` where it is better kept itself."""
    if id(value) not in self.recipes:
      self.recipes[id(value)] = _Cook(self.known, value).recipe()
    return self.recipes[id(value)]


def is_elementwise_call(eqn: Any) -> bool:
  """Whether an equation is a jitted function of elementwise operations alone, such as `jax.nn.gelu`."""
  return bool(_inside(eqn)) and all(
    each.primitive.name in _ELEMENTWISE or is_elementwise_call(each) for each in _inside(eqn)
  )


def keeps_results(eqn: Any) -> bool:
  """Whether differentiating an elementwise call keeps more than its operands."""
  return any(each.primitive.name in _KEEPS_RESULT or keeps_results(each) for each in _inside(eqn))


def _inside(eqn: Any) -> Sequence[Any]:
  if eqn.primitive.name not in ("jit", "pjit", "custom_jvp_call"):
    return ()
  inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
  return () if inner is None else _compat.open_jaxpr(inner)[0].eqns


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
    name = origin.eqn.primitive.name
    operands = [self.small(operand) for operand in origin.operands]
    large = [k for k, operand in enumerate(operands) if operand is None]
    if name in _LINEAR and len(large) == 1 and not (name == "div" and large == [1]):
      operands[large[0]] = self.back(origin.operands[large[0]])
      return None if operands[large[0]] is None else _Step(origin, operands)
    if (name in _KEEPS_OPERANDS or is_elementwise_call(origin.eqn)) and large:
      return _Step(origin, [self.leaf(origin.operands[k]) if k in large else step for k, step in enumerate(operands)])
    return None

  def small(self, value: Any) -> _Step | int | None:
    """A value that costs little to keep, or what it was broadcast from; `None` for large ones."""
    if not self.is_large(value) or getattr(value, "dtype", None) == bool:
      return self.leaf(value)
    origin = self.known.get(id(value))
    if origin is None or origin.eqn.primitive.name not in ("broadcast_in_dim", "convert_element_type", "reshape"):
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
    return math.prod(jnp.shape(value)) * _SMALL > self.elements


def _is_float(value: Any) -> bool:
  return jnp.issubdtype(jnp.asarray(value).dtype, jnp.floating)


def _evaluate(step: _Step | int, leaves: Sequence[Any]) -> Any:
  if isinstance(step, int):
    return leaves[step]
  operands = [_evaluate(operand, leaves) for operand in step.operands]
  with _compat.equation_context(step.origin.eqn):
    return _compat.bind(step.origin.eqn, operands)[step.origin.which]


# ----------------------------------------------------------------------------------------------------------------------
# The linear call that waits.


def late(fn: Callable[[Any, Any], Any], leaves: Sequence[Any], linear: Any) -> Any:
  """`fn(leaves, linear)`, linear in the second argument, whose transpose uses the leaves only after its cotangent.

  Forward mode, second derivatives and batching are those of `fn`.
  """
  return _compat.linear_call(fn, _wait, tuple(leaves), linear)


def light(fn: Callable[..., list[Any]], operands: Sequence[Any]) -> list[Any]:
  """`fn(*operands)` for an elementwise function, of which the backward pass keeps nothing but the operands."""
  moving = [k for k, operand in enumerate(operands) if _is_float(operand)]

  @jax.custom_jvp
  def call(*operands):
    return fn(*operands)

  @call.defjvp
  def _(operands, tangents):
    def along(operands, tangents):
      def of_moving(*values):
        full = list(operands)
        for k, value in zip(moving, values, strict=True):
          full[k] = value
        return fn(*full)

      return jax.jvp(of_moving, [operands[k] for k in moving], tangents)[1]

    return call(*operands), late(along, operands, [tangents[k] for k in moving])

  return call(*operands)


def _wait(leaves: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
  """The leaves, unchanged, but as values that depend on the cotangents.

  `optimization_barrier` would say this, and XLA drops it before it fuses and schedules. So the dependence is one of
  arithmetic: times one, where that one is made of a cotangent's bits. No compiler pass ahead of code generation sees
  that it is one; code generation does, and the product costs nothing.
  """
  bits = lax.bitcast_convert_type(_first_element(cotangents[0]).astype(jnp.float32), jnp.uint32)
  one = 1 + lax.shift_right_logical(lax.shift_right_logical(bits, jnp.uint32(31)), jnp.uint32(1)).astype(jnp.float32)
  return [leaf * one.astype(leaf.dtype) if _is_float(leaf) and leaf.ndim else leaf for leaf in leaves]


def _first_element(value: jax.Array) -> jax.Array:
  return lax.reshape(lax.slice(value, (0,) * value.ndim, (1,) * value.ndim), ())
