"""Banks of adapters, and batches whose rows use different ones: against each adapter running alone."""

import chex
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

WAYS = ("gathered", "row by row", "wide")
IDS = (2, -1, 0, 1, 2, 0)


def params_of(dtype=jnp.float32):
  return {
    "up": {"kernel": helpers.array(1, (6, 8), dtype), "bias": helpers.array(2, (8,), dtype)},
    "down": {"kernel": helpers.array(3, (8, 5), dtype), "bias": helpers.array(4, (5,), dtype)},
  }


def mlp(params, x):
  hidden = jnp.tanh(x @ params["up"]["kernel"] + params["up"]["bias"][(None,) * (x.ndim - 1)])
  return hidden @ params["down"]["kernel"] + params["down"]["bias"][(None,) * (x.ndim - 1)]


def adapter(seed, rank=2, alpha=3.0, targets=".*kernel", train=None, params=None, **more):
  params = params_of() if params is None else params
  config = jaxlora.LoraConfig(rank=rank, alpha=alpha, targets=targets, train=train, **more)
  return helpers.trained(jaxlora.adapt(params, config, jax.random.key(seed)), seed)


def adapters(dtype=jnp.float32):
  """Of different ranks, scales and leaves."""
  params = params_of(dtype)
  return [
    adapter(10, 1, 3, params=params),
    adapter(20, 2, 5, targets="up/kernel", params=params),
    adapter(30, 3, 7, train=["down/bias"], scaling="rslora", params=params),
  ]


def bank_of(trees, **options):
  return jaxlora.stack({f"adapter {k}": tree for k, tree in enumerate(trees)}, **options)


def data(rows=6, dtype=jnp.float32):
  return helpers.array(5, (rows, 4, 6), dtype)


def one_by_one(fn, base, trees, ids, *args):
  """Each row with its adapter alone."""
  rows = [
    jaxlora.wrap(fn)(trees[k] if k >= 0 else base, *(arg[row : row + 1] for arg in args)) for row, k in enumerate(ids)
  ]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def close(got, want, tolerance=1e-6):
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


def forms(bank):
  return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), bank.factors)


# ----------------------------------------------------------------------------------------------------------------------
# Rows.


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
@pytest.mark.parametrize("build", helpers.BUILDERS)
def test_every_kind_of_weight(build):
  case = helpers.BUILDERS[build](jnp.float64)
  trees = [case.adapted(), helpers.trained(case.adapted(), 5)]
  batch = [jnp.stack([arg, arg[::-1], arg]) for arg in case.args]
  fn = lambda p, *args: jax.tree.map(lambda out: out[None], case.fn(p, *(arg[0] for arg in args)))
  ids = np.asarray([1, 0, -1])
  with jax.numpy_rank_promotion("allow"):
    got = jax.jit(jaxlora.route(fn, on_materialize="ignore"))(case.params, bank_of(trees, capacity=9), ids, *batch)
    rows = [
      jaxlora.wrap(case.fn, on_materialize="ignore")(tree, *(arg[row] for arg in batch))
      for row, tree in enumerate((trees[1], trees[0], case.params))
    ]
  close(got, jax.tree.map(lambda *parts: jnp.stack(parts), *rows), 1e-9)


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
    want = jax.grad(loss(lambda half: jaxlora.wrap(mlp)(jaxlora.join(frozen, half), own)))(half)
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
  close(jax.jvp(routed, (x,), (jnp.cos(x),)), jax.jvp(alone, (x,), (jnp.cos(x),)), 1e-10)
  close(jax.grad(lambda x: jnp.sum(routed(x) ** 2))(x), jax.grad(lambda x: jnp.sum(alone(x) ** 2))(x), 1e-10)


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
  params = model.init(jax.random.key(0), jnp.ones((1, 6)))["params"]
  fn = lambda p, x: model.apply({"params": p}, x)
  trees = [
    helpers.trained(
      jaxlora.adapt(params, jaxlora.LoraConfig(rank=rank, axes={".*kernel": "sio"}), jax.random.key(1)), rank
    )
    for rank in (1, 2)
  ]
  bank, x, ids = bank_of(trees, capacity=30), data(3), (1, -1, 0)
  assert bank.factors["layers/kernel"].a.shape == (30, 3, 2, 6)
  routed = jaxlora.route(fn, via=via)
  close(jax.jit(routed)(params, bank, jnp.asarray(ids), x), one_by_one(fn, params, trees, ids, x))
  loss = lambda bank: jnp.sum(routed(params, bank, jnp.asarray(ids), x) ** 2)
  got = jax.jit(jax.grad(loss))(bank).factors["layers/kernel"]
  frozen, half = jaxlora.split(jaxlora.pad(trees[1]))
  want = jax.grad(lambda half: jnp.sum(jaxlora.wrap(fn)(jaxlora.join(frozen, half), x[:1]) ** 2))(half)
  close([got.a[1], got.b[1]], [want["layers"]["kernel"].a, want["layers"]["kernel"].b], 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Decoding beside a cache.


class Decoder(nn.Module):
  """A layer of attention with a cache of keys and values."""

  @nn.compact
  def __call__(self, x):
    return nn.MultiHeadDotProductAttention(2, decode=True, name="attention")(x) + nn.Dense(8, name="mlp")(x)


@pytest.mark.usefixtures("lenient")
@pytest.mark.parametrize("capacity", [2, 40])  # few enough for a wide product, and not
def test_decoding_with_a_cache(capacity):
  model = Decoder()
  whole = jnp.zeros((1, 5, 8))
  variables = model.init(jax.random.key(0), whole)
  params, steps = variables["params"], 4
  config = jaxlora.LoraConfig(rank=2, targets=".*kernel")
  probe = lambda p: model.apply({"params": p, "cache": variables["cache"]}, whole[:, :1], mutable=["cache"])[0]
  trees = [
    helpers.trained(jaxlora.adapt(params, config, jax.random.key(k), probe=probe), k) for k in range(capacity > 1 and 2)
  ]
  bank, ids, x = bank_of(trees, capacity=capacity), (1, -1, 0), helpers.array(1, (3, 1, 8), jnp.float32)

  def cache_of(rows):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((rows, 5, 8)))["cache"]
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

  def step(p, cache, x):
    y, new = model.apply({"params": p, "cache": cache}, x, mutable=["cache"])
    return new["cache"], jnp.tanh(y)

  def generate(p, cache, x):
    """All steps in one loop."""
    body = lambda state: (state[0] + 1, *step(p, *state[1:]))
    return lax.while_loop(lambda state: state[0] < steps, body, (0, cache, x))[1:]

  def alone(p, x):
    return generate(p, cache_of(1), x)[1]

  want = one_by_one(alone, params, trees, ids, x)
  cache, y = jax.jit(jaxlora.route(generate))(params, bank, jnp.asarray(ids), cache_of(3), x)
  close(y, want)
  assert cache["attention"]["cache_index"].shape == ()  # shared by all rows
  stepped = jax.jit(jaxlora.route(step))
  state = cache_of(3), x
  for _ in range(steps):
    state = stepped(params, bank, jnp.asarray(ids), *state)
  close(state, (cache, y))
  text = stepped.lower(params, bank, jnp.asarray(ids), *state).as_text()
  assert "scatter" not in text  # rows write to one place of their caches


# ----------------------------------------------------------------------------------------------------------------------
# Nothing compiles twice.


def test_a_hundred_swaps_compile_nothing():
  params, x = params_of(), data()
  frozen, _ = jaxlora.split(adapter(0))
  trees = [adapter(k, rank=1 + k % 3, alpha=1.0 + k) for k in range(4)]
  routed = jax.jit(chex.assert_max_traces(jaxlora.route(mlp), 1))
  joined = jax.jit(chex.assert_max_traces(lambda frozen, half, x: jaxlora.wrap(mlp)(jaxlora.join(frozen, half), x), 1))
  bank = jaxlora.stack({"first": trees[0]}, capacity=3, rank=3)
  ids = np.random.default_rng(0)
  for k in range(100):
    half = jaxlora.pad(jaxlora.split(trees[k % 4])[1], 3)
    bank = bank.put(f"number {k}", trees[k % 4], donate=True)
    row = int(bank.ids([f"number {k}"])[0])
    mix = ids.choice([row, int(bank.ids(["first"])[0]), -1], 6)
    out = routed(params, bank, mix, x)
    alone = joined(frozen, half, x)
    if row in mix and k % 25 == 0:
      close(out[mix == row], alone[mix == row])
    bank = bank.remove(f"number {k}", donate=True)
  assert bank.names == ("first",)
  again = jaxlora.stack({"other": trees[3]}, capacity=3, rank=3)
  routed(params, again, np.asarray([0] * 6), x)
  joined(frozen, again.take("other"), x)


def test_writing_in_place_takes_the_old_bank():
  bank = bank_of(adapters(), capacity=5)
  old = bank.factors["up/kernel"].a
  new = bank.put("new", adapter(1), donate=True)
  assert old.is_deleted()
  assert new.put("newer", adapter(2)).remove("new").names == ("adapter 0", "adapter 1", "adapter 2", "newer")
  assert not new.factors["up/kernel"].a.is_deleted()


# ----------------------------------------------------------------------------------------------------------------------
# What is in a bank.


def test_put_remove_take():
  trees, params, x = adapters(), params_of(), data(2)
  bank = bank_of(trees, capacity=4)
  assert bank.names == ("adapter 0", "adapter 1", "adapter 2")
  assert (len(bank), bank.capacity, "adapter 1" in bank, "else" in bank, None in bank) == (3, 4, True, False, False)
  np.testing.assert_array_equal(bank.ids(["adapter 2", None, "adapter 0"]), [2, -1, 0])
  for k, tree in enumerate(trees):
    frozen, half = jaxlora.split(tree)
    taken = bank.take(f"adapter {k}")
    close(jaxlora.wrap(mlp)(jaxlora.join(frozen, taken), x), jaxlora.wrap(mlp)(tree, x))
    assert jax.tree.structure(taken) == jax.tree.structure(jaxlora.pad(half, 3))
  without = bank.remove("adapter 1")
  assert without.names == ("adapter 0", "adapter 2")
  assert bank.names == ("adapter 0", "adapter 1", "adapter 2")
  routed = jax.jit(jaxlora.route(mlp))
  close(routed(params, without, jnp.asarray([1, 1]), x), mlp(params, x))
  new = adapter(9)
  replaced = without.put("adapter 0", new).put("fourth", trees[1])
  assert replaced.names == ("adapter 0", "fourth", "adapter 2")
  close(
    routed(params, replaced, replaced.ids(["adapter 0", "fourth"]), x),
    one_by_one(mlp, params, [new, trees[1]], (0, 1), x),
  )
  assert forms(replaced) == forms(bank)


def test_halves_and_whole_trees_make_one_bank():
  trees = adapters()
  halves = bank_of([jaxlora.split(tree)[1] for tree in trees])
  jax.tree.map(np.testing.assert_array_equal, halves.factors, bank_of(trees).factors)


def test_memory_is_the_adapters_own():
  bank = bank_of([adapter(k) for k in range(4)])
  own = sum(leaf.nbytes for leaf in jax.tree.leaves(jaxlora.split(adapter(0))[1]))
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(bank)) == 4 * (own + 2 * 4)  # and who has each of two leaves
  assert f"{4 * (own + 8):,} bytes" in repr(bank)


def test_half_precision_bases_keep_finer_factors():
  params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params_of())
  trees = [adapter(k, params=params, dtype="float32") for k in range(2)]
  bank, x = bank_of(trees, capacity=50), data(3, jnp.bfloat16)
  got = jax.jit(jaxlora.route(mlp))(params, bank, jnp.asarray([1, -1, 0]), x)
  assert got.dtype == jnp.bfloat16
  want = one_by_one(mlp, params, trees, (1, -1, 0), x)
  np.testing.assert_allclose(np.asarray(got, np.float32), np.asarray(want, np.float32), atol=0.1, rtol=0.05)


def test_a_diverged_adapter_does_not_get_in_and_harms_nobody_else():
  trees, params, x = adapters(), params_of(), data()
  bank = bank_of(trees, capacity=9)
  diverged = jax.tree.map(lambda leaf: leaf * jnp.asarray(jnp.inf, leaf.dtype), jaxlora.split(trees[0])[1])
  with pytest.raises(ValueError, match=r"'adapter 0': (up|down)/kernel: found NaN or infinite values in a, b"):
    bank.put("adapter 0", diverged)
  with pytest.raises(ValueError, match="found NaN or infinite"):
    jaxlora.stack({"x": diverged})
  bank = jax.tree.map(lambda leaf: leaf if leaf.ndim < 3 else leaf.at[0].set(jnp.nan), bank)  # as training may leave it
  for via in WAYS[:2]:  # a wide product sums over everybody
    out = jaxlora.route(mlp, via=via)(params, bank, np.asarray(IDS), x)
    assert np.array_equal(np.isnan(out).any((1, 2)), np.asarray(IDS) == 0)


# ----------------------------------------------------------------------------------------------------------------------
# The axes of a batch.


def test_rows_along_other_axes_and_results_of_all_kinds():
  def fn(params, x, table, scale, flag):
    y = mlp(params, x[..., 0] * scale)
    return {"y": y.T, "loss": jnp.sum(y), "table": table * 2, "static": flag, "count": jnp.asarray(3)}

  params, trees, x = params_of(), adapters(), helpers.array(5, (1, 6, 3), jnp.float32)  # rows last
  routed = jaxlora.route(
    fn, in_axes=(2, None, 0, 0), out_axes={"y": 1, "loss": 0, "table": None, "static": 0, "count": 0}
  )
  out = jax.jit(lambda *args: {k: v for k, v in routed(*args, "yes").items() if k != "static"})(
    params, bank_of(trees), jnp.asarray([0, -1, 2]), x, jnp.arange(4.0), 0.5
  )
  want = one_by_one(mlp, params, trees, (0, -1, 2), x[0].T * 0.5)
  close(out, {"y": want.T, "loss": want.sum(1), "table": 2 * jnp.arange(4.0), "count": jnp.asarray(3)}, 1e-5)
  assert routed(params, bank_of(trees), np.asarray([0, -1, 2]), x, jnp.arange(4.0), 0.5, "yes")["static"] == "yes"


def test_explain_reports_the_way():
  params, x = params_of(), data()
  report = lambda capacity, x: {
    use.way for use in jaxlora.explain(jaxlora.route(mlp), params, bank_of(adapters(), capacity=capacity), IDS, x).uses
  }
  few_tokens, many = x[:, :1], jnp.tile(x, (1, 30, 1))
  assert report(4, few_tokens) == {"wide"}
  assert report(40, few_tokens) == {"row by row"}
  assert report(40, many) == {"gathered"}
  for via in WAYS:
    explanation = jaxlora.explain(jaxlora.route(mlp, via=via), params, bank_of(adapters()), np.asarray(IDS), x)
    assert f"factored, {via}" in str(explanation)
    assert explanation.unused == ()


def test_a_whole_weight_is_reported():
  fn = lambda p, x: x @ jnp.sin(p["up"]["kernel"])
  params, trees, x = params_of(), adapters(), data()
  with pytest.warns(jaxlora.MaterializeWarning, match="up/kernel"):
    got = jaxlora.route(fn)(params, bank_of(trees), np.asarray(IDS), x)
  close(
    got, jnp.concatenate([fn(jaxlora.merge(trees[k]) if k >= 0 else params, x[i : i + 1]) for i, k in enumerate(IDS)])
  )
  with pytest.raises(jaxlora.MaterializeError):
    jaxlora.route(fn, on_materialize="error")(params, bank_of(trees), np.asarray(IDS), x)


def test_base_products_are_flat():
  """One product of all rows' tokens with the base, as for a plain batch; no row has a base of its own."""
  params, x = params_of(), data()
  bank = bank_of(adapters(), capacity=50)
  compiled = jax.jit(jaxlora.route(mlp, via="gathered")).lower(params, bank, jnp.asarray(IDS), x).compile()
  flops = compiled.cost_analysis()["flops"]
  plain = jax.jit(mlp).lower(params, x).compile().cost_analysis()["flops"]
  factors = 2 * x.shape[0] * x.shape[1] * sum(3 * (i + o) for i, o in ((6, 8), (8, 5)))
  assert flops <= plain + 2.5 * factors


@pytest.mark.parametrize("variant", ["lora_fa", "vera", "adalora", "loha", "lokr"])
def test_variants_are_served_as_the_factors_that_they_come_to(variant):
  trees, params = [adapter(10, variant=variant), adapter(20, 3)], params_of()
  x = data()
  want = one_by_one(mlp, params, trees, (0, 1, -1, 0, 1, -1), x)
  close(jax.jit(jaxlora.route(mlp))(params, bank_of(trees), jnp.asarray([0, 1, -1, 0, 1, -1]), x), want, 3e-6)
  with pytest.raises(ValueError, match="has parts that are frozen, in the other half"):
    bank_of([jaxlora.split(trees[0])[1]])


def test_an_initialiser_that_starts_away_from_zero_is_served():
  trees, params, x = [adapter(10, init="pissa"), adapter(20, 3)], params_of(), data()
  want = one_by_one(mlp, params, trees, (0, 1, -1, 0, 1, -1), x)
  close(jax.jit(jaxlora.route(mlp))(params, bank_of(trees), jnp.asarray([0, 1, -1, 0, 1, -1]), x), want, 3e-6)


# ----------------------------------------------------------------------------------------------------------------------
# Bad input.


def test_a_gain_over_outputs_has_no_place_in_a_bank():
  with pytest.raises(ValueError, match="'adapter 0': down/kernel: the variant 'dora' scales the outputs"):
    bank_of([adapter(10, variant="dora")])
  with pytest.raises(ValueError, match="the variant 'dora' scales the outputs"):
    bank_of(adapters()).put("x", adapter(10, variant="dora"))


def test_a_bank_knows_its_base_by_its_values():
  bank, other = bank_of(adapters(), capacity=5), jax.tree.map(jnp.sin, params_of())
  with pytest.raises(ValueError, match=r"bank.put: 'x': the base is another one than the bank's, in .*up/kernel"):
    bank.put("x", adapter(4, params=other))
  with pytest.raises(ValueError, match=r"route: frozen: the base is another one than the bank's, in .*up/kernel"):
    jaxlora.route(mlp)(other, bank, np.asarray(IDS), data())
  assert bank.put("x", adapter(4)).names[-1] == "x"
  half = bank_of([jaxlora.split(tree)[1] for tree in adapters()])  # came without a base: shapes are all there is
  jaxlora.route(mlp)(other, half, np.asarray(IDS), data())


def other_base():
  params = params_of()
  params["up"]["kernel"] = jnp.ones((7, 8))
  return params


BAD_STACKS = {
  "no adapters": (lambda: {}, {}, ValueError, "no adapters"),
  "name": (lambda: {3: adapter(0)}, {}, TypeError, "name is a string"),
  "capacity": (lambda: {"x": adapter(0), "y": adapter(1)}, {"capacity": 1}, ValueError, "2 adapters, .* capacity of 1"),
  "rank": (lambda: {"x": adapter(0, 3)}, {"rank": 2}, ValueError, "'x': (up|down)/kernel: rank 3 is above .* 2"),
  "not a rank": (lambda: {"x": adapter(0)}, {"rank": 0}, ValueError, "rank is 0"),
  "frozen half": (lambda: {"x": jaxlora.split(adapter(0))[0]}, {}, ValueError, "frozen half"),
  "plain": (lambda: {"x": params_of()}, {}, ValueError, "no adapted leaf"),
  "other shapes": (
    lambda: {"x": adapter(0), "y": adapter(1, params=other_base())}, {}, ValueError, "'y': up/kernel: factor a "
  ),
  "other values": (
    lambda: {"x": adapter(0), "y": adapter(1, params=jax.tree.map(jnp.sin, params_of()))},
    {},
    ValueError,
    "'y': the base is another one than the bank's, in .*up/kernel",
  ),
  "other nesting": (
    lambda: {"x": adapter(0), "y": adapter(1, params=params_of()["up"])}, {}, ValueError, "'y': the tree is nested"
  ),
  "other roles": (
    lambda: {"x": adapter(0), "y": adapter(1, axes={"up/kernel": "oi"})}, {}, ValueError, "'y': up/kernel: roles 'oi'"
  ),
  "whole and not": (
    lambda: {"x": adapter(0), "y": adapter(1, targets="up/kernel", train=["down/kernel"])},
    {},
    ValueError,
    "'y': down/kernel is trained whole",
  ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_STACKS)
def test_bad_stacks(case):
  make, options, error, message = BAD_STACKS[case]
  with pytest.raises(error, match=message):
    jaxlora.stack(make(), **options)


BAD_PUTS = {
  "full": (lambda: ("new", adapter(1)), {"capacity": 1}, "the bank is full: 1 adapters"),
  "rank": (lambda: ("new", adapter(1, 3)), {"capacity": 2}, "rank 3 is above the bank's, 2"),
  "leaf": (lambda: ("new", adapter(1, train=["up/bias"])), {"capacity": 2}, "up/bias, for which the bank has no room"),
  "base": (lambda: ("new", adapter(1, params=other_base())), {"capacity": 2}, "up/kernel: factor a has shape"),
}


@pytest.mark.parametrize("case", BAD_PUTS)
def test_bad_puts_leave_the_bank_as_it_was(case):
  make, options, message = BAD_PUTS[case]
  bank = bank_of([adapter(0)], **options)
  before = jax.tree.map(np.array, bank.factors)
  with pytest.raises(ValueError, match=message):
    bank.put(*make(), donate=True)
  assert bank.names == ("adapter 0",)
  jax.tree.map(np.testing.assert_array_equal, bank.factors, before)


def test_unknown_names():
  bank = bank_of([adapter(0)])
  for call in (bank.take, bank.remove, lambda name: bank.ids([name])):
    with pytest.raises(ValueError, match=r"no adapter 'else'; the bank holds 'adapter 0'"):
      call("else")


BAD_ROUTES = {
  "via": (lambda: jaxlora.route(mlp, via="magic"), ValueError, "via is 'magic'"),
  "on_materialize": (lambda: jaxlora.route(mlp, on_materialize="no"), ValueError, "on_materialize is 'no'"),
  "id above": (lambda: routed(ids=[0, 7]), ValueError, r"ids\[1\] is 7, expected -1 .* 0 to 2"),
  "id below": (lambda: routed(ids=[-2, 0]), ValueError, r"ids\[0\] is -2"),
  "empty slot": (lambda: routed(ids=[0, 2]), ValueError, r"ids\[1\] is 2, a slot of the bank that no adapter is in"),
  "id kind": (lambda: routed(ids=[0.0, 1.0]), TypeError, "expected integers"),
  "names": (lambda: routed(ids=["adapter 0", "adapter 1"]), TypeError, r"bank.ids\(names\)"),
  "id axes": (lambda: routed(ids=[[0, 1]]), ValueError, r"ids have shape \(1, 2\)"),
  "rows": (lambda: routed(ids=[0, 1, 1]), ValueError, "expected 3 rows along axis 0"),
  "no bank": (lambda: routed(bank={}), TypeError, "found dict for the bank"),
  "whole tree": (lambda: routed(frozen=adapter(0)), ValueError, "expected the base alone"),
  "trainable half": (lambda: routed(frozen=jaxlora.split(adapter(0))[1]), ValueError, "found a trainable half"),
  "other base": (lambda: routed(frozen=other_base()), ValueError, "up/kernel: the base has shape"),
  "other nesting": (lambda: routed(frozen={"up": params_of()["up"]}), ValueError, "nested otherwise"),
  "axes": (lambda: routed(in_axes=(0, 0)), ValueError, "in_axes"),
  "axis": (lambda: routed(in_axes="rows"), ValueError, "in_axes"),
  "no rows in the result": (lambda: routed(fn=lambda p, x: mlp(p, x)[0]), ValueError, "the result root .* size 1"),
  "differs": (lambda: routed(out_axes=None), ValueError, "differs from row to row"),
}


def routed(fn=mlp, frozen=None, bank=None, ids=(0, 1), **options):
  frozen = params_of() if frozen is None else frozen
  bank = bank_of([adapter(0), adapter(1)], capacity=3) if bank is None else bank
  return jaxlora.route(fn, **options)(frozen, bank, np.asarray(ids), data(2))


@pytest.mark.parametrize("case", BAD_ROUTES)
def test_bad_routes(case):
  call, error, message = BAD_ROUTES[case]
  with pytest.raises(error, match=message):
    call()


def test_ids_that_are_none_are_the_base_where_they_are_traced():
  params, x, bank = params_of(), data(4), bank_of(adapters())
  for via in WAYS:
    got = jax.jit(jaxlora.route(mlp, via=via))(params, bank, jnp.asarray([3, -2, 99, -1]), x)
    close(got, mlp(params, x))


def test_names_stay_outside():
  bank = bank_of(adapters())
  out = jax.jit(lambda bank: bank)(bank)
  with pytest.raises(ValueError, match=r"named_as"):
    out.ids(["adapter 0"])
  assert out.named_as(bank).names == bank.names
  assert "names unknown" in repr(out)
  with pytest.raises(ValueError, match="3 slots, this one 5"):
    bank_of(adapters(), capacity=5).named_as(bank)
  assert jax.tree.map(lambda leaf: leaf, bank).names == bank.names


def test_pad():
  trees = adapters()
  padded = [jaxlora.pad(jaxlora.split(tree)[1], 4) for tree in (trees[0], adapter(3, 4, 9))]
  assert jax.tree.structure(padded[0]) == jax.tree.structure(padded[1])
  x = data(2)
  for tree in trees:
    close(jaxlora.wrap(mlp)(jaxlora.pad(tree, 5), x), jaxlora.wrap(mlp)(tree, x))
    close(jaxlora.wrap(mlp)(jaxlora.pad(tree), x), jaxlora.wrap(mlp)(tree, x))
  with pytest.raises(ValueError, match="kernel: rank 3 is above 2"):
    jaxlora.pad(trees[2], 2)
  with pytest.raises(ValueError, match="rank is 0"):
    jaxlora.pad(trees[2], 0)
