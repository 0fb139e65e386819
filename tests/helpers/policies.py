"""Platform policies: what `wrap` is told, and how many devices run the program. A policy changes how, never what."""

from typing import Any, NamedTuple

import jax

from tests.helpers.meshes import mesh_of, place


class Under(NamedTuple):
  """How to wrap and run a function.

  Attributes:
    options: for `jaxlora.wrap`.
    devices: how many hold a copy of the arguments.
  """

  options: dict[str, Any]
  devices: int = 1

  def placed(self, *trees: Any) -> Any:
    """The arguments on the devices."""
    return on_devices(self.devices, *trees)


POLICIES = {
  "cpu": Under({"platform": "cpu"}),
  "cpu on eight": Under({"platform": "cpu"}, 8),
  "tpu": Under({"platform": "tpu"}),
  "gpu": Under({"platform": "gpu"}),
  "none": Under({"tuning": "none"}),
}


def on_devices(count: int, *trees: Any) -> Any:
  """Copies of arrays on several devices; with one device they are as they were."""
  if count == 1:
    return trees
  mesh = mesh_of(copies=count)
  return jax.tree.map(lambda leaf: place(mesh, leaf), trees)
