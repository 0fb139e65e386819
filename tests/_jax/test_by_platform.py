"""Which programs are given a form for one device."""

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxlora._jax.by_platform import EVERYWHERE, Form, by_platform
from tests import helpers


def chosen(x):
  """One where the form for one device is taken, else zero."""
  return by_platform(lambda x: 0 * x, {EVERYWHERE: Form(lambda x: 0 * x + 1, single_device=True)}, x)


@pytest.mark.parametrize(
  ("axes", "expected"), [({"data", "model"}, 1), ({"data"}, 0), (None, 0)], ids=["all manual", "one manual", "none"]
)
def test_what_is_under_a_shard_map_over_all_axes_runs_on_one_device(axes, expected):
  mesh = helpers.mesh_of(AxisType.Auto, data=4, model=2)
  x = helpers.place(mesh, np.ones(8, np.float32), "data")
  fn = (
    chosen
    if axes is None
    else jax.shard_map(chosen, mesh=mesh, in_specs=P("data"), out_specs=P("data"), axis_names=axes)
  )
  np.testing.assert_array_equal(jax.jit(fn)(x), expected)


def test_a_program_of_one_device_does():
  np.testing.assert_array_equal(jax.jit(chosen)(np.ones(8, np.float32)), 1)
