"""How a product brings its input and a weight together, by labelled axes.

An axis of the weight is labelled with its position, an axis that only the input has with `("x", k)`.
"""

from collections.abc import Callable, Hashable, Sequence
import dataclasses
from typing import Any

from jaxlora._base.labelled import own_labels
from jaxlora._transform.factored import Unfactorable


@dataclasses.dataclass(frozen=True)
class Pairing:
  """How a `dot_general` brings an input and a weight together, by labels.

  Attributes:
    contracted, batched: which axes of the weight meet which axes of the input.
    weight_first: whether the weight is the left operand, whose free axes come first in the result.
    precision: as in `jax.lax.dot_general`.
  """

  contracted: dict[int, int]
  batched: dict[int, int]
  weight_first: bool
  precision: Any

  def input_labels(self, ndim: int) -> tuple[Hashable, ...]:
    paired = {k: d for d, k in (self.contracted | self.batched).items()}
    return tuple(paired.get(k, ("x", k)) for k in range(ndim))

  def free(self, ndim: int) -> list[int]:
    """The axes of the weight, of `ndim`, that go to the result alone."""
    return [d for d in range(ndim) if d not in self.contracted and d not in self.batched]

  def result_labels(self, x_ndim: int, w_ndim: int) -> list[Hashable]:
    x_free, w_free = own_labels(self.input_labels(x_ndim)), self.free(w_ndim)
    return [*self.batched, *((*w_free, *x_free) if self.weight_first else (*x_free, *w_free))]

  def product(self, x: Any, w: Any, by: Callable[..., Any], *rest: Any) -> Any:
    """`by` of the two in the order of the `dot_general`."""
    return by(*((w, x) if self.weight_first else (x, w)), *rest)


def meeting(params: dict[str, Any], shape: Sequence[int], roles: str, weight_first: bool) -> tuple[Pairing, str, bool]:
  """How a `dot_general` brings its input and a weight together.

  Axes of both roles may not be contracted together; where only `o` axes are, the factors trade places.

  Args:
    params: of the equation.
    shape, roles: of the weight.
    weight_first: whether the weight is the left operand.

  Returns:
    The pairing, the roles that it wants of the weight (those of axes of size 1 may change), and whether the factors
    trade places afterwards.

  Raises:
    Unfactorable: where the product is none of a weight's.
  """
  (contract, batch) = params["dimension_numbers"]
  contracted, batched = (
    {int(d): int(k) for d, k in zip(*(pair if weight_first else pair[::-1]), strict=True)} for pair in (contract, batch)
  )
  pairing = Pairing(contracted, batched, weight_first, params["precision"])
  summed = {roles[d] for d in contracted if shape[d] != 1} - {"s"}
  if len(summed) > 1:
    raise Unfactorable(f"a contraction across roles {sorted(summed)} of a weight with roles {roles!r}")
  if not summed:
    if any(shape[d] != 1 for d in contracted) or not contracted:
      raise Unfactorable("a product that contracts neither the input axes nor the output axes of the weight")
    summed = {"i"}
  role = next(iter(summed))
  return pairing, matched_roles(shape, roles, [(tuple(contracted), role)]), role == "o"


def matched_roles(shape: Sequence[int], roles: str, groups: Sequence[tuple[Sequence[int], str]]) -> str:
  """The roles with those of axes of size 1 as a product wants them; `groups` holds (axes, wanted role)."""
  matched = list(roles)
  for axes, role in groups:
    for d in axes:
      if shape[d] == 1:
        matched[d] = role
  return "".join(matched)
