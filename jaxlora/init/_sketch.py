"""Sketches of the inputs of adapted weights, taken as a function runs forward.

For an input x of a product with a weight that has the factor A, the sketch is

    A (x^T x) = d/dA  1/2 ||x A^T||^2

summed over every use of the weight. So the handler adds up one number, half the squared norms of all the thin products
x A^T, and the gradient with respect to every A is its sketch, whatever lies between the weight and its products:
transposes, slices, casts, scanned layers. The gradient of each term is formed where the term is, and is as small as A:
no input outlives its product, and no backward pass runs through the function.

The function is taken as that of the bases alone. Reading order: one term -> the handler -> the sketches.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
from typing import Any, ClassVar

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.coded import is_coded
from jaxlora._base.paths import flatten
from jaxlora._jax.control_flow import Jit, Remat, ShardMap, Structure, While
from jaxlora._platform.policy import NONE
from jaxlora._transform.coded import Coded
from jaxlora._transform.control import CONTROL, Rebuild, inlined
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, weights_in
from jaxlora._transform.frozen import FrozenWeight, stand_in
from jaxlora._transform.interpreter import interpret
from jaxlora._transform.record import Record
from jaxlora._transform.rule import PRODUCTS, find_rule
from jaxlora._transform.transform import Transform
from jaxlora._weight.roles import factor_shape
from jaxlora._weight.weight import FullWeight, LoraWeight, is_leaf_node


@dataclasses.dataclass
class Seen:
  """What happened to the weights, by path: those whose input was seen, and why those that were not."""

  inputs: set[str] = dataclasses.field(default_factory=set)
  reasons: dict[str, str] = dataclasses.field(default_factory=dict)


# ----------------------------------------------------------------------------------------------------------------------
# One term.


def energy_of(product: Callable[..., Any], x: jax.Array, a: jax.Array, *rest: jax.Array) -> jax.Array:
  """Half the squared norm of a thin product, with a gradient that is there before anything asks for it."""

  def thin(x: jax.Array, a: jax.Array, rest: Sequence[jax.Array]) -> jax.Array:
    (h,) = jax.tree.leaves(product(x, a, *rest))
    return h

  @jax.custom_vjp
  def energy(x, a, rest):
    h = thin(x, a, rest).astype(jnp.float32)
    return jnp.sum(h * h) / 2

  def forward(x, a, rest):
    h, transpose = jax.vjp(lambda a: thin(x, a, rest), a)
    return energy(x, a, rest), transpose(h)[0]

  def backward(sketch, cotangent):
    return None, sketch * cotangent.astype(sketch.dtype), None

  energy.defvjp(forward, backward)
  return energy(lax.stop_gradient(x), a, rest)


# ----------------------------------------------------------------------------------------------------------------------
# The handler.


class Sketch(Transform):
  """The transform of the bases alone, which adds up a term for each product that shows a weight's input.

  Attributes:
    seen: takes down which weights' inputs were seen.
    total: the sum of the terms, over all that runs.
  """

  controls: ClassVar[Mapping[type, Rebuild]] = {**CONTROL, Jit: inlined, Remat: inlined}
  refused: ClassVar[Mapping[type, str]] = {
    While: "a loop of unknown length shows nothing of its inside",
    ShardMap: "a shard_map shows nothing of its inside",
  }

  def __init__(self, record: Record, seen: Seen):
    super().__init__(record)
    self.seen = seen
    self.total = jnp.zeros((), jnp.float32)

  def within(self, record: Record) -> "Sketch":
    return Sketch(record, self.seen)

  def sums(self) -> list[jax.Array]:
    return [self.total]

  def add_sums(self, sums: Sequence[jax.Array]) -> None:
    for term in sums:
      self.total = self.total + term

  def control(self, eqn: Any, found: Structure, values: Sequence[Any]) -> list[Any]:
    if type(found) in self.refused:
      raise Unfactorable(self.refused[type(found)])
    return super().control(eqn, found, values)

  def materialized(self, value: Any, eqn: Any, reason: str) -> Any:
    """The base in a weight's place: what the weight meets from here on is not seen."""
    if not isinstance(value, Factored):
      return super().materialized(value, eqn, reason)
    source = self.record.source(eqn) or "an unknown line"
    self.seen.reasons.setdefault(value.path, f"{reason} (`{eqn.primitive.name}` at {source})")
    return value.base.dequantize() if isinstance(value.base, Coded) else value.base

  def primitive(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
    if isinstance(weights_in(values)[0], FrozenWeight):
      return super().primitive(eqn, values)
    rule, known = find_rule(eqn.primitive.name, values)
    w, terms = weights_in(known)[0], []

    def shrink(product: Callable[..., Any], x: jax.Array, a: jax.Array, recipe: Any, *rest: jax.Array) -> Any:
      del recipe
      terms.append(energy_of(product, x, a, *rest))
      return product(x, a, *rest)

    out = rule(self.op(eqn, w, lambda note: None, shrink), known)
    if terms:
      self.seen.inputs.add(w.path)
      self.add_sums(terms)
      return self.bound(eqn, w, *(v.base if isinstance(v, TracedWeight) else v for v in values))  # B is zero
    if eqn.primitive.name in PRODUCTS and not weights_in(out):
      raise Unfactorable("a lookup, or a product that meets the output axes first, has no input to see")
    return out


# ----------------------------------------------------------------------------------------------------------------------
# The sketches.


def sketcher(fn: Callable[..., Any], seen: Seen) -> Callable[[dict[str, jax.Array], Any, Any], dict[str, jax.Array]]:
  """A function from an A for each adapted weight, the tree and a batch, to the sketches `A (x^T x)`, by path.

  Args:
    fn: `(params, batch) -> anything`.
    seen: takes down, while the function is traced, which weights' inputs were seen.
  """

  def energy(factors: dict[str, jax.Array], tree: Any, batch: Any) -> jax.Array:
    nodes, treedef = flatten(tree, is_leaf=is_leaf_node)
    values = [_traced_value(path, node, factors) for path, node in nodes]
    plain = [stand_in(value) for value in values]
    traced = jax.make_jaxpr(fn)(jax.tree_util.tree_unflatten(treedef, plain), batch)
    handler = Sketch(Record("ignore", set(), NONE), seen)
    interpret(traced, [*values, *jax.tree.leaves(batch)], handler)
    return handler.total

  return jax.grad(energy)


def _traced_value(path: str, node: Any, factors: dict[str, jax.Array]) -> Any:
  """Converts a leaf of the tree to its traced value, with the A to sketch with, and B zero."""
  if isinstance(node, FullWeight):
    return node.value
  if is_coded(node):
    return FrozenWeight.of(Coded(lax.stop_gradient(node)), path)
  if not isinstance(node, LoraWeight):
    return node
  a, base = factors[path], lax.stop_gradient(node.base)
  rank = a.shape[node.roles.count("s")]
  b = jnp.zeros(factor_shape(tuple(base.shape), node.roles, "o", rank), a.dtype)
  base = Coded(base) if is_coded(base) else base
  return Factored(base, a, b, gain=None, key=None, roles=node.roles, dropout=0.0, path=path)
