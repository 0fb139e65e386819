"""The probe: learns from one abstract trace what each axis of each parameter is for.

The probe is a function of the parameters alone. Its jaxpr is interpreted with, for every value, what is known of it
(`Seen`): whether it is a rearranged parameter, which parameter axes its own axes index, and which parameter it was last
multiplied by. Nothing is computed.

Reading order: the study -> the handler.
"""

from collections.abc import Callable, Sequence
import dataclasses
import inspect
from typing import Any

import jax
import numpy as np

from jaxlora._adapt.evidence import INPUT, NONE, Evidence, Label, Seen, joined, unknown
from jaxlora._adapt.observer import Observer
from jaxlora._base.checks import is_foreign
from jaxlora._base.coded import is_coded, type_of_leaf
from jaxlora._jax.control_flow import Branches, Scan, Structure, Unreadable, While
from jaxlora._transform.interpreter import Handler, interpret


def study(probe: Callable[[Any], Any], params: Any) -> list[Evidence]:
  """Traces `probe(params)` abstractly and returns the evidence on each leaf, in flattening order.

  Arrays are traced; other leaves reach the probe as they are.

  Raises:
    TypeError: if the probe cannot be called with the parameters alone.
  """
  leaves, treedef = jax.tree_util.tree_flatten(params, is_leaf=is_coded)
  leaves = [*map(type_of_leaf, leaves)]
  arrays = {
    k: leaf
    for k, leaf in enumerate(leaves)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype") and not is_foreign(leaf)
  }

  def flat(arrays: dict[int, Any]) -> list[Any]:
    out = probe(jax.tree_util.tree_unflatten(treedef, [arrays.get(k, leaf) for k, leaf in enumerate(leaves)]))
    return [leaf for leaf in jax.tree_util.tree_leaves(out) if isinstance(leaf, (jax.Array, np.ndarray))]

  _check_callable(probe, params)
  try:
    traced = jax.make_jaxpr(flat)(arrays)
  except TypeError as error:
    if type(error) is not TypeError:  # JAX's own, which say what is wrong with the program
      raise
    raise TypeError(f"adapt: probe raised TypeError on the parameters: {error}; {_EXPECTED}") from error
  single = [frozenset(d for d, size in enumerate(np.shape(leaf)) if size == 1) for leaf in leaves]
  observer = Observer([Evidence(ndim=np.ndim(leaf), single=axes) for leaf, axes in zip(leaves, single, strict=True)])
  inputs = [
    Seen(leaf, tuple(frozenset({(leaf, d)}) for d in range(np.ndim(array))), NONE) for leaf, array in arrays.items()
  ]
  for out in interpret(traced, inputs, Probe(observer)):
    if len(out.last) == 1 and isinstance(only := next(iter(out.last)), int):
      observer.evidence[only].final = True
  return observer.evidence


_EXPECTED = "expected a function of the parameters alone, such as lambda p: model.apply({'params': p}, x)."


def _check_callable(probe: Any, params: Any) -> None:
  """Raises unless the probe can be called with the parameters, as far as its signature tells."""
  if not callable(probe):
    raise TypeError(f"adapt: probe is {probe!r}, {_EXPECTED}")
  try:
    signature = inspect.signature(probe)
  except (TypeError, ValueError):  # some callables have none to look at
    return
  try:
    signature.bind(params)
  except TypeError as error:
    raise TypeError(f"adapt: probe cannot be called with the parameters alone: {error}; {_EXPECTED}") from error


class Probe(Handler):
  """The handler of a probe's program: values are what is known of them, and control flow is entered with that."""

  def __init__(self, observer: Observer):
    self.observer = observer

  def literal(self, atom: Any) -> Seen:
    return unknown(atom.aval, NONE)

  def constant(self, var: Any, value: Any) -> Seen:
    return unknown(var.aval, INPUT if var.aval.shape else NONE)

  def primitive(self, eqn: Any, values: Sequence[Seen]) -> list[Seen]:
    return self.observer.observe(eqn, values)

  def unreadable(self, eqn: Any, values: Sequence[Seen], why: Unreadable) -> list[Seen]:
    return self.observer.elementwise(eqn, list(values))

  def control(self, eqn: Any, found: Structure, values: Sequence[Seen]) -> list[Seen]:
    if isinstance(found, Branches):
      branches = [interpret(jaxpr, values[1:], self) for jaxpr in found.branches]
      return [joined(group) for group in zip(*branches, strict=True)]
    if isinstance(found, Scan):
      return self._scan(found, values)
    if isinstance(found, While):
      first, last = found.condition_constants, found.condition_constants + found.body_constants
      _, carry = self._loop(found.body, values[first:last], values[last:], [])
      return carry
    return interpret(found.jaxpr, values, self)

  def _scan(self, scan: Scan, values: Sequence[Seen]) -> list[Seen]:
    first, last = scan.constants, scan.constants + scan.carries
    slices = []
    for x in values[last:]:
      if x.leaf is not None and not x.picked:
        chunked = frozenset[Label]().union(*x.axes[1:])  # an axis of which the slices have a part is none of a stack's
        self.observer.evidence[x.leaf].stacked |= {axis for _, axis in x.axes[0] - chunked}
      slices.append(dataclasses.replace(x, axes=x.axes[1:]))
    out, carry = self._loop(scan.jaxpr, values[:first], values[first:last], slices)
    return [*carry, *(dataclasses.replace(y, leaf=None, axes=(NONE, *y.axes)) for y in out[scan.carries :])]

  def _loop(
    self, jaxpr: Any, consts: Sequence[Seen], carry: Sequence[Seen], slices: Sequence[Seen]
  ) -> tuple[list[Seen], list[Seen]]:
    """A body, run until nothing more is learnt of its carry; that takes few rounds, as knowledge only grows or goes."""
    carry = list(carry)
    while True:
      out = interpret(jaxpr, [*consts, *carry, *slices], self)
      new = [joined(pair) for pair in zip(carry, out, strict=False)]
      if new == carry:
        return out, carry
      carry = new
