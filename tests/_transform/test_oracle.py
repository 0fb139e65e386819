"""`wrap(f)(tree)` equals `f(merge(tree))`: every kind of weight in every control flow, values and gradients."""

import functools

import jax
import jax.numpy as jnp
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles

CROSS = profiles.product(helpers.WRAPPERS, helpers.legal)
# The gradient of a grouped convolution inside the function reshapes groups out of one axis into another.
GROUPED = ("conv_grouped", "conv_depthwise", "conv_for_each_channel", "conv_for_each_channel_twice", "vmapped_convs")
MATERIALISES = {(build, "grad") for build in GROUPED}


@pytest.mark.parametrize(("build", "wrap"), CROSS)
def test_factored_equals_merged(build, wrap, x64):
  case = helpers.BUILDERS[build](jnp.float64)
  fn = helpers.WRAPPERS[wrap](case.fn)
  helpers.check(
    fn,
    case.adapted(),
    case.args,
    1e-12,
    reverse=wrap not in helpers.FORWARD_ONLY,
    on_materialize="ignore" if (build, wrap) in MATERIALISES else "error",
  )


def test_the_default_run_thins_the_product_evenly():
  """Every wrapper meets every family, and every builder meets several wrappers."""
  kept = profiles.thinned(list(helpers.WRAPPERS), helpers.legal)
  for builds in helpers.FAMILIES.values():
    for wrap in helpers.WRAPPERS:
      assert any((build, wrap) in kept for build in builds) == any(helpers.legal(build, wrap) for build in builds)
  for build in helpers.BUILDERS:
    assert len([wrap for wrap in helpers.WRAPPERS if (build, wrap) in kept]) in (3, 4, 5), build


OTHER_DTYPES = profiles.every_other(helpers.BUILDERS, jnp.bfloat16)
OTHER_DTYPES += [pytest.param(jnp.float32, build, marks=pytest.mark.nightly) for build in helpers.BUILDERS]


@pytest.mark.parametrize(("dtype", "build"), OTHER_DTYPES)
def test_other_dtypes(build, dtype):
  """By default bfloat16 on every second builder: float32 is what most other tests compute in."""
  case = helpers.BUILDERS[build](dtype)
  helpers.check(case.fn, case.adapted(), case.args, helpers.TOLERANCE[dtype])


@pytest.mark.parametrize(
  ("wrap", "build"), profiles.alternating(["jit", "scan", "remat", "cond", "vmap", "grad"], ["dense", "attention"])
)
def test_control_flow_in_single_precision(build, wrap):
  case = helpers.BUILDERS[build](jnp.float32)
  helpers.check(helpers.WRAPPERS[wrap](case.fn), case.adapted(), case.args, helpers.TOLERANCE[jnp.float32])


@pytest.mark.parametrize("build", helpers.BUILDERS)
def test_the_probe_finds_the_roles(build):
  case = helpers.BUILDERS[build](jnp.float32)
  tree = case.adapted()
  found = {leaf.path: leaf.roles for leaf in jaxlora.summary(tree).leaves}
  assert found == case.roles


@pytest.mark.parametrize("build", helpers.BUILDERS)
def test_nothing_is_materialised(build):
  case = helpers.BUILDERS[build](jnp.float32)
  tree = case.adapted()
  wrapped = jaxlora.wrap(case.fn, on_materialize="error")
  assert not helpers.weight_shaped_products(wrapped, tree, case.args)
  report = jaxlora.explain(case.fn, tree, *case.args)
  assert not report.materialized
  assert not report.unused
  assert {use.path for use in report.uses} == set(case.roles)


def test_the_search_for_products_finds_them():
  case = helpers.BUILDERS["dense"](jnp.float32)
  assert helpers.weight_shaped_products(helpers.oracle(case.fn), case.adapted(), case.args)


@pytest.mark.parametrize("build", helpers.BUILDERS)
def test_no_gradient_of_the_bases_shape(build):
  """The backward pass forms nothing of a weight's shape: the factors' gradients come from thin products alone."""
  case = helpers.BUILDERS[build](jnp.float32)
  frozen, trainable = jaxlora.split(case.adapted())
  loss = helpers.loss_of(jaxlora.wrap(case.fn), case.args)
  equations = helpers.traced(jax.grad(lambda f, t: loss(jaxlora.join(f, t)), argnums=1), frozen, trainable)
  shapes = {leaf.shape for leaf in jax.tree.leaves(jaxlora.strip(case.adapted())) if len(leaf.shape) > 1}
  products = ("dot_general", "ragged_dot_general", "conv_general_dilated", "scatter-add", "scatter_add")
  made = [e for e in equations if e.primitive.name in products]
  wrong = [e for e in made if any(_matches(var.aval.shape, shape) for var in e.outvars for shape in shapes)]
  assert not wrong, wrong


def _matches(shape, weight):
  return shape == weight or shape == weight[::-1]


@pytest.mark.parametrize("build", ["dense", "left", "dense_general", "autoencoder", "experts_dispatched", "embed"])
def test_gradients_follow_from_the_dense_gradient(build, x64):
  """With G the gradient of the merged weight: dA = s G B and dB = s A G, each over the axes of its role."""
  case = helpers.BUILDERS[build](jnp.float64)
  got, want = jax.jit(functools.partial(_gradients, case))(case.adapted())
  helpers.assert_close(got, want, 1e-12)


def _gradients(case, tree):
  """Of A and B, and what follows from the dense gradient."""
  dense = jax.grad(helpers.loss_of(case.fn, case.args))(jaxlora.merge(tree))["w" if "w" in case.params else "kernel"]
  (got,) = helpers.lora_weights(jaxlora.grad(helpers.loss_of(jaxlora.wrap(case.fn), case.args))(tree))
  (weight,) = helpers.lora_weights(tree)
  letters = "".join("zyx"[d] for d in range(weight.ndim))
  order = lambda role: (
    "".join(letter for letter, r in zip(letters, weight.roles, strict=True) if r == "s")
    + "r"
    + "".join(letter for letter, r in zip(letters, weight.roles, strict=True) if r == role)
  )
  d_a = weight.scale * jnp.einsum(f"{letters},{order('o')}->{order('i')}", dense, weight.b)
  d_b = weight.scale * jnp.einsum(f"{letters},{order('i')}->{order('o')}", dense, weight.a)
  return (got.a, got.b), (d_a, d_b)
