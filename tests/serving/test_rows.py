"""Batches whose rows use different adapters, against each adapter running alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers
from tests.helpers import profiles
from tests.serving.banks import IDS, WAYS, adapters, bank_of, close, data, mlp, one_by_one, params_of


@pytest.mark.parametrize("via", WAYS)
def test_each_row_is_its_adapter_alone(via):
  trees, params = adapters(), params_of()
  bank, ids, x = bank_of(trees, capacity=5), jnp.asarray(IDS), data()
  want = one_by_one(mlp, params, trees, IDS, x)
  routed, order = jax.jit(jaxlora.route(mlp, via=via)), np.asarray([3, 0, 5, 1, 4, 2])
  close(routed(params, bank, ids, x), want)
  close(routed(params, bank, ids[order], x[order]), want[order])
  close(jaxlora.route(mlp)(jaxlora.split(trees[0])[0], bank, np.asarray(IDS), x), want)  # not compiled as one


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("build", profiles.every_other(b for b in helpers.BUILDERS if helpers.legal(b, "vmap")))
def test_every_kind_of_weight(build):
  case = helpers.BUILDERS[build](jnp.float64)
  trees = [case.adapted(), helpers.trained(case.adapted(), 5)]
  batch = [jnp.stack([arg, arg[::-1], arg]) for arg in case.args]
  fn = lambda p, *args: jax.tree.map(lambda out: out[None], case.fn(p, *(arg[0] for arg in args)))
  ids = np.asarray([1, 0, -1])
  with jax.numpy_rank_promotion("allow"):
    got = jax.jit(jaxlora.route(fn, on_materialize="ignore"))(case.params, bank_of(trees, capacity=9), ids, *batch)
    alone = jaxlora.wrap(case.fn, on_materialize="ignore")
    rows = lambda *trees: [alone(tree, *(arg[row] for arg in batch)) for row, tree in enumerate(trees)]
    want = jax.jit(lambda *trees: jax.tree.map(lambda *parts: jnp.stack(parts), *rows(*trees)))
  close(got, want(trees[1], trees[0], case.params), 1e-9)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
  ("wrapper", "via"), [*((w, "auto") for w in helpers.WRAPPERS), ("scan", "wide"), ("while", "wide"), ("remat", "wide")]
)
def test_control_flow(wrapper, via):
  case = helpers.BUILDERS["dense"](jnp.float64)
  inner = helpers.WRAPPERS[wrapper](case.fn)
  fn = lambda p, x: jax.tree.map(lambda out: out[None], inner(p, x[0]))
  trees = [case.adapted(), helpers.trained(case.adapted(), 5)]
  (x,) = case.args
  x = jnp.stack([x, x[::-1], x])
  ids = jnp.asarray([1, 0, -1])
  got = jax.jit(jaxlora.route(fn, via=via))(case.params, bank_of(trees, capacity=20), ids, x)
  want = jax.jit(lambda: one_by_one(fn, case.params, trees, (1, 0, -1), x))()
  close(got, want, 1e-10)


def test_padding_the_rank_changes_nothing():
  trees, x = adapters(), data()
  tight, wide = bank_of(trees), bank_of(trees, capacity=9, rank=7)
  assert wide.factors["up/kernel"].a.shape == (9, 7, 6)
  assert tight.factors["up/kernel"].a.shape == (3, 3, 6)
  routed = jaxlora.route(mlp, via="gathered")
  close(routed(params_of(), wide, np.asarray(IDS), x), routed(params_of(), tight, np.asarray(IDS), x))


@pytest.mark.parametrize("via", WAYS)
@pytest.mark.usefixtures("x64")
def test_gradients_come_from_an_adapters_own_rows(via):
  trees, params = adapters(jnp.float64), params_of(jnp.float64)
  bank, x = bank_of(trees, capacity=4), data(dtype=jnp.float64)
  ids = jnp.asarray([2, -1, 0, 0, 2, 0])  # nobody is 1
  loss = lambda fn: lambda *args: jnp.sum(jnp.sin(fn(*args)))
  routed = jax.checkpoint(jaxlora.route(mlp, via=via))
  got = jax.jit(jax.grad(loss(lambda bank: routed(params, bank, ids, x))))(bank)
  for name in ("up/kernel", "down/kernel"):
    assert not jnp.any(got.factors[name].a[jnp.asarray([1, 3])])
    assert not jnp.any(got.factors[name].b[jnp.asarray([1, 3])])
  for k in (0, 2):
    frozen, half = jaxlora.split(jaxlora.pad(trees[k]))
    own = x[np.flatnonzero(np.asarray(ids) == k)]
    want = jax.jit(jax.grad(loss(lambda half: jaxlora.wrap(mlp)(jaxlora.join(frozen, half), own))))(half)
    for layer in ("up", "down"):
      node, slots = want[layer]["kernel"], got.factors[f"{layer}/kernel"]
      close(slots.a[k][: node.rank], node.a, 1e-10)
      close(slots.b[k][: node.rank], node.b, 1e-10)
  close(got.factors["down/bias"].value[2], want["down"]["bias"].value, 1e-10)


@pytest.mark.usefixtures("x64")
def test_data_and_forward_mode_differentiate_too():
  trees, params = adapters(jnp.float64), params_of(jnp.float64)
  bank, x = bank_of(trees, capacity=40), data(dtype=jnp.float64)
  routed = lambda x: jaxlora.route(mlp)(params, bank, jnp.asarray(IDS), x)
  alone = lambda x: one_by_one(mlp, params, trees, IDS, x)
  both_ways = lambda fn: lambda x: (jax.jvp(fn, (x,), (jnp.cos(x),)), jax.grad(lambda x: jnp.sum(fn(x) ** 2))(x))
  close(jax.jit(both_ways(routed))(x), jax.jit(both_ways(alone))(x), 1e-10)


def test_vmap_of_route():
  trees, params, x = adapters(), params_of(), data()
  bank = bank_of(trees, capacity=12)
  mixes = jnp.asarray([IDS, IDS[::-1]])
  got = jax.vmap(jaxlora.route(mlp), in_axes=(None, None, 0, None))(params, bank, mixes, x)
  close(got, jnp.stack([one_by_one(mlp, params, trees, mix, x) for mix in (IDS, IDS[::-1])]))


def test_many_adapters_train_in_one_batch():
  params, x = params_of(), data()
  start = [jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(k)) for k in range(2)]
  bank, ids = bank_of(start), jnp.asarray([0, 0, 0, 1, 1, 1])
  y = jnp.sin(helpers.array(9, (6, 4, 5), jnp.float32))

  @jax.jit
  def step(bank):
    loss = lambda bank: jnp.mean((jaxlora.route(mlp)(params, bank, ids, x) - y) ** 2)
    value, grads = jax.value_and_grad(loss)(bank)
    return jax.tree.map(lambda leaf, grad: leaf - jnp.asarray(0.3, leaf.dtype) * grad, bank, grads), value

  trained, before = step(bank)
  for _ in range(30):
    trained, after = step(trained)
  assert after < 0.7 * before
  with pytest.raises(ValueError, match="named_as"):
    trained.take("adapter 0")
  trained = trained.named_as(bank)
  half = trained.take("adapter 1")
  alone = jaxlora.wrap(mlp)(jaxlora.join(jaxlora.split(jaxlora.pad(start[1]))[0], half), x[3:])
  close(alone, jaxlora.route(mlp)(params, trained, ids, x)[3:], 1e-5)


class Scanned(nn.Module):
  """A stack of layers as one, each of them recomputed."""

  @nn.compact
  def __call__(self, x):
    body = nn.remat(nn.Dense, prevent_cse=False)
    scanned = nn.scan(
      lambda layer, x, _: (jnp.tanh(layer(x)), None), variable_axes={"params": 0}, split_rngs={"params": True}, length=3
    )
    return scanned(body(6, name="layers"), x, None)[0]


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("via", ["auto", "wide"])
def test_scanned_layers(via):
  model = Scanned()
  params = jax.jit(model.init)(jax.random.key(0), np.ones((1, 6), np.float32))["params"]
  fn = lambda p, x: model.apply({"params": p}, x)
  trees = [helpers.adapted(params, 1, seed=rank, rank=rank, axes={".*kernel": "sio"}) for rank in (1, 2)]
  bank, x, ids = bank_of(trees, capacity=30), data(3), (1, -1, 0)
  assert bank.factors["layers/kernel"].a.shape == (30, 3, 2, 6)
  routed = jaxlora.route(fn, via=via)
  want = jax.jit(lambda: one_by_one(fn, params, trees, ids, x))()
  close(jax.jit(routed)(params, bank, jnp.asarray(ids), x), want)
  loss = lambda bank: jnp.sum(routed(params, bank, jnp.asarray(ids), x) ** 2)
  got = jax.jit(jax.grad(loss))(bank).factors["layers/kernel"]
  frozen, half = jaxlora.split(jaxlora.pad(trees[1]))
  want = jax.jit(jax.grad(lambda half: jnp.sum(jaxlora.wrap(fn)(jaxlora.join(frozen, half), x[:1]) ** 2)))(half)
  close([got.a[1], got.b[1]], [want["layers"]["kernel"].a, want["layers"]["kernel"].b], 1e-5)


def test_ids_that_are_none_are_the_base_where_they_are_traced():
  params, x, bank = params_of(), data(4), bank_of(adapters())
  for via in WAYS:
    got = jax.jit(jaxlora.route(mlp, via=via))(params, bank, jnp.asarray([3, -2, 99, -1]), x)
    close(got, mlp(params, x))
