"""Where factors lie: along the base's axes, the rank whole everywhere."""

import jax.numpy as jnp
from jax.sharding import PartitionSpec
import pytest

from jaxlora._weight.placement import factor_spec, sharding_of
from jaxlora._weight.weight import FullWeight
from tests.helpers.adapters import adapted
from tests.helpers.meshes import mesh_of, place

P = PartitionSpec


@pytest.mark.parametrize(
  ("spec", "roles", "a", "b"),
  [
    (P("x", "y"), "io", P(None, "x"), P(None, "y")),
    (P("x", "y"), "oi", P(None, "y"), P(None, "x")),
    (P("x"), "io", P(None, "x"), P(None, None)),
    (P(), "ioo", P(None, None), P(None, None, None)),
    (P(("x", "y"), None, "z"), "iio", P(None, ("x", "y"), None), P(None, "z")),
    (P("s", "x", "y"), "sio", P("s", None, "x"), P("s", None, "y")),
    (P("x", "s", "y"), "iso", P("s", None, "x"), P("s", None, "y")),
    (P(None, None, "x", "y"), "iiio", P(None, None, None, "x"), P(None, "y")),
  ],
)
def test_factors_follow_their_own_axes(spec, roles, a, b):
  assert tuple(factor_spec(spec, roles, "i")) == tuple(a)
  assert tuple(factor_spec(spec, roles, "o")) == tuple(b)


def test_parts_of_a_weight_on_a_mesh():
  base = place(mesh_of(x=2, y=2), jnp.ones((8, 6)), "x", "y")
  node = adapted({"w": base}, rank=2, variant="vera")["w"]
  held = {name: part for name, part in node.parts().items() if name != "base"}
  specs = {name: tuple(sharding_of(node, name).spec) for name, part in held.items()}
  assert specs == {"a": (None, "x"), "b": (None, "y"), "lambda_d": (), "lambda_b": (None, "y")}
  assert sharding_of(FullWeight(base, base), "value") == base.sharding
  assert sharding_of(adapted({"w": jnp.ones((8, 6))})["w"], "a") is None


@pytest.mark.parametrize("variant", ["lora", "dora", "loha"])
def test_the_factors_of_a_square_are_told_apart(variant):
  """A and B have one shape there."""
  tree = adapted({"kernel": place(mesh_of(x=2, y=2), jnp.ones((8, 8)), "x", "y")}, variant=variant)
  where = {name: tuple(sharding_of(tree["kernel"], name).spec) for name in tree["kernel"].parts()}
  del where["base"]
  assert where == {name: (None, "x" if name[0] == "a" else "y") for name in where}
