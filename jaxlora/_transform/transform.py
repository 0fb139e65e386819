"""The transform: the handler that keeps adapted weights factored through a program.

An equation that no weight reaches is bound again unchanged; where one does, the rule of its primitive says what becomes
of it; control flow is rebuilt with the public calls that made it. What no rule can do is done on the materialised
weight, and reported.
"""

from collections.abc import Callable, Mapping, Sequence
import functools
from typing import Any, ClassVar

import jax

from jaxlora._jax.control_flow import Structure, Unreadable
from jaxlora._jax.jaxpr import bind, equation_context
from jaxlora._platform.recipes import REGION, Origins
from jaxlora._platform.region_derivative import Comparable, evaluate_region, is_norm, rematerialised
from jaxlora._transform.coded import Coded
from jaxlora._transform.coded_equations import bind_coded
from jaxlora._transform.control import CONTROL, Rebuild
from jaxlora._transform.factored import TracedWeight, Unfactorable, weights_in
from jaxlora._transform.frozen import FrozenWeight, stand_in
from jaxlora._transform.interpreter import Handler, RegionEquation, Step, interpret, plan
from jaxlora._transform.meetings import side_met
from jaxlora._transform.products import Products, evaluate_products
from jaxlora._transform.record import Record
from jaxlora._transform.rule import AHEAD, HOLDS_ITS_OWN, PRODUCTS, Ahead, Op, ShrinkBy, find_rule
from jaxlora._transform.thin import Shrinks
from jaxlora._transform.thin_derivative import shrink_by


class Transform(Handler):
  """The handler of one program, with the record of the call that it is a part of.

  Attributes:
    record: see there.
    controls: how control flow is rebuilt, by what it holds; what is not in it needs arrays.
  """

  controls: ClassVar[Mapping[type, Rebuild]] = CONTROL

  def __init__(self, record: Record):
    self.record = record
    self._origins = Origins(record.policy.wait)
    self._ahead: dict[int, jax.Array] = {}  # by an equation's identity: its product, computed ahead

  def within(self, record: Record) -> "Transform":
    """The handler of a program inside this one."""
    return type(self)(record)

  def inner(self, jaxpr: Any, record: Record | None = None) -> Callable[..., list[Any]]:
    """An inner jaxpr as a function of values: its results, then this kind of handler's sums over the program."""

    def call(*values: Any) -> list[Any]:
      handler = self.within(record or self.record)
      return [*interpret(jaxpr, values, handler), *handler.sums()]

    return call

  def called(self, fn: Callable[..., Any], *values: Any) -> list[Any]:
    """`fn` of values, some of which may be weights, in a loop: its program is traced on arrays, and interpreted."""
    traced = jax.make_jaxpr(fn)(*map(stand_in, values))
    with self.record.in_a_loop():
      return interpret(traced, values, self.within(self.record))

  def sums(self) -> list[jax.Array]:
    """Arrays that are summed over all that runs, loops and branches included: inner programs have them as results."""
    return []

  def add_sums(self, sums: Sequence[jax.Array]) -> None:
    """Takes the sums of an inner program."""
    del sums

  def plan(self, jaxpr: Any) -> list[Step]:
    return plan(jaxpr, self.record.policy.regions(jaxpr))

  def equation(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
    with equation_context(eqn):
      if not weights_in(values):
        return self._plain(eqn, values)
      try:
        return super().equation(eqn, values)
      except Unfactorable as why:
        return bind(eqn, [self.materialized(value, eqn, str(why)) for value in values])

  def _plain(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
    """An equation that no weight reaches."""
    name, again = eqn.primitive.name, functools.partial(bind, eqn)
    if name in self.record.rewrites:
      return self.record.rewrites[name](again, values)
    out = bind(eqn, values)
    self._origins.note(name, again, values, out)
    return out

  def materialized(self, value: Any, eqn: Any, reason: str) -> Any:
    """A weight as one array, with a report; other values as they are."""
    if not isinstance(value, TracedWeight):
      return value
    return self.record.materialize(value, eqn.primitive.name, self.record.source(eqn), reason)

  def dequantized(self, w: TracedWeight, eqn: Any, reason: str) -> Any:
    """A weight with its codes as floats, with a report; one without an adapter is an array then."""
    array = self.record.dequantized(w, w.base, eqn.primitive.name, self.record.source(eqn), reason)
    return array if isinstance(w, FrozenWeight) else w.replace(base=array)

  def control(self, eqn: Any, found: Structure, values: Sequence[Any]) -> list[Any]:
    if type(found) not in self.controls:
      raise Unfactorable(HOLDS_ITS_OWN)
    entering = [value.into(found, k) if isinstance(value, TracedWeight) else value for k, value in enumerate(values)]
    with self.record.enclosed_by(eqn):
      out = self.controls[type(found)](self, eqn, found, entering)
    count = len(eqn.outvars)
    self.add_sums(out[count:])
    return list(out[:count])

  def unreadable(self, eqn: Any, values: Sequence[Any], why: Unreadable) -> list[Any]:
    raise Unfactorable(str(why)) from why

  def primitive(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
    rule, known = find_rule(eqn.primitive.name, values)
    if eqn.primitive.name in PRODUCTS:
      known = [value.together() if isinstance(value, TracedWeight) else value for value in known]
    ways: list[str] = []
    w = weights_in(known)[0]
    out = rule(self.op(eqn, w, ways.append, shrink_by), known)
    if eqn.primitive.name in PRODUCTS and not weights_in(out):
      met = side_met(eqn, known, w)
      self.record.used(w, eqn.primitive.name, self.record.source(eqn), next(iter(ways), ""), met)
    return out

  def op(self, eqn: Any, w: TracedWeight, note: Callable[[str], None], shrink: ShrinkBy) -> Op:
    """The equation as its rule sees it."""
    policy = self.record.policy
    return Op(
      primitive=eqn.primitive,
      params=eqn.params,
      bind=functools.partial(self.bound, eqn, w),
      result=eqn.outvars[0].aval,
      use=self.record.products[w.path],
      recipe=self._origins.recipe if policy.rematerialises else lambda value: None,
      policy=policy,
      looping=self.record.looping,
      shrink=shrink,
      ahead=self._ahead.pop(id(eqn), None),
      note=note,
      formed=lambda value: value.dequantize(policy) if isinstance(value, Coded) else value,
    )

  def bound(self, eqn: Any, w: TracedWeight, *args: Any, **changes: Any) -> list[Any]:
    """The equation on other operands, which may be coded values."""
    if not any(isinstance(arg, Coded) for arg in args):
      return bind(eqn, args, **changes)
    form = lambda value, reason: self.record.dequantized(w, value, eqn.primitive.name, self.record.source(eqn), reason)
    return bind_coded(eqn, {**eqn.params, **changes}, args, self.record.policy, self.record.looping, form)

  def region(self, equation: RegionEquation, values: Sequence[Any]) -> list[Any]:
    region = equation.region
    inputs, weights = values[: len(region.inputs)], values[len(region.inputs) :]
    if weights_in(inputs):  # an elementwise function of a weight itself
      return super().region(equation, inputs)
    found = self._products(equation, weights)
    each, known = tuple(product for product, _ in found.values()), [weight for _, weight in found.values()]
    shrinks = Shrinks(tuple(product.shrink for product in each))
    out, small, thin = evaluate_region(region, inputs, shrinks, [a for _, a, _ in known], self.record.policy)
    if found:
      norm, sources = (Comparable(region), [*inputs, *small]) if is_norm(region) else (None, [])
      self._ahead.update(zip(found, evaluate_products(Products(each, norm), out, thin, known, sources), strict=True))
    make = rematerialised(region)
    self._origins.note(REGION, lambda operands: [make(operands)], [*inputs, *small], [out])
    return [out]

  def _products(self, equation: RegionEquation, weights: Sequence[Any]) -> dict[int, Any]:
    """The adapted products of a region's result, by their equations' identity: each with its base, A and B."""
    found = {}
    for (eqn, weight_first), w in zip(equation.products, weights, strict=True):
      if isinstance(w, TracedWeight) and type(w) in AHEAD:
        x, out = eqn.invars[1 if weight_first else 0].aval, eqn.outvars[0].aval
        how = self.record.policy, self.record.looping
        given = Ahead(eqn.primitive, eqn.params, w.together(), weight_first, x, out, *how)
        if (ahead := AHEAD[type(w)](given)) is not None:
          found[id(eqn)] = ahead
    return found
