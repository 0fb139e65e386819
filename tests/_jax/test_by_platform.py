"""Which programs are given a form for one device, and which what is for those that a compiler splits."""

import functools
import re

import jax
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from jaxlora._jax.by_platform import EVERYWHERE, Form, by_platform, whole
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


def split(x, y):
  """Three where a compiler splits the program, plus one where the form for one device is taken, times `y` whole."""
  one = Form(lambda x, y: 0 * x + y, single_device=True, split=lambda x, y: 0 * x + 3 * whole(y))
  return by_platform(lambda x, y: 0 * (x + y), {EVERYWHERE: one}, x, y)


MAPPED = {"alone": split, "mapped": jax.vmap(split), "mapped along columns": jax.vmap(split, in_axes=(1, 0))}


@pytest.mark.parametrize("mapped", MAPPED)
def test_a_program_that_a_compiler_splits_has_a_form_of_its_own(mapped):
  mesh = helpers.mesh_of(AxisType.Auto, data=8)
  x = helpers.place(mesh, np.ones((8, 8), np.float32), "data")
  compiled = jax.jit(MAPPED[mapped]).lower(x, x).compile()
  assert re.search(r"f32\[8,8\].* all-gather", compiled.as_text())
  np.testing.assert_array_equal(compiled(x, x), 3)


@pytest.mark.parametrize("kinds", [(AxisType.Explicit,), (AxisType.Explicit, AxisType.Auto)], ids=["all", "some"])
def test_types_that_say_how_arrays_lie_are_left_alone(kinds):
  mesh = jax.make_mesh((8, 1)[: len(kinds)], ("data", "model")[: len(kinds)], axis_types=kinds)
  with jax.set_mesh(mesh):
    x = helpers.place(mesh, np.ones((8, 8), np.float32), "data")
    np.testing.assert_array_equal(jax.jit(split)(x, x), 0)


def test_so_is_what_is_under_a_shard_map_over_some_axes():
  mesh = helpers.mesh_of(AxisType.Auto, data=4, model=2)
  over = functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"))
  x = helpers.place(mesh, np.ones((8, 8), np.float32), "data")
  np.testing.assert_array_equal(jax.jit(over(split, axis_names={"data"}))(x, x), 0)
  np.testing.assert_array_equal(jax.jit(over(split))(x, x), 1)
