"""Meshes of some of the eight CPU devices, and arrays that are placed on them."""

import math
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DEVICES = ("one device", "several")  # the two ways in which a cotangent is waited for


def mesh_of(kind: AxisType = AxisType.Auto, **axes: int) -> Mesh:
  """A mesh whose axes are all of one kind: `mesh_of(data=2, model=2)`."""
  devices = jax.devices()[: math.prod(axes.values())]
  return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=(kind,) * len(axes), devices=devices)


def place(mesh: Mesh, leaf: Any, *names: Any) -> jax.Array:
  return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*names)))
