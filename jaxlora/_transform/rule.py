"""Rules: what an equation means for a weight that is `base + A B`."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jaxlora._base.labelled import Labelled
from jaxlora._platform.recipes import Recipe
from jaxlora._transform.factored import Factored


class Unfactorable(Exception):
  """Why an equation needs the weight as one array."""


class Op(NamedTuple):
  """An equation as its rule sees it."""

  name: str
  params: dict[str, Any]
  bind: Callable[..., list[Any]]  # the same primitive on other operands, its parameters the same but for those given
  result: Any  # the type of the equation's first result
  use: int  # how many products this weight went through before: picks its dropout mask
  recipe: Callable[[Any], Recipe | None]  # how to make an operand again in the backward pass
  recompute: bool  # whether the backward pass makes again what is cheap to make
  looping: bool  # whether the equation is inside the body of a loop
  h: Labelled | None  # a product's first half, where it was computed ahead
  took: Callable[[str], None]  # hears by which way a product of a mixed batch is computed


Rule = Callable[[Op, Sequence[Any]], list[Any]]

RULES: dict[str, Rule] = {}

# Rules whose result holds the product of the weight with something; the others only rearrange the weight.
PRODUCTS = ("dot_general", "conv_general_dilated", "gather")

# Rules that know weights with the factors of many adapters; the others get one whose factors are picked.
BANKED = ("dot_general", "convert_element_type", "reshape", "squeeze")


def rule(*names: str) -> Callable[[Rule], Rule]:
  def register(fn: Rule) -> Rule:
    RULES.update(dict.fromkeys(names, fn))
    return fn

  return register


def only_weight(args: Sequence[Any]) -> Factored:
  """The weight, where an equation takes it as its first operand and no other one."""
  w, *rest = args
  if not isinstance(w, Factored) or any(isinstance(arg, Factored) for arg in rest):
    raise Unfactorable("an adapted weight is used as an index or a parameter")
  return w
