"""The interpreter: the one walk over a jaxpr, whatever its values are.

    interpret(jaxpr, values, handler)

evaluates the equations in order and asks the handler what becomes of each. The transform (`transform.py`), the probe of
`adapt` and the input sketches of `init_from_data` are handlers. Regions are planned before the walk, and are one
equation in it.

Reading order: the plan -> the handler -> the walk.
"""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
from typing import Any

from jaxlora._jax.control_flow import Structure, Unreadable, structure
from jaxlora._jax.jaxpr import Literal, open_jaxpr
from jaxlora._platform.regions import Region

# ----------------------------------------------------------------------------------------------------------------------
# The plan.


@dataclasses.dataclass(frozen=True)
class RegionEquation:
  """A region as one equation.

  Attributes:
    region: its equations.
    products: the matrix products that read its result, each with whether the result is the right operand. Their other
      operands are known by the time the region is evaluated.
    invars: the region's inputs, then the other operand of each product.
    outvars: the region's result.
  """

  region: Region
  products: tuple[tuple[Any, bool], ...]
  invars: tuple[Any, ...]
  outvars: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Step:
  """An equation, or a region; and the variables that nothing after it reads, so that their values may go."""

  equation: Any
  freed: tuple[Any, ...]


def plan(jaxpr: Any, regions: Mapping[int, Region]) -> list[Step]:
  """The steps that evaluate a jaxpr: its equations in order, each region in the place of its last one."""
  ordered = [regions.get(k, eqn) for k, eqn in enumerate(jaxpr.eqns) if k not in regions or k == regions[k].members[-1]]
  readers = _products_of([region.result for region in regions.values()], jaxpr)
  known = {*jaxpr.constvars, *jaxpr.invars}
  equations = []
  for item in ordered:
    equation = _as_equation(item, readers, known) if isinstance(item, Region) else item
    known.update(equation.outvars)
    equations.append(equation)
  freed = _last_uses(equations, jaxpr.outvars)
  return [Step(equation, tuple(freed[k])) for k, equation in enumerate(equations)]


def _products_of(results: Sequence[Any], jaxpr: Any) -> dict[Any, list[Any]]:
  """The matrix products that have one of these variables, and another one, as operands."""
  products: dict[Any, list[Any]] = {result: [] for result in results}
  for eqn in jaxpr.eqns if products else ():
    if eqn.primitive.name == "dot_general" and eqn.invars[0] is not eqn.invars[1]:
      for atom in _variables(eqn.invars):
        if atom in products:
          products[atom].append(eqn)
  return products


def _as_equation(region: Region, readers: Mapping[Any, list[Any]], known: set[Any]) -> RegionEquation:
  products, others = [], []
  for eqn in readers[region.result]:
    weight_first = eqn.invars[1] is region.result
    other = eqn.invars[0 if weight_first else 1]
    if not isinstance(other, Literal) and other in known:
      products.append((eqn, weight_first))
      others.append(other)
  return RegionEquation(region, tuple(products), (*region.inputs, *others), (region.result,))


def _last_uses(equations: Sequence[Any], results: Sequence[Any]) -> dict[int, list[Any]]:
  """Number of a step -> the variables that it is the last one to read."""
  last = {atom: k for k, equation in enumerate(equations) for atom in _variables(equation.invars)}
  for atom in _variables(results):
    last.pop(atom, None)
  freed: dict[int, list[Any]] = collections.defaultdict(list)
  for atom, k in last.items():
    freed[k].append(atom)
  return freed


def _variables(atoms: Sequence[Any]) -> list[Any]:
  return [atom for atom in atoms if not isinstance(atom, Literal)]


# ----------------------------------------------------------------------------------------------------------------------
# The handler.


class Handler:
  """What becomes of the equations of one program. Values are the handler's own: arrays, traced weights, what is known.

  A handler gives `control` and `primitive`; the rest has defaults.
  """

  def plan(self, jaxpr: Any) -> list[Step]:
    """The steps that evaluate a jaxpr."""
    return plan(jaxpr, {})

  def literal(self, atom: Any) -> Any:
    """The value of a literal."""
    return atom.val

  def constant(self, var: Any, value: Any) -> Any:
    """The value of a variable that the jaxpr has closed over."""
    del var
    return value

  def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of an equation."""
    try:
      found = structure(eqn)
    except Unreadable as why:
      return self.unreadable(eqn, values, why)
    return self.primitive(eqn, values) if found is None else self.control(eqn, found, values)

  def region(self, equation: RegionEquation, values: Sequence[Any]) -> list[Any]:
    """The results of a region: those of its equations, one by one."""
    env = dict(zip(equation.region.inputs, values, strict=False))
    for eqn in equation.region.equations:
      operands = [self.literal(atom) if isinstance(atom, Literal) else env[atom] for atom in eqn.invars]
      env.update(zip(eqn.outvars, self.equation(eqn, operands), strict=True))
    return [env[equation.region.result]]

  def control(self, eqn: Any, found: Structure, values: Sequence[Any]) -> list[Any]:
    """The results of control flow."""
    raise NotImplementedError

  def primitive(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """The results of any other equation."""
    raise NotImplementedError

  def unreadable(self, eqn: Any, values: Sequence[Any], why: Unreadable) -> list[Any]:
    """The results of control flow whose parameters this version of JAX describes in an unknown way."""
    raise why


# ----------------------------------------------------------------------------------------------------------------------
# The walk.


def interpret(jaxpr: Any, values: Sequence[Any], handler: Handler) -> list[Any]:
  """Evaluates a jaxpr on the handler's values, and returns its results.

  Args:
    jaxpr: closed, or open without constants.
    values: of its arguments.
    handler: says what becomes of each equation; one for each walk, where it keeps something of the program.
  """
  inner, consts = open_jaxpr(jaxpr)
  env = {var: handler.constant(var, value) for var, value in zip(inner.constvars, consts, strict=True)}
  env.update(zip(inner.invars, values, strict=True))

  def read(atom: Any) -> Any:
    return handler.literal(atom) if isinstance(atom, Literal) else env[atom]

  for step in handler.plan(inner):
    equation = step.equation
    evaluate = handler.region if isinstance(equation, RegionEquation) else handler.equation
    env.update(zip(equation.outvars, evaluate(equation, [read(atom) for atom in equation.invars]), strict=True))
    for var in step.freed:
      env.pop(var, None)
  return [read(atom) for atom in inner.outvars]
