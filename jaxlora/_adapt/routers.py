"""Routers: the matrices whose outputs choose experts, which `"all-linear"` leaves as they are.

With a probe their use tells: something is chosen among their outputs, or they decide on the sizes of groups. Names tell
where there is none, and beside it.
"""

from collections.abc import Iterable, Mapping

from jaxlora._adapt.evidence import Evidence
from jaxlora._base.paths import components

_ROUTERS = {"router", "router_weights", "gate_router"}

# A `gate` is a router beside experts; in any other layer it is half of its inputs' projection.
_GATES = {"gate", "gating"}


def routers(kernels: Iterable[str], paths: Iterable[str], seen: Mapping[str, Evidence] | None) -> set[str]:
  """Those of some kernels that are routers.

  Args:
    kernels: the paths of the kernels.
    paths: of all leaves.
    seen: what a probe saw of them; `None` without one.
  """
  of_experts = {
    tuple(names[:k])
    for names in map(components, paths)
    for k, name in enumerate(names)
    if name == "experts" or (k and "moe" in names[k - 1].lower())
  }
  return {path for path in kernels if _named_so(path, of_experts) or (seen is not None and seen[path].chooses)}


def _named_so(path: str, of_experts: set[tuple[str, ...]]) -> bool:
  names = components(path)
  return bool(_ROUTERS & {*names}) or any(
    name in _GATES and tuple(names[:k]) in of_experts for k, name in enumerate(names)
  )
