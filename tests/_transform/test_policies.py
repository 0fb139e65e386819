"""Every policy gives the same numbers, and is chosen call by call."""

import functools
import math
import re

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._platform.policy import choose_policy
from tests import helpers
from tests.helpers import POLICIES, profiles
from tests.helpers.builders import FAMILIES

# One of every family, and those whose products or regions are of another form.
SIX = ("dense", "attention", "experts_stacked", "conv_grouped", "embed_tied", "scanned_layers")
LEGAL = {wrap: [build for build in SIX if helpers.legal(build, wrap)] for wrap in helpers.WRAPPERS}
ALONE = [(build, "alone") for build in helpers.BUILDERS if build not in SIX]
MATERIALISES = {("conv_grouped", "grad")}
OTHERS = [name for name in POLICIES if name != "cpu"]


def fitting(wrap):
  """A program that maps over two devices of its own cannot have its arguments on eight."""
  return [name for name, policy in POLICIES.items() if wrap != "shard_map" or policy.devices == 1]


def in_turn(k, wrap):
  """Policies for each of the wrapper's builders: the default run takes as few as let the wrapper meet all of them.

  The next wrapper begins with the next policy, so that every builder meets all of them, too.
  """
  ways, builds = fitting(wrap), LEGAL[wrap]
  ways = ways[k % len(ways) :] + ways[: k % len(ways)]
  each = math.ceil(len(ways) / len(builds))
  return {(build, wrap): profiles.in_turn(j, ways, each) for j, build in enumerate(builds)}


CROSS = {pair: names for k, wrap in enumerate(helpers.WRAPPERS) for pair, names in in_turn(k, wrap).items()}
# By default two for each of the other builders, besides the platform's own that `test_oracle.py` runs them under.
CROSS |= {
  pair: list(POLICIES) if profiles.is_nightly() else profiles.in_turn(k, OTHERS, 2) for k, pair in enumerate(ALONE)
}


@pytest.mark.parametrize(("build", "wrap"), CROSS)
def test_factored_equals_merged_under_every_policy(build, wrap, x64):
  case = helpers.BUILDERS[build](jnp.float64)
  helpers.check(
    helpers.WRAPPERS[wrap](case.fn),
    case.adapted(),
    case.args,
    1e-12,
    reverse=wrap not in helpers.FORWARD_ONLY,
    on_materialize="ignore" if (build, wrap) in MATERIALISES else "error",
    policies=[POLICIES[name] for name in CROSS[build, wrap]],
  )


def test_every_builder_and_every_wrapper_meets_every_policy():
  met = {}
  for (build, wrap), names in CROSS.items():
    for one in (build, wrap):
      met.setdefault(one, set()).update(names)
  for build in SIX:
    assert met[build] == set(POLICIES), build
  for wrap in helpers.WRAPPERS:
    assert met[wrap] == set(fitting(wrap)), wrap


def test_six_builders_are_of_every_family():
  assert all(set(builds) & set(SIX) for builds in FAMILIES.values())
  assert set(SIX) <= set(helpers.BUILDERS)


# The default run takes the platform's own policy for each builder, and the others in turn for every second.
AT_INIT = [("cpu", build) for build in helpers.BUILDERS]
AT_INIT += [
  pytest.param(name, build, marks=() if k % (2 * len(OTHERS)) == 2 * j else pytest.mark.nightly)
  for k, build in enumerate(helpers.BUILDERS)
  for j, name in enumerate(OTHERS)
]


@pytest.mark.parametrize(("name", "build"), AT_INIT)
def test_at_init_the_function_is_the_base_bit_for_bit(build, name):
  case, policy = helpers.BUILDERS[build](jnp.float32), POLICIES[name]
  tree = jaxlora.adapt(case.params, case.config, jax.random.key(0), probe=lambda p: case.fn(p, *case.args))
  # As users compile it: without optimisation XLA rounds one function in two ways, alone and fused with an addition.
  jit = functools.partial(jax.jit, compiler_options=helpers.OPTIMISED)
  tree, params, args = policy.placed(tree, case.params, case.args)
  got, wanted = jit(jaxlora.wrap(case.fn, **policy.options))(tree, *args), jit(case.fn)(params, *args)
  if (
    name == "tpu"
  ):  # one sum over the input and the rank: XLA's CPU backend may take its terms, of which many are 0, in another order
    helpers.assert_close(got, wanted, 1e-5)
  else:
    np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("build", helpers.BUILDERS)
def test_nothing_is_materialised(build):
  case = helpers.BUILDERS[build](jnp.float32)
  for policy in POLICIES.values():
    wrapped = jaxlora.wrap(case.fn, on_materialize="error", **policy.options)
    assert not helpers.weight_shaped_products(wrapped, case.adapted(), case.args)


# ----------------------------------------------------------------------------------------------------------------------
# Which policy a call gets.


def test_the_platform_is_what_the_user_said_or_where_the_arguments_are_or_the_default():
  x = jnp.ones(3)
  assert choose_policy("auto", "tpu", True, [x]).name == "tpu"
  assert choose_policy("auto", "cuda", True, [x]).name == "gpu"
  assert choose_policy("auto", None, True, [x]).name == "cpu"
  assert choose_policy("auto", None, True, []).name == "cpu"
  assert choose_policy("none", "tpu", True, [x]).name == "none"


def test_the_order_in_which_a_platform_is_found(monkeypatch):
  """An array on the host's own device wins over the default device, that over the default backend."""
  x = jnp.ones(3)
  monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
  assert choose_policy("auto", None, True, [x]).name == "cpu"  # by the array's device
  names = []

  def traced(x):  # a traced value says nothing of devices
    names.append(choose_policy("auto", None, True, [x]).name)
    return x

  jax.make_jaxpr(traced)(x)
  assert names == ["gpu"]
  with jax.default_device(jax.devices("cpu")[0]):
    jax.make_jaxpr(lambda x: traced(x))(x)
  assert names == ["gpu", "cpu"]
  mesh = helpers.mesh_of(jax.sharding.AxisType.Explicit, data=2)
  with jax.set_mesh(mesh):
    jax.make_jaxpr(lambda x: traced(x))(helpers.place(mesh, jnp.ones(4), "data"))
  assert names == ["gpu", "cpu", "cpu"]


def test_recompute_false_turns_all_of_it_off():
  policy = choose_policy("auto", "cpu", False, [])
  assert not policy.rematerialises
  assert not policy.widens_bases
  jaxpr = jax.make_jaxpr(jax.nn.softmax)(jnp.ones((8, 64))).jaxpr
  assert choose_policy("auto", "cpu", True, []).regions(jaxpr)
  assert not policy.regions(jaxpr)


@pytest.mark.parametrize(
  ("options", "message"),
  [
    ({"tuning": "fast"}, "tuning is 'fast', expected one of 'auto', 'none'"),
    ({"platform": "npu"}, "platform is 'npu', expected None or one of 'cpu', 'gpu', 'cuda', 'rocm', 'tpu'"),
  ],
)
def test_unknown_options_are_errors(options, message):
  with pytest.raises(ValueError, match=re.escape(message)):
    jaxlora.wrap(lambda p: p, **options)
  with pytest.raises(ValueError, match=re.escape(message)):
    jaxlora.route(lambda p: p, **options)


# ----------------------------------------------------------------------------------------------------------------------
# One trace for several platforms.


def test_one_trace_is_exported_for_several_platforms():
  case = helpers.BUILDERS["attention"](jnp.float32)
  frozen, trainable = jaxlora.split(case.adapted())
  loss = lambda f, t, x: jnp.sum(jnp.sin(jaxlora.wrap(case.fn)(jaxlora.join(f, t), x)))
  step = jax.jit(jax.value_and_grad(lambda leaves, f, x: loss(f, jax.tree.unflatten(treedef, leaves), x)))
  leaves, treedef = jax.tree.flatten(trainable)
  base = jax.tree.leaves(frozen)
  flat = jax.jit(lambda leaves, base, x: step(leaves, jax.tree.unflatten(jax.tree.structure(frozen), base), x))
  exported = export.export(flat, platforms=["cpu", "tpu", "cuda"])(leaves, base, *case.args)
  assert exported.platforms == ("cpu", "tpu", "cuda")
  helpers.assert_close(exported.call(leaves, base, *case.args), step(leaves, frozen, *case.args), 1e-5)


def test_the_plain_form_has_none_of_the_librarys_own_primitives():
  case = helpers.BUILDERS["attention"](jnp.float32)

  def primitives(**options):
    traced = jax.make_jaxpr(jax.grad(helpers.loss_of(jaxlora.wrap(case.fn, **options), case.args), allow_int=True))
    return {eqn.primitive.name for eqn in helpers.equations(traced(case.adapted()))}

  assert not {name for name in primitives(tuning="none") if "jaxlora" in name}
  assert {name for name in primitives() if "jaxlora" in name}
