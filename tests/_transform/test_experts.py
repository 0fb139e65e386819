"""Grouped products, `ragged_dot`: what stays factored, what it costs, and what is formed as one array."""

import functools
import math
import re

import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles
from tests.helpers.adapters import trained
from tests.helpers.compiled import optimised, traced
from tests.helpers.oracle import frozen_step, sine_step

KEY = jax.random.key(0)
SIZES = jnp.array([2, 0, 1])  # of four rows
OWN_SIZES = jnp.array([[2, 0, 1], [1, 1, 1]])
array = functools.partial(helpers.array, dtype=jnp.float64)
single = functools.partial(helpers.array, dtype=jnp.float32)


def adapted(params, axes, **fields):
  config = jaxlora.LoraConfig(rank=2, alpha=3, targets=lambda path, leaf: path in axes, axes=axes, **fields)
  return trained(jaxlora.adapt(params, config, KEY))


def general(dot, rows, experts, sizes=SIZES):
  numbers = lax.RaggedDotDimensionNumbers(dot, rows, experts)
  return lambda p, x: lax.ragged_dot_general(x, p["w"], sizes, numbers)


ONE = general((((1,), (1,)), ((), ())), [0], [0])
TWO_INPUTS = general((((1, 2), (1, 3)), ((), ())), [0], [0])
BATCHED = (((2,), (2,)), ((0,), (1,)))
LATE = general((((0,), (2,)), ((), ())), [1], [1])  # the rows of x last, the experts of w in the middle
FREE = general((((2,), (1,)), ((), ())), [1], [0], OWN_SIZES)  # more axes of x, each with groups of its own

FORMS = {
  "one": (ONE, (3, 5, 7), (4, 5), "sio"),
  "A is shared by the experts": (ONE, (3, 5, 7), (4, 5), "oio"),
  "B is shared by the experts": (ONE, (3, 5, 7), (4, 5), "iio"),
  "roles the other way round": (ONE, (3, 5, 7), (4, 5), "soi"),
  "two inputs": (TWO_INPUTS, (3, 5, 7, 2), (4, 5, 2), "sioi"),
  "one input of two": (ONE, (3, 5, 7, 2), (4, 5), "sioi"),
  "late": (LATE, (7, 3, 5), (5, 4), "osi"),
  "free": (FREE, (3, 5, 7), (2, 4, 5), "sio"),
  "batched": (general(BATCHED, [1], [0]), (3, 2, 5, 7), (2, 4, 5), "ssio"),
  "batched, A without batches": (general(BATCHED, [1], [0]), (3, 2, 5, 7), (2, 4, 5), "soio"),
  "vmap": (
    lambda p, x: jax.vmap(lax.ragged_dot)(x, p["w"], OWN_SIZES),
    (2, 3, 5, 7),
    (2, 4, 5),
    "ssio",
  ),
  "of batches": (general(BATCHED, [1], [0], OWN_SIZES), (3, 2, 5, 7), (2, 4, 5), "ssio"),
  "picked": (lambda p, x: lax.ragged_dot(x, p["w"][jnp.array([2, 0, 1])], SIZES), (3, 5, 7), (4, 5), "sio"),
}


@pytest.mark.parametrize("form", profiles.some(FORMS, "A is shared by the experts", "late", "vmap"))
def test_grouped_products_stay_factored(form, x64):
  fn, weight, data, axes = FORMS[form]
  tree = adapted({"w": array(1, weight)}, {"w": axes})
  helpers.check(fn, tree, (array(2, data),), 1e-12)


REFUSED = {
  "columns in groups": (general((((1,), (0,)), ((), ())), [1], [], jnp.array([2, 3])), (5, 7), (4, 5), "io"),
  "batches in groups": (general((((2,), (1,)), ((0,), (0,))), [0], []), (3, 5, 7), (3, 4, 5), "sio"),
  "as the rows": (lambda p, x: lax.ragged_dot(p["w"], x, SIZES), (4, 5), (3, 5, 7), "io"),
  "as both": (lambda p, x: lax.ragged_dot(p["w"][0], p["w"], SIZES) + x, (3, 7, 7), (7, 7), "sio"),
  "sizes of batches, A without them": (general(BATCHED, [1], [0], OWN_SIZES), (3, 2, 5, 7), (2, 4, 5), "soio"),
  "experts that are inputs": (ONE, (3, 5, 7), (4, 5), "osi"),
}


@pytest.mark.parametrize("form", profiles.some(REFUSED, "columns in groups"))
def test_what_is_no_product_of_experts_is_formed_and_reported(form, x64):
  fn, weight, data, axes = REFUSED[form]
  tree, x = adapted({"w": array(1, weight)}, {"w": axes}), array(2, data)
  with pytest.warns(jaxlora.MaterializeWarning, match=r"w: .*ragged_dot_general"):
    got = jaxlora.wrap(fn)(tree, x)
  helpers.assert_close(got, fn(jaxlora.merge(tree), x), 1e-12)


def mixture(p, x):
  """Two experts' worth of every token: chosen, ordered, computed in groups, and put back."""
  scores, chosen = lax.top_k(jax.nn.softmax(x @ p["router"]), 2)
  order = jnp.argsort(chosen.reshape(-1))
  sizes, rows = jnp.bincount(chosen.reshape(-1), length=3), x[order // 2]
  h = jax.nn.silu(lax.ragged_dot(rows, p["gate"], sizes)) * lax.ragged_dot(rows, p["up"], sizes)
  y = lax.ragged_dot(h, p["down"], sizes)[jnp.argsort(order)].reshape(*chosen.shape, -1)
  return jnp.einsum("tkd,tk->td", y, scores)


def weights(d=5, f=7, dtype=jnp.float64):
  shapes = {"router": (d, 3), "gate": (3, d, f), "up": (3, d, f), "down": (3, f, d)}
  return {name: helpers.array(k, shape, dtype) for k, (name, shape) in enumerate(shapes.items())}


EXPERTS = {"gate": "sio", "up": "sio", "down": "sio"}
PAIR = {"up": "sio", "down": "sio"}


def pair(p, x):
  return lax.ragged_dot(jax.nn.silu(lax.ragged_dot(x, p["up"], SIZES)), p["down"], SIZES)


@pytest.mark.nightly
def test_layers_of_experts_in_a_scan_with_remat(x64):
  params = jax.tree.map(lambda *layers: jnp.stack(layers), weights(), jax.tree.map(jnp.negative, weights()))
  step = jax.checkpoint(lambda x, p: (x + mixture(p, x), None))
  fn = lambda p, x: lax.scan(step, x, p)[0]
  tree = adapted(params, {name: f"s{roles}" for name, roles in EXPERTS.items()} | {"router": "sio"})
  helpers.check(fn, tree, (array(9, (4, 5)),), 1e-12, policies=list(helpers.POLICIES.values())[:1])


@pytest.mark.parametrize("variant", profiles.some(["dora", "vera", "lokr"], "dora"))
def test_variants_of_experts_stay_factored(variant, x64):
  """DoRA has a magnitude for each output of each expert."""
  helpers.check(ONE, adapted({"w": array(1, (3, 5, 7))}, {"w": "sio"}, variant=variant), (array(2, (4, 5)),), 1e-12)


@pytest.mark.nightly
def test_a_gain_of_inputs_meets_the_rows_of_its_expert(x64):
  """DoRA of a weight that meets its inputs along the outputs' axes."""
  tree = adapted({"w": array(1, (3, 5, 7))}, {"w": "soi"}, variant="dora")
  helpers.check(ONE, tree, (array(2, (4, 5)),), 1e-12)


@pytest.mark.nightly
def test_dropout_is_that_of_the_dense_product():
  """One expert for all rows is a dense layer: the same mask, and the same numbers."""
  tree, x = adapted({"w": single(1, (1, 5, 7))}, {"w": "sio"}, dropout=0.5), single(2, (4, 5))
  ragged = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([4]))
  dense = lambda p, x: x @ p["w"][0]
  got, want, without = (
    jaxlora.wrap(fn, dropout_key=key)(tree, x) for fn, key in ((ragged, KEY), (dense, KEY), (ragged, None))
  )
  helpers.assert_close(got, want, 1e-5)
  assert not np.allclose(got, without)


def test_rows_behind_the_last_group_are_zero_and_groups_past_the_rows_are_cut(x64):
  """As JAX treats sizes that do not sum to the rows; nothing of those rows reaches a gradient."""
  tree, x = adapted({"w": array(1, (3, 5, 7))}, {"w": "sio"}), array(2, (4, 5))
  fn = lambda p, x, sizes: lax.ragged_dot(x, p["w"], sizes)
  wrapped = jax.jit(jaxlora.wrap(fn, on_materialize="error"))
  for sizes, rows in (([2, 0, 1], 3), ([0, 0, 0], 0), ([3, 2, 9], 4)):
    got = wrapped(tree, x, jnp.array(sizes))
    np.testing.assert_allclose(got, fn(jaxlora.merge(tree), x, jnp.array(sizes)), atol=1e-12)
    assert not got[rows:].any()
    assert got[:rows].any() == bool(rows)
  grads = jaxlora.grad(lambda tree: wrapped(tree, x, SIZES)[3].sum())(tree)
  assert not any(leaf.any() for leaf in jax.tree.leaves(grads))


def ragged_flops(step, *args):
  """Of every product of a step, each row with the one expert that it meets."""
  total = 0
  for eqn in traced(step, *args):
    if eqn.primitive.name == "ragged_dot_general":
      numbers = eqn.params["ragged_dot_dimension_numbers"]
      (summed, _), _ = numbers.dot_dimension_numbers
      groups = 1 if numbers.rhs_group_dimensions else eqn.outvars[0].aval.shape[0]
      inner = math.prod(eqn.invars[0].aval.shape[d] for d in summed)
      total += 2 * eqn.outvars[0].aval.size * inner // groups
  return total


def large(d, f, rank):
  params, x = weights(d, f, jnp.float32), single(9, (128, d))
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=rank, targets=[*EXPERTS], axes=EXPERTS), KEY)
  return params, tree, x


def test_a_step_costs_the_floor_and_the_factors_own_products():
  d, f, rank, rows = 128, 384, 8, 256
  params, tree, x = large(d, f, rank)
  frozen, factors = jaxlora.split(tree)
  wrapped = jaxlora.wrap(mixture, on_materialize="error")
  loss = lambda x, factors: jnp.sum(jnp.sin(wrapped(jaxlora.join(frozen, factors), x)))
  own = 3 * 2 * rows * rank * 3 * (d + f)  # forwards, and twice backwards, of three weights
  floor = ragged_flops(frozen_step(mixture), x, params)
  assert floor == 2 * 2 * rows * 3 * d * f
  assert ragged_flops(jax.grad(loss, argnums=(0, 1)), x, factors) == floor + own


@pytest.mark.nightly
def test_a_step_holds_no_more_than_the_floor_at_once():
  """On a CPU JAX gives XLA a masked copy of the rows for each expert; the thin products share those of the base's."""
  params, tree, x = large(128, 384, 8)
  temps = [
    optimised(step, *args).memory_analysis().temp_size_in_bytes
    for step, args in ((frozen_step(mixture), (x, params)), (sine_step(mixture), (tree, x)))
  ]
  assert temps[1] <= temps[0]


def looked_up(times):
  """Experts on the rows of six tokens, each `times` times; and its gradient step."""
  rows = jnp.repeat(jnp.arange(6), times)
  fn = lambda p, x: lax.ragged_dot(jnp.tanh(x)[rows], p["w"], jnp.array([5, 3, 4]))
  step = jax.grad(lambda tree, x: jnp.sum(jnp.sin(jaxlora.wrap(fn)(tree, x))), allow_int=True)
  return fn, step


def lookups(step, *args):
  return jax.jit(step).lower(*args).as_text().count('"stablehlo.gather"')


@pytest.mark.parametrize(("times", "gathers"), [(1, 1), (2, 2), (4, 2)])
def test_rows_of_tokens_that_meet_several_experts_are_looked_up_again(times, gathers):
  """The backward pass of a program of one device makes them again of the tokens; that of several is given them."""
  fn, step = looked_up(times)
  tree, x = adapted({"w": single(1, (3, 5, 7))}, {"w": "sio"}), single(9, (6, 5))
  helpers.check(fn, tree, (x,), 1e-5)
  assert lookups(step, tree, x) == gathers
  assert lookups(step, *helpers.on_devices(2, tree, x)) == 1


def test_rows_that_are_looked_up_again_are_not_kept_in_a_scan_either():
  """Both passes of each layer's loop hold one layer's rows at a time, so that temp hardly grows with the layers."""
  rows = jnp.repeat(jnp.arange(64), 8)
  sizes = jnp.array([200, 100, 212])

  def fn(p, x):
    layer = lambda x, w: (x + lax.ragged_dot(jnp.tanh(x)[rows], w, sizes)[::8], None)
    return lax.scan(layer, x, p["w"])[0]

  def temp(layers):
    tree, x = adapted({"w": single(1, (layers, 3, 32, 32))}, {"w": "ssio"}), single(9, (64, 32))
    return helpers.temp_bytes(sine_step(fn), tree, x)

  rows_of_a_layer = 4 * 64 * 8 * 32
  assert temp(9) - temp(1) < 0.75 * 8 * rows_of_a_layer


@pytest.mark.parametrize("targets", profiles.some([".*", "up"], "up"))
def test_experts_of_codes_are_formed_in_their_product_alone(targets):
  """With an adapter and without one: what differentiation keeps are codes."""
  floats = {name: w for name, w in weights(32, 64, jnp.float32).items() if name in PAIR}
  params = jaxlora.quantize(floats, "int8", axes=PAIR)
  config = jaxlora.LoraConfig(rank=2, targets=targets, axes={targets: "sio"})
  tree, x = trained(jaxlora.adapt(params, config, KEY)), single(9, (4, 32))
  helpers.check(pair, tree, (x,), 1e-5)
  report = jaxlora.explain(pair, tree, x)
  assert [use.factored for use in report.uses] == [True, True]
  assert not report.materialized
  kept = jax.eval_shape(lambda tree, x: jax.vjp(lambda x: jaxlora.wrap(pair)(tree, x), x)[1], tree, x)
  floats = [leaf for leaf in jax.tree.leaves(kept) if jnp.issubdtype(leaf.dtype, jnp.floating)]
  assert not any(leaf.shape[-3:] in ((3, 32, 64), (3, 64, 32)) for leaf in floats)


def lowered_for_tpus(experts, x):
  """A step with the factors of 3 terms for each expert."""
  tree = jaxlora.adapt({"w": single(1, (experts, 5, 7))}, jaxlora.LoraConfig(rank=3, axes={"w": "sio"}), KEY)
  fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.full(experts, 1))
  step = jax.jit(jaxlora.grad(lambda tree, x: jnp.sum(jnp.sin(jaxlora.wrap(fn, platform="tpu")(tree, x)))))
  return step.trace(tree, x).lower(lowering_platforms=("tpu",)).as_text()


@pytest.mark.parametrize(("experts", "grouped"), [(3, 1), (90, 1), (180, 4)])
def test_programs_for_tpus_compute_the_factors_of_all_experts_side_by_side(experts, grouped):
  """But for many terms in the forward pass: two thin products beside the base's, and the transpose of one."""
  text = lowered_for_tpus(experts, single(2, (4, 5)))
  assert text.count('"chlo.ragged_dot"') == grouped
  assert f"{experts}x4x5" not in text  # no copy of the rows for each expert
  # Rows times rank, turned before anything reads them.
  turned = re.search(r"(%\S+) = stablehlo.custom_call @LayoutConstraint.*dense<\[0, 1\]>.*-> tensor<4x3xf32>", text)
  assert re.search(rf"optimization_barrier {re.escape(turned[1])} : tensor<4x3xf32>", text)


@pytest.mark.parametrize("experts", [3, 180])
def test_so_do_programs_of_several_devices_each_with_the_factors_of_all(experts):
  """Of factors that are split a compiler would gather rows for, or sum results over the devices once more."""
  text = lowered_for_tpus(experts, helpers.place(helpers.mesh_of(data=4), single(2, (4, 5)), "data"))
  assert text.count('"chlo.ragged_dot"') == 1
  assert "LayoutConstraint" not in text
  held = re.findall(r"sdy.sharding_constraint .*<@empty_mesh, \[{}, {}, {}\]> : (tensor<\S+>)", text)
  assert {*held} == {f"tensor<{experts}x3x5xf32>", f"tensor<{experts}x3x7xf32>"}


@pytest.mark.parametrize("platform", ["cpu", "tpu", "none"])
def test_rows_of_no_group_may_hold_anything(platform):
  tree, x = adapted({"w": single(1, (3, 5, 7))}, {"w": "sio"}), single(2, (4, 5)).at[3].set(jnp.nan)
  wrapped = jaxlora.wrap(ONE, **helpers.POLICIES[platform].options)
  loss = lambda tree, x: jnp.sum(jnp.sin(wrapped(tree, x)))
  (value, grads), dx = jax.jit(jaxlora.value_and_grad(loss))(tree, x), jax.jit(jax.grad(loss, argnums=1))(tree, x)
  assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves((value, grads["w"].a, grads["w"].b, dx)))


@pytest.mark.nightly
def test_starts_from_data_see_the_rows_of_each_expert():
  params, x = {"w": single(1, (2, 6, 7))}, single(2, (8, 6))
  config = jaxlora.LoraConfig(rank=2, targets="w", axes={"w": "sio"})
  fn = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([5, 3]))
  tree = jaxlora.init_from_data(jaxlora.adapt(params, config, KEY), fn, [x], KEY)
  for expert, rows in enumerate((x[:5], x[5:])):
    main = np.linalg.svd(rows, full_matrices=False)[2][:2]
    a = np.asarray(tree["w"].a[expert])
    np.testing.assert_allclose(a @ main.T @ main, a, atol=1e-4 * np.abs(a).max())


def test_ranks_of_experts_that_a_token_meets_several_of():
  """A rank of r / k for each expert, where a token meets k of them: the documented option."""
  each = {"gate|up|down": {"rank": 2 // 2}}
  config = jaxlora.LoraConfig(rank=2, overrides=each, targets=[*EXPERTS, "router"], axes=EXPERTS)
  tree = jaxlora.adapt(weights(dtype=jnp.float32), config, KEY)
  assert {leaf.path: leaf.rank for leaf in jaxlora.summary(tree).leaves} == {"router": 2, "gate": 1, "up": 1, "down": 1}


def test_experts_whose_roles_disagree_with_their_use_are_an_error():
  tree = jaxlora.adapt({"experts": {"kernel": single(1, (5, 5))}}, jaxlora.LoraConfig(rank=2, targets=".*"), KEY)
  fn = lambda p, x: lax.ragged_dot(x, p["experts"]["kernel"].T[None], jnp.array([4]))
  with pytest.raises(
    ValueError, match=r"experts/kernel: roles 'io'.*ragged_dot_general.*axes=\{'experts/kernel': 'oi'\}"
  ):
    jaxlora.wrap(fn)(tree, single(2, (4, 5)))
  remedied = jaxlora.LoraConfig(rank=2, targets=".*", axes={"experts/kernel": "oi"})
  tree = trained(jaxlora.adapt({"experts": {"kernel": single(1, (5, 5))}}, remedied, KEY))
  helpers.check(fn, tree, (single(2, (4, 5)),), 1e-5)
