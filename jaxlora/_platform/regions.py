"""Regions: norms, softmaxes and activations, which differentiation had better see as one.

A region is some equations that make one large array out of one other, elementwise or along whole rows. Differentiated
equation by equation they would keep several arrays of that size for the backward pass; the one they start from, and the
statistics of its rows, are enough.

Reading order: the region -> evaluating it -> finding them.
"""

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora._jax.control_flow import called
from jaxlora._jax.jaxpr import Literal, bind, context_key, equation_context, open_jaxpr
from jaxlora._jax.primitives import KEEPS_RESULT, LINEAR, SCALINGS, SUMS_ALONG_AXES
from jaxlora._jax.sizes import elements
from jaxlora._platform.recipes import ELEMENTWISE, SMALL

# What may be inside of a region. Not names: a policy of `jax.checkpoint` is to find them.
_INSIDE = (ELEMENTWISE | {*SUMS_ALONG_AXES}) - {"name"}

_AFFINE = LINEAR | {"reduce_sum"}


class Softmax(NamedTuple):
  """The variables of `over / under`, where `over` is the exponential of `exponent`, and `under` a sum of it."""

  exponent: Any
  over: Any
  under: Any


@dataclasses.dataclass(frozen=True)
class Region:
  """Equations that make one array out of one large other; all that they make besides is used nowhere else.

  Attributes:
    equations: in order; the last one makes the result.
    members: their numbers in their jaxpr.
    inputs: the variables that they read from outside, of which `root` is the large one.
    small: the variables of little size that they make: sums along rows, and what comes of those.
    root: see above.
  """

  equations: tuple[Any, ...]
  members: tuple[int, ...]
  inputs: tuple[Any, ...]
  small: tuple[Any, ...]
  root: Any

  @property
  def result(self) -> Any:
    return self.equations[-1].outvars[0]

  def evaluate(self, values: Sequence[Any], instead: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """All variables of the region; those in `instead` have that value, and the derivative of what they are made of."""
    env = dict(zip(self.inputs, values, strict=True))
    for eqn in self.equations:
      operands = [atom.val if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
      with equation_context(eqn, named=False):
        env.update(zip(eqn.outvars, _evaluate(eqn, operands, instead or {}), strict=True))
    return env

  def signature(self) -> Hashable:
    """The same for regions that are the same but for their variables."""
    number = {var: k for k, var in enumerate(self.inputs)}

    def of(atom: Any) -> Hashable:
      if isinstance(atom, Literal):
        return str(atom.aval), repr(atom.val)
      return number.setdefault(atom, len(number))

    equations = tuple(
      (
        eqn.primitive,
        tuple(sorted(eqn.params.items())),
        tuple(map(of, (*eqn.invars, *eqn.outvars))),
        tuple(var.aval for var in eqn.outvars),
        context_key(eqn),
      )
      for eqn in self.equations
    )
    return (
      equations,
      tuple(var.aval for var in self.inputs),
      number[self.root],
      tuple(number[var] for var in self.small),
    )

  def softmax(self) -> Softmax | None:
    """Its variables, where the result is a large exponential over a sum of it along rows."""
    eqn = self.equations[-1]
    if eqn.primitive.name != "div" or any(isinstance(atom, Literal) for atom in eqn.invars):
      return None
    over, under = eqn.invars
    exponents = {eqn.outvars[0]: eqn.invars[0] for eqn in self.equations if eqn.primitive.name == "exp"}
    if under not in self.small or over not in exponents or not self._is_affine(over):
      return None
    return Softmax(exponents[over], over, under)

  def _is_affine(self, start: Any) -> bool:
    """Whether all that is made of a variable, ahead of the result, has a derivative that no values are in."""
    made = {start}
    for eqn in self.equations[:-1]:
      operands = [atom for atom in _variables(eqn.invars) if atom in made]
      name = eqn.primitive.name
      scales = name not in SCALINGS or (len(operands) == 1 and (name != "div" or eqn.invars[0] in operands))
      if operands and not (name in _AFFINE and scales):
        return False
      made.update(eqn.outvars if operands else ())
    return True


def _evaluate(eqn: Any, operands: Sequence[Any], instead: Mapping[Any, Any]) -> list[Any]:
  """The results of one equation; those in `instead` have that value, but the derivative that they would have."""
  if eqn.primitive.name == "exp" and eqn.outvars[0] in instead:  # whose derivative is made of its value
    return [_exp_with_value(operands[0], instead[eqn.outvars[0]])]
  made = zip(eqn.outvars, bind(eqn, operands), strict=True)
  return [_with_value(value, instead[var]) if var in instead else value for var, value in made]


def _valued(derivative: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
  """`f(made, value)`, which is `value`; its derivative is `derivative(the one of made, value)`."""

  @jax.custom_jvp
  def valued(made: Any, value: Any) -> Any:
    del made
    return value

  valued.defjvp(lambda primals, tangents: (primals[1], derivative(tangents[0], primals[1])))
  return valued


_with_value = _valued(lambda step, value: step)

_exp_with_value = _valued(lambda step, value: step * value)


def find_regions(jaxpr: Any) -> dict[int, Region]:
  """The regions of a jaxpr of which differentiation would keep more than their inputs; by every member's number."""
  uses = _uses(jaxpr)
  cuts: set[Any] = set()
  while True:
    members = _members(jaxpr, cuts)
    parts = [_parts(jaxpr, numbers, uses) for numbers in members.values()]
    new = {var for part in parts for var in part.shared} - cuts
    if not new:
      break
    cuts |= new
  roots = [(root, numbers) for root, part in zip(members, parts, strict=True) for numbers in part.apart]
  found = (_region(jaxpr, root, numbers, uses) for root, numbers in roots)
  return {k: region for region in found if region is not None for k in region.members}


def _uses(jaxpr: Any) -> dict[Any, set[int]]:
  """The numbers of the equations that read each variable; the jaxpr's results are read by one after the last."""
  uses: dict[Any, set[int]] = {}
  for k, atoms in enumerate([*(eqn.invars for eqn in jaxpr.eqns), jaxpr.outvars]):
    for atom in _variables(atoms):
      uses.setdefault(atom, set()).add(k)
  return uses


def _members(jaxpr: Any, cuts: Collection[Any]) -> dict[Any, list[int]]:
  """The equations that make arrays out of one large one, by that one. A variable in `cuts` is made of nothing."""
  roots: dict[Any, Any] = {}  # variable -> the large one that it is made of
  members: dict[Any, list[int]] = {}
  for k, eqn in enumerate(jaxpr.eqns):
    if len(eqn.outvars) != 1 or not _fits(eqn) or eqn.outvars[0] in cuts:
      continue
    root = _root(_variables(eqn.invars), eqn.outvars[0], roots)
    if root is not None:
      roots[eqn.outvars[0]] = root
      members.setdefault(root, []).append(k)
  return members


def _root(operands: Sequence[Any], out: Any, roots: Mapping[Any, Any]) -> Any | None:
  """The one large variable that an equation's result is made of; `None` if there are several, or none.

  Masks from elsewhere, such as dropout's, are cheap to keep; so is what is small beside the rest.
  """
  made_of = {roots.get(atom, atom) for atom in operands if atom in roots or not _is_mask(atom)}
  size = max(map(_elements, [*made_of, out]))
  made_of = {atom for atom in made_of if _elements(atom) * SMALL > size}
  if len(made_of) != 1:
    return None
  (root,) = made_of
  return root if 1 < _elements(root) >= _elements(out) else None


class _Parts(NamedTuple):
  """Equations of one root.

  Attributes:
    apart: by what is used of them outside.
    shared: the variables that several of those results are made of.
  """

  apart: list[list[int]]
  shared: list[Any]


def _parts(jaxpr: Any, numbers: Sequence[int], uses: Mapping[Any, set[int]]) -> _Parts:
  """Equations of one root, apart by what is used of them outside."""
  ends: dict[int, set[int]] = {}  # equation -> the results that it serves
  for k in reversed(numbers):
    readers = uses.get(jaxpr.eqns[k].outvars[0], set())
    ends[k] = {k} if not readers or readers - set(numbers) else set()
    ends[k] = ends[k].union(*(ends[reader] for reader in readers if reader in ends))
  parts: dict[int, list[int]] = {}
  for k in numbers:
    parts.setdefault(min(ends[k]), []).append(k)
  return _Parts(list(parts.values()), [jaxpr.eqns[k].outvars[0] for k in numbers if len(ends[k]) > 1])


def _region(jaxpr: Any, root: Any, numbers: list[int], uses: Mapping[Any, set[int]]) -> Region | None:
  """The region of these equations, if they are worth it."""
  result = jaxpr.eqns[numbers[-1]].outvars[0]
  large = _elements(result) * SMALL > _elements(root)
  if not large or not _is_float(result) or not any(_keeps_results(jaxpr.eqns[k]) for k in numbers):
    return None
  made = [jaxpr.eqns[k].outvars[0] for k in numbers]
  inputs = dict.fromkeys(atom for k in numbers for atom in _variables(jaxpr.eqns[k].invars) if atom not in set(made))
  small = [var for var in made if _elements(var) * SMALL <= _elements(root) and _is_float(var)]
  return Region(tuple(jaxpr.eqns[k] for k in numbers), tuple(numbers), tuple(inputs), tuple(small), root)


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, Literal)]


def _elements(atom: Any) -> int:
  return elements(getattr(atom.aval, "shape", ()))


def _is_mask(atom: Any) -> bool:
  return getattr(atom.aval, "dtype", None) == jnp.bool_


def _is_float(atom: Any) -> bool:
  return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _fits(eqn: Any) -> bool:
  inner = _inside(eqn)
  return all(map(_fits, inner)) if inner else eqn.primitive.name in _INSIDE


def _keeps_results(eqn: Any) -> bool:
  return eqn.primitive.name in KEEPS_RESULT or any(map(_keeps_results, _inside(eqn)))


def _inside(eqn: Any) -> Sequence[Any]:
  """The equations of a jitted function, or of one with a derivative of its own."""
  inner = called(eqn)
  return () if inner is None else open_jaxpr(inner)[0].eqns
