"""A region's result with room beside it: the same array, a few columns wider.

XLA's TPU backend makes a norm again inside of each product that reads it, for next to nothing. It does not where the
product reads `[norm(x), h]`: what is concatenated is an array. So the norm is made of an `x` that is wider already, and
the columns in which it means nothing are those of `h`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._jax.control_flow import called
from jaxlora._jax.jaxpr import Literal, bind, equation_context, open_jaxpr
from jaxlora._platform.recipes import ELEMENTWISE
from jaxlora._platform.regions import Region

# Of one value at a time: those that move values about are left out.
_ELEMENTWISE = ELEMENTWISE - {"reshape", "transpose", "squeeze", "expand_dims", "broadcast_in_dim", "slice", "rev"}


class NotWidened(Exception):
  """A region has an equation that cannot be made wider."""


def widened(region: Region, operands: Sequence[Any], axis: int, by: int) -> jax.Array:
  """A region's result with `by` more columns, of any content, at the end of `axis`.

  Args:
    region: a norm, or another elementwise function of its inputs and its small variables.
    operands: the values of its inputs, then those of its small variables.
    axis: of the result.
    by: how many columns.

  Raises:
    NotWidened: where an equation is in the way.
  """
  known = dict(zip((*region.inputs, *region.small), operands, strict=True))
  return _Wider(region.equations, known, by).value(region.result, axis)


class _Wider:
  """The values of a program's variables, some of them with more columns, computed as they are asked for."""

  def __init__(self, equations: Sequence[Any], known: Mapping[Any, Any], by: int):
    self.makers = {var: eqn for eqn in equations for var in eqn.outvars}
    self.known = known
    self.by = by
    self.made: dict[tuple[Any, int | None], Any] = {}

  def value(self, atom: Any, axis: int | None) -> Any:
    """A variable's value, wider along an axis if there is one."""
    if isinstance(atom, Literal):
      return atom.val
    if (atom, axis) not in self.made:
      self.made[atom, axis] = self._given(atom, axis) if atom in self.known else self._computed(atom, axis)
    return self.made[atom, axis]

  def _given(self, atom: Any, axis: int | None) -> Any:
    value = self.known[atom]
    if axis is None:
      return value
    edges = [(0, self.by if k == axis else 0, 0) for k in range(value.ndim)]
    return lax.pad(value, jnp.zeros((), value.dtype), edges)

  def _computed(self, atom: Any, axis: int | None) -> Any:
    eqn = self.makers[atom]
    inner = called(eqn)
    if inner is not None:
      program, consts = open_jaxpr(inner)
      outer = dict(zip(program.invars, eqn.invars, strict=True))
      return _Inside(program, consts, self, outer).value(program.outvars[eqn.outvars.index(atom)], axis)
    with equation_context(eqn, named=False):
      if axis is None:
        return bind(eqn, [self.value(operand, None) for operand in eqn.invars])[eqn.outvars.index(atom)]
      return self._wider(eqn, axis)

  def _wider(self, eqn: Any, axis: int) -> Any:
    name, out = eqn.primitive.name, eqn.outvars[0].aval
    if name == "broadcast_in_dim" and len(eqn.invars) == 1:
      places = eqn.params["broadcast_dimensions"]
      (operand,) = eqn.invars
      own = places.index(axis) if axis in places else None
      own = own if own is not None and operand.aval.shape[own] == out.shape[axis] else None
      shape = tuple(size + self.by * (k == axis) for k, size in enumerate(out.shape))
      return lax.broadcast_in_dim(self.value(operand, own), shape, places)
    if name not in _ELEMENTWISE or len(eqn.outvars) != 1:
      raise NotWidened(name)
    return bind(eqn, [self.value(atom, self._own(atom, out, axis)) for atom in eqn.invars])[0]

  def _own(self, atom: Any, out: Any, axis: int) -> int | None:
    """Along which axis an operand of an elementwise equation is to be wider: none where it is one value for all."""
    shape = atom.aval.shape
    if not shape:
      return None
    if len(shape) != len(out.shape) or shape[axis] not in (1, out.shape[axis]):
      raise NotWidened(f"an operand of shape {shape} beside {out.shape}")
    return axis if shape[axis] == out.shape[axis] else None


class _Inside(_Wider):
  """The same inside of a called function, whose arguments are variables of the program around it."""

  def __init__(self, program: Any, consts: Sequence[Any], around: _Wider, outer: Mapping[Any, Any]):
    super().__init__(program.eqns, dict(zip(program.constvars, consts, strict=True)), around.by)
    self.around, self.outer = around, outer

  def value(self, atom: Any, axis: int | None) -> Any:
    if not isinstance(atom, Literal) and atom in self.outer:
      return self.around.value(self.outer[atom], axis)
    return super().value(atom, axis)
