"""Rules: what an equation means for a traced weight.

A rule takes the equation as an `Op` and its operands, of which at least one is a weight of the kind that the rule is
for, and returns the results, which may be weights in turn. What it cannot do in factored form it refuses with
`Unfactorable` and a reason; the transform then materialises. Rules use public JAX alone.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlora._jax.marked_call import NAME
from jaxlora._platform.policy import Policy
from jaxlora._platform.recipes import Recipe
from jaxlora._transform.factored import Factored, TracedWeight, Unfactorable, weights_in

# `h = product(x, a, *rest)` for `shrink(product, x, a, recipe, *rest)`: the first thin product, bilinear in x and a.
ShrinkBy = Callable[..., Any]


class Op(NamedTuple):
  """An equation as its rule sees it.

  Attributes:
    primitive: of the equation.
    params: its parameters.
    bind: the same primitive on other operands, its parameters the same but for those given.
    result: the type of the equation's first result.
    use: how many products this weight went through before: picks its dropout mask.
    recipe: how to rematerialise an operand in the backward pass; `None` where it is kept.
    policy: how the compiler likes products written.
    looping: whether the equation is inside the body of a loop.
    shrink: computes a first thin product.
    ahead: the product, without a gain, where it was computed ahead.
    note: takes down a word on how the product was computed, for `explain`.
    formed: the array of a coded value, where a rule needs one; any other value as it is.
  """

  primitive: Any
  params: dict[str, Any]
  bind: Callable[..., list[Any]]
  result: Any
  use: int
  recipe: Callable[[Any], Recipe | None]
  policy: Policy
  looping: bool
  shrink: ShrinkBy
  ahead: Any
  note: Callable[[str], None]
  formed: Callable[[Any], Any]


class Ahead(NamedTuple):
  """A `dot_general` that may be computed ahead of its place, together with others of the same input.

  Attributes:
    primitive, params: of the equation.
    w: the weight.
    weight_first: whether it is the left operand.
    x, out: the types of the other operand and of the result.
    policy, looping: as in `Op`.
  """

  primitive: Any
  params: dict[str, Any]
  w: Any
  weight_first: bool
  x: Any
  out: Any
  policy: Policy
  looping: bool


Rule = Callable[[Op, Sequence[Any]], list[Any]]
RULES: dict[type[TracedWeight], dict[str, Rule]] = {}
# By kind of weight: from an `Ahead` to the product, and its base, A and B; `None` where it may not be ahead.
AHEAD: dict[type[TracedWeight], Callable[[Ahead], tuple[Any, Any] | None]] = {}

# Rules whose result holds the product of the weight with something; the others only rearrange the weight.
PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general", NAME, "gather")


def rule(*names: str, kind: type[TracedWeight] = Factored) -> Callable[[Rule], Rule]:
  """Registers a rule for these primitives and one kind of weight."""

  def register(fn: Rule) -> Rule:
    RULES.setdefault(kind, {}).update(dict.fromkeys(names, fn))
    return fn

  return register


def find_rule(name: str, values: Sequence[Any]) -> tuple[Rule, list[Any]]:
  """The rule of a primitive for the weights among its operands, and the operands in the kinds that it knows.

  Raises:
    Unfactorable: where there is none.
  """
  known = [_with_rule(name, value) if isinstance(value, TracedWeight) else value for value in values]
  return RULES[type(weights_in(known)[0])][name], known


def _with_rule(name: str, w: TracedWeight) -> TracedWeight:
  kind: TracedWeight | None = w
  while kind is not None and name not in RULES.get(type(kind), {}):
    kind = kind.simpler()
  if kind is None:
    raise Unfactorable(_why_no_rule(name))
  return kind


HOLDS_ITS_OWN = (
  "the function has a derivative or batching rule of its own, which must hold; if it is a product,"
  " jaxlora.register_product says so"
)


def _why_no_rule(name: str) -> str:
  if name.startswith("custom_"):
    return HOLDS_ITS_OWN
  return f"no rule keeps a weight factored through `{name}`"


def only_weight(args: Sequence[Any]) -> Any:
  """The weight, where an equation takes it as its first operand and no other one."""
  w, *rest = args
  if not isinstance(w, TracedWeight) or weights_in(rest):
    raise Unfactorable("an adapted weight is used as an index or a parameter")
  return w
