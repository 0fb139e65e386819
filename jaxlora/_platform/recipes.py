"""Recipes: how the backward pass rematerialises the input of a product from residuals that it keeps anyway.

The gradient of A needs the input x of its product, which a frozen weight alone would not; and x is mostly a few cheap
operations away from values that are kept in any case. The transform notes what made each value (`Origins`), and a
`Recipe` says how to make x again.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._jax.by_platform import EVERYWHERE, Form, by_platform
from jaxlora._jax.primitives import COMPARISONS, KEEPS_OPERANDS, KEEPS_RESULT, LINEAR
from jaxlora._jax.sizes import elements

REGION = "region"  # in the place of a primitive's name; differentiating one keeps its operands
_KEEPS_OPERANDS = KEEPS_OPERANDS | {REGION}
ELEMENTWISE = LINEAR | _KEEPS_OPERANDS | KEEPS_RESULT | COMPARISONS
LOOKUP = "gather"  # differentiating one keeps its indices
SEVERAL = 2  # rows are looked up again where each is so often among them
SMALL = 8  # an operand with a share of less than 1/8 of the input's elements costs nothing to keep


class Origin(NamedTuple):
  """How a value came about: by what kind of operation, how to repeat that, and on what."""

  name: str
  again: Callable[[Sequence[Any]], Any]
  operands: Sequence[Any]
  value: Any  # keeps the value alive, and with it its identity


class Recipe(NamedTuple):
  """How to make a value again, `again(leaves)`, and how that waits for its cotangent."""

  leaves: tuple[Any, ...]
  again: Callable[[Sequence[Any]], Any]
  wait: Callable[..., Any]

  def then(self, step: Callable[[Any, Any], Any], extra: Any) -> "Recipe":
    """The recipe of `step(value, extra)`."""
    return self._replace(leaves=(*self.leaves, extra), again=lambda leaves: step(self.again(leaves[:-1]), leaves[-1]))


def _picking(bind: Callable[[Sequence[Any]], list[Any]], k: int) -> Callable[[Sequence[Any]], Any]:
  return lambda operands: bind(operands)[k]


class Origins:
  """What made the values of one program, as far as it was cheap."""

  def __init__(self, wait: Callable[..., Any]) -> None:
    self.wait = wait
    self.known: dict[int, Origin] = {}
    self.recipes: dict[int, Recipe | None] = {}
    self.halves: dict[int, Any] = {}  # by an equation's identity: what was computed of it ahead

  def note(
    self, name: str, bind: Callable[[Sequence[Any]], list[Any]], operands: Sequence[Any], out: list[Any]
  ) -> None:
    """Takes down what made the results `out`, if it was elementwise, or looked rows up."""
    if name not in ELEMENTWISE and name != LOOKUP:
      return
    for k, value in enumerate(out):
      if isinstance(value, jax.core.Tracer):  # outside of any trace nothing is differentiated
        self.known[id(value)] = Origin(name, _picking(bind, k), operands, value)

  def recipe(self, value: Any) -> Recipe | None:
    """How to make `value` again from what is kept anyway; `None` where it is better kept itself."""
    if id(value) not in self.recipes:
      self.recipes[id(value)] = _Cook(self.known, value, self.wait).recipe()
    return self.recipes[id(value)]


class _Step(NamedTuple):
  origin: Origin
  operands: list[Any]  # each a `_Step`, or the number of a leaf


class _Cook:
  """Goes back from one value to what is kept anyway."""

  def __init__(self, known: dict[int, Origin], value: Any, wait: Callable[..., Any]):
    self.known = known
    self.wait = wait
    self.value = value
    self.elements = elements(jnp.shape(value))
    self.leaves: list[Any] = []

  def recipe(self) -> Recipe | None:
    steps = self.back(self.value)
    if steps is None or not any(self.is_large(leaf) and _is_float(leaf) for leaf in self.leaves):
      return None
    return Recipe(tuple(map(jnp.asarray, self.leaves)), lambda leaves: _evaluate(steps, leaves), self.wait)

  def back(self, value: Any) -> _Step | None:
    """The steps to a value; `None` if they end in something that nobody keeps."""
    origin = self.known.get(id(value))
    if origin is None:
      return None
    name = origin.name
    operands = [self.small(operand) for operand in origin.operands]
    large = [k for k, operand in enumerate(operands) if operand is None]
    if name in LINEAR and len(large) == 1 and not (name == "div" and large == [1]):
      operands[large[0]] = self.back(origin.operands[large[0]])
      return None if operands[large[0]] is None else _Step(origin, operands)
    if name == LOOKUP:
      return self.looked_up(origin)
    if name in _KEEPS_OPERANDS and large:
      return _Step(origin, [self.kept(origin.operands[k]) if k in large else step for k, step in enumerate(operands)])
    return None

  def looked_up(self, origin: Origin) -> _Step | None:
    """The steps to rows of an array that is smaller, in which each is several times: that is kept instead.

    By programs of one device alone: on a mesh the rows would be sent once more, and are kept.
    """
    source, indices = origin.operands
    if SEVERAL * elements(jnp.shape(source)) > elements(jnp.shape(origin.value)):
      return None
    again = Form(lambda source, indices, rows: origin.again([source, indices]), single_device=True)
    either = lambda operands: by_platform(_last, {EVERYWHERE: again}, *operands)
    return _Step(origin._replace(again=either), [self.leaf(source), self.leaf(indices), self.leaf(origin.value)])

  def kept(self, value: Any) -> _Step | int:
    """A large value that is kept, or what a region made it of: `act(g) * u` is made again from `g` and `u`.

    A leaf waits for its cotangent, and what waits is an array of its own: of `act(g)` there need be none.
    """
    origin = self.known.get(id(value))
    steps = self.back(value) if origin is not None and origin.name == REGION else None
    return self.leaf(value) if steps is None else steps

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
    return elements(jnp.shape(value)) * SMALL > self.elements


def _last(*values: Any) -> Any:
  return values[-1]


def _is_float(value: Any) -> bool:
  return jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.floating)


def _is_bool(value: Any) -> bool:
  return jnp.issubdtype(getattr(value, "dtype", type(value)), jnp.bool_)


def _evaluate(step: _Step | int, leaves: Sequence[Any]) -> Any:
  if isinstance(step, int):
    return leaves[step]
  return step.origin.again([_evaluate(operand, leaves) for operand in step.operands])
