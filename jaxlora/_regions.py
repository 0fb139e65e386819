"""Parts of a program that differentiation had better see as one: a norm, a softmax, a gelu written out.

Each is some equations that make one large array out of one other, elementwise or along whole rows. Differentiated
equation by equation they would keep several arrays of that size for the backward pass; the one they start from, and the
statistics of its rows, are enough. For a softmax even the one that they end with is enough, which the next product
keeps anyway. What is linear in a region's result, the first halves of adapted products, is differentiated with it.

Reading order: finding them -> evaluating one -> its derivative.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
import dataclasses
import functools
import math
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero
import jax.numpy as jnp

from jaxlora import _compat, _recompute

# What may be inside of a region besides elementwise operations.
_ALONG_ROWS = {"reduce_sum", "reduce_max", "reduce_min"}
# Not names: a policy of `jax.checkpoint` is to find them.
_INSIDE = (_recompute.ELEMENTWISE | _ALONG_ROWS) - {"name"}


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
      operands = [atom.val if isinstance(atom, _compat.Literal) else env[atom] for atom in eqn.invars]
      with _compat.equation_context(eqn, named=False):
        env.update(zip(eqn.outvars, _evaluate(eqn, operands, instead or {}), strict=True))
    return env

  def signature(self) -> Hashable:
    """The same for regions that are the same but for their variables."""
    number = {var: k for k, var in enumerate(self.inputs)}

    def of(atom: Any) -> Hashable:
      if isinstance(atom, _compat.Literal):
        return str(atom.aval), repr(atom.val)
      return number.setdefault(atom, len(number))

    equations = tuple(
      (
        eqn.primitive,
        tuple(sorted(eqn.params.items())),
        tuple(map(of, (*eqn.invars, *eqn.outvars))),
        tuple(var.aval for var in eqn.outvars),
        _compat.context_key(eqn),
      )
      for eqn in self.equations
    )
    return (
      equations,
      tuple(var.aval for var in self.inputs),
      number[self.root],
      tuple(number[var] for var in self.small),
    )

  def softmax(self) -> tuple[Any, Any] | None:
    """Numerator and denominator, where the result is a large exponential over something small."""
    eqn = self.equations[-1]
    if eqn.primitive.name != "div" or any(isinstance(atom, _compat.Literal) for atom in eqn.invars):
      return None
    over, under = eqn.invars
    exponentials = (eqn.outvars[0] for eqn in self.equations if eqn.primitive.name == "exp")
    return (over, under) if under in self.small and over in exponentials else None


def _evaluate(eqn: Any, operands: Sequence[Any], instead: Mapping[Any, Any]) -> list[Any]:
  """The results of one equation; those in `instead` have that value, but the derivative that they would have."""
  if eqn.primitive.name == "exp" and eqn.outvars[0] in instead:  # whose derivative is made of its value
    return [_exp_with_value(operands[0], instead[eqn.outvars[0]])]
  made = zip(eqn.outvars, _compat.bind(eqn, operands), strict=True)
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


# ----------------------------------------------------------------------------------------------------------------------
# Finding them.


def find(jaxpr: Any) -> dict[int, Region]:
  """The regions of a jaxpr of which differentiation would keep more than their inputs; by every member's number."""
  roots: dict[Any, Any] = {}  # variable -> the large one that it is made of
  members: dict[Any, list[int]] = {}
  uses: dict[Any, set[int]] = {}
  for k, eqn in enumerate(jaxpr.eqns):
    operands = _variables(eqn.invars)
    for atom in operands:
      uses.setdefault(atom, set()).add(k)
    if len(eqn.outvars) == 1 and _fits(eqn) and (root := _root(operands, eqn.outvars[0], roots)) is not None:
      roots[eqn.outvars[0]] = root
      members.setdefault(root, []).append(k)
  for atom in _variables(jaxpr.outvars):
    uses.setdefault(atom, set()).add(len(jaxpr.eqns))
  found = (
    _region(jaxpr, root, part, uses) for root, numbers in members.items() for part in _parts(jaxpr, numbers, uses)
  )
  return {k: region for region in found if region is not None for k in region.members}


def _root(operands: Sequence[Any], out: Any, roots: Mapping[Any, Any]) -> Any | None:
  """The one large variable that an equation's result is made of; `None` if there are several, or none.

  Masks from elsewhere, such as dropout's, are cheap to keep; so is what is small beside the rest.
  """
  made_of = {roots.get(atom, atom) for atom in operands if atom in roots or not _is_mask(atom)}
  size = max(map(_elements, [*made_of, out]))
  made_of = {atom for atom in made_of if _elements(atom) * _recompute.SMALL > size}
  if len(made_of) != 1:
    return None
  (root,) = made_of
  return root if 1 < _elements(root) >= _elements(out) else None


def _parts(jaxpr: Any, numbers: Sequence[int], uses: Mapping[Any, set[int]]) -> list[list[int]]:
  """Equations of one root, apart by what is used of them outside; those that two results share are in no part."""
  ends: dict[int, set[int]] = {}  # equation -> the results that it serves
  for k in reversed(numbers):
    readers = uses.get(jaxpr.eqns[k].outvars[0], set())
    ends[k] = {k} if not readers or readers - set(numbers) else set()
    ends[k] = ends[k].union(*(ends[reader] for reader in readers if reader in ends))
  parts: dict[int, list[int]] = {}
  for k in numbers:
    if len(ends[k]) == 1:
      parts.setdefault(next(iter(ends[k])), []).append(k)
  shared = {end for k in numbers if len(ends[k]) > 1 for end in ends[k]}
  return [part for end, part in parts.items() if end not in shared]


def _region(jaxpr: Any, root: Any, numbers: list[int], uses: Mapping[Any, set[int]]) -> Region | None:
  """The region of these equations, if they are worth it."""
  result = jaxpr.eqns[numbers[-1]].outvars[0]
  large = _elements(result) * _recompute.SMALL > _elements(root)
  if not large or not _is_float(result) or not any(_keeps_results(jaxpr.eqns[k]) for k in numbers):
    return None
  made = [jaxpr.eqns[k].outvars[0] for k in numbers]
  inputs = dict.fromkeys(atom for k in numbers for atom in _variables(jaxpr.eqns[k].invars) if atom not in set(made))
  small = [var for var in made if _elements(var) * _recompute.SMALL <= _elements(root) and _is_float(var)]
  return Region(tuple(jaxpr.eqns[k] for k in numbers), tuple(numbers), tuple(inputs), tuple(small), root)


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, _compat.Literal)]


def _elements(atom: Any) -> int:
  return math.prod(getattr(atom.aval, "shape", ()))


def _is_mask(atom: Any) -> bool:
  return getattr(atom.aval, "dtype", None) == jnp.bool_


def _is_float(atom: Any) -> bool:
  return jnp.issubdtype(atom.aval.dtype, jnp.floating)


def _fits(eqn: Any) -> bool:
  inner = _inside(eqn)
  return all(map(_fits, inner)) if inner else eqn.primitive.name in _INSIDE


def _keeps_results(eqn: Any) -> bool:
  return eqn.primitive.name in _recompute.KEEPS_RESULT or any(map(_keeps_results, _inside(eqn)))


def _inside(eqn: Any) -> Sequence[Any]:
  """The equations of a jitted function, or of one with a derivative of its own."""
  inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
  called = eqn.primitive.name in ("jit", "pjit", "custom_jvp_call") and inner is not None
  return _compat.open_jaxpr(inner)[0].eqns if called else ()


# ----------------------------------------------------------------------------------------------------------------------
# Its derivative.


def light(
  region: Region, values: Sequence[Any], taps: Callable[[Any, Any], Any], factors: Sequence[Any]
) -> tuple[Any, Any, Any]:
  """A region, of which the backward pass keeps little, together with what is linear in its result.

  The derivative makes the result again once, for the region's own sake and for the taps'.

  Args:
    region: what to evaluate.
    values: of its inputs.
    taps: `taps(result, factors)`, bilinear.
    factors: arrays, perhaps none.

  Returns:
    The result; the small variables, as constants; `taps(result, factors)`.
  """
  with _compat.equation_context(region.equations[-1]):
    return _compat.traced_once(_Light(_Comparable(region), taps), list(values), list(factors))


class _Comparable:
  """A region as a value: equal to every other one with its signature."""

  def __init__(self, region: Region):
    self.region = region
    self.signature = region.signature()
    try:
      self.hash = hash(self.signature)
    except TypeError:  # a parameter that cannot be compared: it is like no other
      self.signature = object()
      self.hash = hash(self.signature)

  def __eq__(self, other: Any) -> bool:
    return isinstance(other, _Comparable) and self.signature == other.signature

  def __hash__(self) -> int:
    return self.hash


@dataclasses.dataclass(frozen=True)
class _Light:
  """See `light`."""

  comparable: _Comparable
  taps: Callable[[Any, Any], Any]

  def __call__(self, values: list[Any], factors: list[Any]) -> tuple[Any, Any, Any]:
    region, taps = self.comparable.region, self.taps
    place = region.inputs.index(region.root)

    @jax.custom_jvp
    def call(values, factors):
      env = region.evaluate(values)
      return env[region.result], [env[var] for var in region.small], taps(env[region.result], factors)

    def jvp(primals, tangents):
      result, small, tapped = call(*primals)
      values, factors = primals
      moving = [[k for k, step in enumerate(steps) if not isinstance(step, SymbolicZero)] for steps in tangents]
      steps = [[steps[k] for k in numbers] for steps, numbers in zip(tangents, moving, strict=True)]
      along = _along(region, taps, *moving, from_result=True)
      kept = (values, factors, small, result)
      if not region.softmax() or _recompute.uses(along, kept, steps)[place]:
        along = _along(region, taps, *moving, from_result=False)
      d_result, d_tapped = _recompute.late(along, kept, steps)
      if d_result is None:
        return (result, small, tapped), (*jax.tree.map(_standing_still, (result, small)), d_tapped)
      return (result, small, tapped), (d_result, _of_small(region, values, moving[0], steps[0]), d_tapped)

    call.defjvp(jvp, symbolic_zeros=True)
    result, small, tapped = call(values, factors)
    return result, list(map(jax.lax.stop_gradient, small)), tapped


def _standing_still(value: Any) -> SymbolicZero:
  return SymbolicZero(jax.typeof(value))


def _of_small(region: Region, values: Sequence[Any], inputs: Sequence[int], steps: Sequence[Any]) -> list[Any]:
  """The derivative of the small variables, of which only second derivatives make use."""

  def small(*some):
    env = region.evaluate(_with(values, inputs, some))
    return [env[var] for var in region.small]

  return jax.jvp(small, [values[k] for k in inputs], list(steps))[1]


def _along(
  region: Region, taps: Callable[[Any, Any], Any], inputs: Sequence[int], factors: Sequence[int], *, from_result: bool
) -> Callable[[Any, Any], Any]:
  """The derivative as a function of what is kept, and of the tangents of the numbered inputs and factors.

  d taps = taps(d result, factors) + taps(result again, d factors)
  """

  def along(kept, steps):
    values, all_factors, small, result = kept
    instead = dict(zip(region.small, small, strict=True))
    if from_result and (parts := region.softmax()):
      over, under = parts
      instead[over] = result * instead[under]

    def of_inputs(*some):
      return region.evaluate(_with(values, inputs, some), instead)[region.result]

    start = [values[k] for k in inputs]
    again, d_result = jax.jvp(of_inputs, start, list(steps[0])) if inputs else (of_inputs(), None)
    terms = [taps(d_result, all_factors)] if inputs else []
    if factors:
      terms.append(taps(again, _with(list(map(jnp.zeros_like, all_factors)), factors, steps[1])))
    return d_result, jax.tree.map(lambda *parts: functools.reduce(jnp.add, parts), *terms)

  return along


def _with(values: Sequence[Any], numbers: Sequence[int], some: Sequence[Any]) -> list[Any]:
  """The values, with others in the numbered places."""
  out = list(values)
  for k, value in zip(numbers, some, strict=True):
    out[k] = value
  return out


def again(region: Region) -> Callable[[Sequence[Any]], Any]:
  """The result again, from the inputs and the small variables."""
  split = len(region.inputs)

  def make(operands: Sequence[Any]) -> Any:
    instead = dict(zip(region.small, operands[split:], strict=True))
    return region.evaluate(operands[:split], instead)[region.result]

  return make
