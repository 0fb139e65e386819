"""Whether the products that a call traced agree with the roles of its weights.

`wrap` is right whichever axes a product contracts. But roles say which factor is A, what a variant scales, and how an
update is exported. Where they are not certain, a weight that meets its inputs along its free axes alone contradicts
them.
"""

from collections.abc import Mapping, Sequence
import re
from typing import Any, NamedTuple

from jaxlora._jax.marked_call import NAME
from jaxlora._transform.factored import TracedWeight
from jaxlora._transform.record import Use


class Unsure(NamedTuple):
  """A weight whose roles are not certain."""

  roles: str
  shape: tuple[int, ...]


def side_met(eqn: Any, values: Sequence[Any], w: TracedWeight) -> str:
  """Which axes of a weight a product sums over or looks up along, `"i"` or `"o"`; empty for both, or for neither."""
  axes = _axes_met(eqn, isinstance(values[0], TracedWeight))
  roles = {w.roles[d] for d in axes if w.shape[d] != 1} - {"s"}
  return roles.pop() if len(roles) == 1 else ""


def _axes_met(eqn: Any, weight_first: bool) -> Sequence[int]:
  params = eqn.params
  if eqn.primitive.name == "dot_general":
    return params["dimension_numbers"][0][0 if weight_first else 1]
  if eqn.primitive.name == NAME:
    return params["mark"].spec.meeting(0 if weight_first else 1).contracted
  if eqn.primitive.name == "ragged_dot_general":
    return params["ragged_dot_dimension_numbers"].dot_dimension_numbers[0][0 if weight_first else 1]
  if eqn.primitive.name == "gather":
    return params["dimension_numbers"].start_index_map
  return params["dimension_numbers"].rhs_spec[1:]  # of a convolution


def check_roles(unsure: Mapping[str, Unsure], uses: Sequence[Use]) -> None:
  """Raises where a weight of uncertain roles met its inputs along its free axes alone.

  A weight that meets some inputs along its contracted axes as well is a tied one: an embedding that is also the head.

  Args:
    unsure: the weights whose roles are not certain, by path.
    uses: what the call did.
  """
  met: dict[str, set[str]] = {}
  for use in uses:
    met.setdefault(use.path, set()).add(use.met)
  wrong = {path: weight for path, weight in unsure.items() if met.get(path) == {"o"}}
  if wrong:
    places = {use.path: f"`{use.primitive}` ({use.source or 'unknown source line'})" for use in uses}
    raise ValueError(_message(wrong, places))


def _message(wrong: Mapping[str, Unsure], places: Mapping[str, str]) -> str:
  path, (roles, shape) = next(iter(wrong.items()))
  others = f" So do {len(wrong) - 1} more: {', '.join(list(wrong)[1:6])}." if len(wrong) > 1 else ""
  turned = roles.translate(str.maketrans("io", "oi"))
  return (
    f"{path}: roles {roles!r} of shape {shape} were taken without certain evidence, and"
    f" {places[path]} contracts the axes that they call free.{others} A and B, what a variant scales, and an exported"
    f" adapter would be the wrong way round. Say the roles: LoraConfig(axes={{{re.escape(path)!r}: {turned!r}}}), or"
    f" {roles!r} if they are right all the same. Or pass probe= to adapt, which learns them."
  )
