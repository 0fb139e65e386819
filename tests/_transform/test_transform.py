"""`wrap` on whole programs: what it cannot keep factored, other transformations around it, flax, dropout, meshes."""

import re
import warnings

from flax import nnx, serialization
import flax.linen as nn
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jaxlora
from jaxlora import _compat
from tests import helpers

KEY = jax.random.key(0)


def one_weight(shape=(5, 7), seed=1, **fields):
  params = {"w": helpers.array(seed, shape, jnp.float32)}
  config = jaxlora.LoraConfig(**{"rank": 2, "alpha": 3, "targets": "w"} | fields)
  return helpers.trained(jaxlora.adapt(params, config, KEY))


X = helpers.array(2, (3, 5), jnp.float32)


# ----------------------------------------------------------------------------------------------------------------------
# Never wrong, never silent.


def use_whole(p, x):
  return x @ jnp.sin(p["w"])


def test_a_primitive_without_a_rule_materialises_and_warns_once_with_path_primitive_and_line():
  tree = one_weight()
  wrapped = jaxlora.wrap(use_whole)
  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    first = wrapped(tree, X)
  (warning,) = caught
  text = str(warning.message)
  assert text.startswith("w: base + A B was formed as one array at `sin`")
  assert "test_transform.py" in text
  assert "use_whole" in text
  with warnings.catch_warnings():
    warnings.simplefilter("error")
    second = jax.jit(wrapped)(tree, X)  # the same place: no second warning
  helpers.assert_close(first, use_whole(jaxlora.merge(tree), X), 1e-5)
  helpers.assert_close(second, first, 1e-5)


def test_materialising_can_be_forbidden_or_allowed():
  tree = one_weight()
  with pytest.raises(jaxlora.MaterializeError, match=r"w: base \+ A B was formed as one array at `sin`.*Exclude"):
    jaxlora.wrap(use_whole, on_materialize="error")(tree, X)
  helpers.check(use_whole, tree, (X,), 1e-5, on_materialize="ignore")


@jax.custom_jvp
def clipped(w):
  return jnp.clip(w, -0.5, 0.5)


@clipped.defjvp
def _(primals, tangents):
  return clipped(*primals), 3 * tangents[0]  # unlike the derivative of the body


@jax.custom_vjp
def quantised_product(x, w):
  return x @ jnp.round(w * 8) / 8


quantised_product.defvjp(
  lambda x, w: (quantised_product(x, w), (x, w)), lambda kept, g: (5 * g @ kept[1].T, 7 * kept[0].T @ g)
)


@pytest.mark.parametrize(
  "fn",
  [lambda p, x: x @ clipped(p["w"]), lambda p, x: quantised_product(x, p["w"]), lambda p, x: x @ jax.nn.relu(p["w"])],
  ids=["custom_jvp", "custom_vjp", "relu"],
)
def test_custom_derivative_rules_hold(fn):
  tree = one_weight()
  helpers.check(fn, tree, (X,), 1e-5, on_materialize="ignore")
  with pytest.raises(jaxlora.MaterializeError, match="derivative or batching rule of its own"):
    jaxlora.wrap(fn, on_materialize="error")(tree, X)


@pytest.mark.parametrize(
  ("fn", "why"),
  [
    (lambda p, x: x @ p["w"] @ p["w"].T @ p["w"], None),
    (lambda p, x: p["w"].T @ p["w"], "product of two adapted weights"),
    (lambda p, x: x[:1] * jnp.sum(p["w"] * 2), "no rule keeps a weight factored through `reduce_sum`"),
    (lambda p, x: jnp.einsum("bi,io->", x, p["w"]), "across roles|reduce_sum"),
    (lambda p, x: x @ p["w"].reshape(7, 5).T, "merges axes of different roles"),
    (lambda p, x: x @ p["w"].astype(jnp.int32).astype(jnp.float32), "a cast to int32"),
    (lambda p, x: p, "the function returns it"),
    (lambda p, x: lax.scan(lambda c, row: (c + row, row * 2), jnp.zeros(7), p["w"]), "has role 'i', not 's'"),
    (lambda p, x: lax.fori_loop(0, 3, lambda _, w: w * 2, p["w"]), "a loop carries it and changes it"),
    (lambda p, x: lax.cond(x[0, 0] > 0, lambda w: w, lambda w: -w, p["w"]), "it leaves a branch as a result"),
    (lambda p, x: lax.scan(lambda c, _: (c, p["w"].T), 0.0, length=2)[1], "the function returns it"),
    (lambda p, x: jnp.where(x[0, 0] > 0, p["w"], 0.0), "select_n"),
    (lambda p, x: p["w"][jnp.array([0, 1]), jnp.array([2, 3])], "whole slices along one axis"),
    (lambda p, x: lax.conv_general_dilated(p["w"][None], x[:, :, None], (1,), "SAME"), "as its input"),
    (lambda p, x: 2.0 / p["w"], "not a scalar"),
    (lambda p, x: p["w"] * jnp.ones((1, 7)), "not a scalar"),
  ],
)
def test_what_cannot_stay_factored_is_still_right(fn, why):
  tree = one_weight()
  with jax.numpy_rank_promotion("allow"):
    wrapped = jaxlora.wrap(fn, on_materialize="ignore")
    helpers.assert_close(wrapped(tree, X), fn(jaxlora.merge(tree), X), 1e-5)
    if why is None:
      assert not jaxlora.explain(fn, tree, X).materialized
    else:
      with pytest.raises(jaxlora.MaterializeError, match=why):
        jaxlora.wrap(fn, on_materialize="error")(tree, X)


@pytest.mark.parametrize("wrap", ["scan", "cond", "jit", "remat", "shard_map", "while"])
def test_control_flow_of_an_unknown_form_materialises_instead_of_crashing(wrap, monkeypatch):
  """A JAX to come may name the parameters of its control flow otherwise."""
  from jaxlora import _transform

  monkeypatch.setattr(_compat, "scan_counts", lambda params: None)
  monkeypatch.setattr(_transform, "_PARAMETERS", dict.fromkeys(_transform._PARAMETERS, ("unheard_of",)))
  case = helpers.BUILDERS["dense"](jnp.float32)
  fn = helpers.WRAPPERS[wrap](case.fn)
  tree = case.adapted()
  with pytest.raises(jaxlora.MaterializeError, match="this version of JAX describes"):
    jaxlora.wrap(fn, on_materialize="error")(tree, *case.args)
  got = jax.jit(jaxlora.wrap(fn, on_materialize="ignore"))(tree, *case.args)
  helpers.assert_close(got, jax.jit(helpers.oracle(fn))(tree, *case.args), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# Transformations around the wrapped function.


def test_eager_calls_equal_jitted_ones():
  case = helpers.BUILDERS["attention"](jnp.float32)
  tree, wrapped = case.adapted(), jaxlora.wrap(case.fn)
  helpers.assert_close(wrapped(tree, *case.args), jax.jit(wrapped)(tree, *case.args), 1e-5)


def test_vmap_over_data_and_over_trees():
  trees = [one_weight(seed=seed) for seed in (1, 5)]
  stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)
  wrapped = jaxlora.wrap(lambda p, x: jnp.tanh(x @ p["w"]), on_materialize="error")
  got = jax.vmap(wrapped, in_axes=(0, None))(stacked, X)
  helpers.assert_close(got, jnp.stack([wrapped(tree, X) for tree in trees]), 1e-5)
  got = jax.vmap(wrapped, in_axes=(None, 0))(trees[0], X)
  helpers.assert_close(got, wrapped(trees[0], X), 1e-5)


def test_second_derivatives_and_forward_mode(x64):
  case = helpers.BUILDERS["dense"](jnp.float64)
  frozen, trainable = jaxlora.split(case.adapted())
  nonlinear = lambda p, x: jnp.sum(jnp.tanh(case.fn(p, x)))
  of = lambda f: lambda t: f(jaxlora.join(frozen, t), *case.args)
  got, want = (jax.jit(jax.hessian(of(f)))(trainable) for f in (jaxlora.wrap(nonlinear), helpers.oracle(nonlinear)))
  helpers.assert_close(got, want, 1e-11)
  got, want = (jax.jit(jax.jacfwd(of(f)))(trainable) for f in (jaxlora.wrap(nonlinear), helpers.oracle(nonlinear)))
  helpers.assert_close(got, want, 1e-12)


def test_the_base_gets_no_gradient():
  tree = one_weight()
  grads = jax.grad(lambda t: jnp.sum(jaxlora.wrap(lambda p, x: jnp.tanh(x @ p["w"]))(t, X)))(tree)
  assert not grads["w"].base.any()
  assert grads["w"].a.any()


def test_wrapping_twice_and_plain_trees():
  tree = one_weight()
  fn = lambda p, x: x @ p["w"]
  twice = jaxlora.wrap(jaxlora.wrap(fn))
  helpers.assert_close(twice(tree, X), fn(jaxlora.merge(tree), X), 1e-5)
  np.testing.assert_array_equal(jaxlora.wrap(fn)(jaxlora.strip(tree), X), fn(jaxlora.strip(tree), X))


def test_only_arrays_are_traced():
  """Strings, bools, numbers and callables reach the function as they are, and come back so."""
  tree = one_weight()

  def fn(p, x, mode, *, flip, times, activation):
    assert mode == "train"
    assert flip is True
    return {"y": activation(x @ p["w"]) * times, "mode": mode, "times": times, "none": None}

  out = jaxlora.wrap(fn)(tree, np.asarray(X), "train", flip=True, times=2, activation=jnp.tanh)
  assert (out["mode"], out["times"], out["none"]) == ("train", 2, None)
  helpers.assert_close(out["y"], jnp.tanh(X @ jaxlora.merge(tree)["w"]) * 2, 1e-5)


def test_the_signature_is_kept():
  def documented(p, x):
    """What it does."""

  assert jaxlora.wrap(documented).__name__ == "documented"
  assert jaxlora.wrap(documented).__doc__ == "What it does."


def test_donation_inside_and_outside():
  tree = one_weight()
  inner = jax.jit(lambda p, x: jnp.tanh(x @ p["w"]), donate_argnums=(0, 1))
  fn = lambda p, x: inner(p, x * 1)
  want = jnp.tanh(X @ jaxlora.merge(tree)["w"])
  helpers.assert_close(jaxlora.wrap(fn, on_materialize="error")(tree, X), want, 1e-5)
  frozen, trainable = jaxlora.split(tree)

  def step(trainable, frozen, x):
    grads = jax.grad(lambda t: jnp.sum(jaxlora.wrap(fn)(jaxlora.join(frozen, t), x)))(trainable)
    return jax.tree.map(jnp.subtract, trainable, grads)

  moved = jax.jit(step, donate_argnums=0)(trainable, frozen, X)
  assert trainable["w"].a.is_deleted()
  assert not frozen["w"].base.is_deleted()
  assert moved["w"].a.shape == (2, 5)


def test_effects_keep_happening(capsys):
  def fn(p, x):
    def body(x, _):
      jax.debug.print("norm {}", jnp.sum(x * 0))
      return jnp.tanh(x @ p["w"]), None

    return lax.scan(body, x, length=2)[0]

  tree = one_weight((5, 5))
  out = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(tree, X)
  jax.effects_barrier()
  assert capsys.readouterr().out.count("norm 0.0") == 2
  assert out.shape == (3, 5)


def test_name_stacks_and_shardings_of_inner_jits_survive():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
  inner = jax.jit(lambda p, x: jnp.tanh(x @ p["w"]), in_shardings=(None, sharding), out_shardings=sharding)

  def fn(p, x):
    with jax.named_scope("my_layer"):
      return inner(p, x)

  tree, x = one_weight(), helpers.array(3, (16, 5), jnp.float32)
  compiled = jax.jit(jaxlora.wrap(fn, on_materialize="error")).lower(tree, x).compile()
  assert "my_layer" in compiled.as_text()
  out = compiled(tree, x)
  assert out.sharding.is_equivalent_to(sharding, out.ndim)
  helpers.assert_close(np.asarray(out), np.asarray(fn(jaxlora.merge(tree), x)), 1e-5)


@pytest.mark.parametrize("spec", [("model", None), (None, "model"), (None, None)])
@pytest.mark.parametrize("build", ["dense", "attention"])
def test_sharded_bases_and_batches(spec, build):
  mesh = jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2, devices=jax.devices()[:4]
  )
  place = lambda leaf, *names: jax.device_put(
    leaf, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
  )
  weights = {"w": helpers.array(1, (6, 8), jnp.float32)}
  tree = helpers.trained(jaxlora.adapt(weights, jaxlora.LoraConfig(rank=2, targets="w"), KEY))
  x = helpers.array(2, (4, 3, 6), jnp.float32)
  fn = lambda p, x: jnp.tanh(x @ p["w"])
  expected = fn(jaxlora.merge(tree), x)
  import dataclasses

  placed = {"w": dataclasses.replace(tree["w"], base=place(tree["w"].base, *spec))}
  got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(placed, place(x, "data"))
  helpers.assert_close(np.asarray(got), np.asarray(expected), 1e-5)


@pytest.mark.parametrize("spec", [("model", None), (None, "model")])
def test_shard_map_over_the_weights_own_axes(spec):
  """Tensor parallelism by hand: the base split along inputs or outputs, the factors along what they hold of it."""
  mesh = jax.make_mesh((2,), ("model",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  partition = jax.sharding.PartitionSpec
  over_inputs = spec[0] == "model"

  def local(p, x):
    y = x @ p["w"]
    return lax.psum(y, "model") if over_inputs else y

  def fn(p, x):
    data, out = (partition(None, "model"), partition()) if over_inputs else (partition(), partition(None, "model"))
    return jax.shard_map(local, mesh=mesh, in_specs=({"w": partition(*spec)}, data), out_specs=out)(p, x)

  weights = {"w": helpers.array(1, (6, 8), jnp.float32)}
  tree = helpers.trained(jaxlora.adapt(weights, jaxlora.LoraConfig(rank=2, targets="w"), KEY))
  helpers.check(fn, tree, (helpers.array(2, (4, 6), jnp.float32),), 1e-5)


def test_explicit_sharding():
  mesh = jax.make_mesh(
    (2, 2), ("data", "time"), axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=jax.devices()[:4]
  )
  with jax.set_mesh(mesh):
    tree = one_weight()
    x = jax.device_put(helpers.array(2, (4, 6, 5), jnp.float32), jax.sharding.PartitionSpec("data", "time", None))
    fn = lambda p, x: x @ p["w"]
    got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(tree, x)
    helpers.assert_close(np.asarray(got), np.asarray(fn(jaxlora.merge(tree), x)), 1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# What the user asked of an equation holds for those that take its place.


def traced_equations(fn):
  traced = jax.make_jaxpr(jaxlora.wrap(fn, on_materialize="error"))(one_weight((5, 5)), X)
  return list(helpers.equations(traced))


def test_precision_holds_for_the_low_rank_products():
  highest = lax.Precision.HIGHEST
  dots = [e for e in traced_equations(lambda p, x: jnp.dot(x, p["w"], precision=highest)) if "dot" in e.primitive.name]
  assert len(dots) >= 2  # the second thin one may be a sum, which is exact
  assert all(eqn.params["precision"] == (highest, highest) for eqn in dots)


def test_the_policy_of_a_remat_holds():
  policy = jax.checkpoint_policies.dots_saveable
  fn = jax.checkpoint(lambda p, x: jnp.tanh(x @ p["w"]), policy=policy, prevent_cse=False)
  (remat,) = [eqn for eqn in traced_equations(fn) if "prevent_cse" in eqn.params]
  assert remat.params["policy"] is policy
  assert remat.params["prevent_cse"] is False


def test_unroll_and_reverse_of_a_scan_hold():
  def fn(p, x):
    return lax.scan(lambda c, _: (jnp.tanh(c @ p["w"]), None), x, length=6, unroll=3, reverse=True)[0]

  (scan,) = [eqn for eqn in traced_equations(fn) if eqn.primitive.name == "scan"]
  assert (scan.params["unroll"], scan.params["reverse"], scan.params["length"]) == (3, True, 6)


# ----------------------------------------------------------------------------------------------------------------------
# Flax.


class Net(nn.Module):
  @nn.compact
  def __call__(self, x, train):
    x = nn.Dense(6, name="first")(x)
    x = nn.BatchNorm(use_running_average=not train)(x)
    x = nn.Dropout(0.5, deterministic=not train)(x)
    return nn.Dense(4, name="last")(x)

  def first_only(self, x):
    return x.sum()


def test_linen_apply_with_mutable_rngs_and_method():
  model = Net()
  x = helpers.array(2, (64, 5), jnp.float32)  # enough for the batch's statistics to be well conditioned
  variables = jax.jit(lambda key: model.init(key, x, train=False))(KEY)
  tree = helpers.trained(jaxlora.adapt(variables, jaxlora.LoraConfig(rank=2, targets=["first", "last"]), KEY))
  plain, wrapped = jaxlora.merge(tree), jaxlora.wrap(model.apply, on_materialize="error")
  options = {"train": True, "rngs": {"dropout": jax.random.key(5)}, "mutable": ["batch_stats"]}
  got, want = wrapped(tree, x, **options), model.apply(plain, x, **options)
  helpers.assert_close(jax.tree.leaves(got), jax.tree.leaves(want), 1e-5)
  assert set(got[1]) == {"batch_stats"}
  helpers.assert_close(wrapped(tree, x, train=False), model.apply(plain, x, train=False), 1e-5)
  np.testing.assert_array_equal(wrapped(tree, x, method="first_only"), x.sum())


class NnxNet(nnx.Module):
  def __init__(self, rngs):
    self.layers = nnx.List([nnx.Linear(5, 5, rngs=rngs), nnx.Linear(5, 5, rngs=rngs)])
    self.norm = nnx.BatchNorm(5, rngs=rngs)
    self.head = nnx.Linear(5, 3, rngs=rngs)

  def __call__(self, x):
    for layer in self.layers:
      x = jnp.tanh(layer(x))
    return self.head(self.norm(x))


@pytest.mark.usefixtures("lenient")
def test_nnx_states():
  graph, state, rest = nnx.split(NnxNet(nnx.Rngs(0)), nnx.Param, ...)

  def fn(state, rest, x):
    model = nnx.merge(graph, state, rest, copy=True)  # the probe closes over `rest`
    y = model(x)
    return y, nnx.state(model, nnx.BatchStat)

  config = jaxlora.LoraConfig(rank=2, train=["head"])
  tree = jaxlora.adapt(state, config, KEY, probe=lambda s: fn(s, rest, X)[0])
  assert {leaf.path for leaf in jaxlora.summary(tree).leaves} == {
    "layers/0/kernel", "layers/1/kernel", "head/kernel", "head/bias"
  }  # fmt: skip
  tree = helpers.trained(tree)
  wrapped = jaxlora.wrap(fn, on_materialize="error")
  want = jax.tree.leaves(fn(jaxlora.merge(tree), rest, X))
  helpers.assert_close(jax.tree.leaves(wrapped(tree, rest, X)), want, 1e-5)
  helpers.assert_close(jax.tree.leaves(nnx.jit(wrapped)(tree, rest, X)), want, 1e-5)
  grads = jaxlora.grad(lambda t: wrapped(t, rest, X)[0].sum())(tree)
  assert jax.tree.structure(grads) == jax.tree.structure(jaxlora.split(tree)[1])


@pytest.mark.usefixtures("lenient")
def test_nnx_modules_are_trees_themselves():
  class WithRngs(nnx.Module):
    def __init__(self, rngs):
      self.layer = nnx.Linear(5, 4, rngs=rngs)
      self.dropout = nnx.Dropout(0.5, rngs=rngs)  # its random keys are leaves, too

    def __call__(self, x):
      return self.dropout(self.layer(x), deterministic=True)

  module, call = WithRngs(nnx.Rngs(0)), lambda module, x: module(x)
  tree = jaxlora.adapt(module, jaxlora.LoraConfig(rank=2), KEY, probe=lambda module: module(X))
  assert [leaf.path for leaf in jaxlora.summary(tree).leaves] == ["layer/kernel"]
  np.testing.assert_array_equal(jaxlora.wrap(call, on_materialize="error")(tree, X), module(X))
  np.testing.assert_array_equal(nnx.jit(jaxlora.wrap(call))(tree, X), nnx.jit(call)(module, X))


def test_flax_serialization_and_orbax_round_trips(tmp_path):
  model = Net()
  variables = model.init(KEY, X, train=False)
  config = jaxlora.LoraConfig(rank=2, targets=["first"], train=["last"])
  tree = helpers.trained(jaxlora.adapt(variables, config, KEY))
  blank = jax.tree.map(jnp.zeros_like, tree)
  back = serialization.from_bytes(blank, serialization.to_bytes(tree))
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  helpers.assert_close(back, tree, 0)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "tree", tree)
    checkpointer.wait_until_finished()
    back = checkpointer.restore(tmp_path / "tree", blank)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  helpers.assert_close(back, tree, 0)


# ----------------------------------------------------------------------------------------------------------------------
# Dropout, on the adapter's input alone.


def test_no_key_means_evaluation():
  tree = one_weight(dropout=0.5)
  fn = lambda p, x: x @ p["w"]
  helpers.assert_close(jaxlora.wrap(fn)(tree, X), fn(jaxlora.merge(tree), X), 1e-5)


def test_dropout_acts_on_the_adapters_input_alone():
  """Every output is base + a combination of kept inputs: solve for the mask and find zeros and 1 / (1 - p)."""
  rate, n = 0.25, 400
  weight = jaxlora.LoraWeight(jnp.ones((n, n)), jnp.eye(n), jnp.eye(n), rank=n, alpha=float(n), dropout=rate)
  wrapped = jaxlora.wrap(lambda p, x: x @ p["w"], dropout_key=jax.random.key(3))
  x = jnp.ones((5, n))
  kept = wrapped({"w": weight}, x) - x @ jnp.ones((n, n))
  values = np.unique(np.round(np.asarray(kept), 3))
  np.testing.assert_allclose(values, [0, 1 / (1 - rate)], atol=1e-3)
  assert float((kept > 0).mean()) == pytest.approx(1 - rate, abs=0.03)


def test_dropout_is_a_function_of_its_key():
  tree, fn = one_weight(dropout=0.5), lambda p, x: x @ p["w"]
  run = lambda key: jaxlora.wrap(fn, dropout_key=key)(tree, X)
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.key(1)))
  np.testing.assert_array_equal(run(jax.random.key(1)), run(jax.random.PRNGKey(1)))
  assert not np.array_equal(run(jax.random.key(1)), run(jax.random.key(2)))


def masks_differ(fn, tree):
  outs = jaxlora.wrap(fn, dropout_key=jax.random.key(3), on_materialize="error")(tree, jnp.ones((4, 5)))
  return not np.allclose(outs[0], outs[1])


@pytest.mark.parametrize(
  "fn",
  [
    lambda p, x: (x @ p["w"], x @ p["w"]),
    lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0.0, length=2)[1],
    lambda p, x: lax.scan(lambda w, _: (w, x @ w), p["w"], length=2)[1],
    lambda p, x: lax.fori_loop(
      0, jnp.int32(x[0, 0] * 2), lambda k, out: out.at[k].set(x @ p["w"]), jnp.zeros((2, 4, 7))
    ),
  ],
  ids=["two uses", "scan", "scan carry", "while"],
)
def test_every_use_has_a_mask_of_its_own(fn):
  assert masks_differ(fn, one_weight(dropout=0.5))


def test_scanned_layers_have_masks_of_their_own():
  tree = one_weight((2, 5, 7), dropout=0.5, axes={"w": "sio"})
  same = jax.tree.map(lambda leaf: leaf[:1].repeat(2, axis=0), tree)
  assert masks_differ(lambda p, x: lax.scan(lambda c, w: (c, x @ w), 0.0, p["w"])[1], same)


def test_dropout_under_remat_recomputes_the_same_mask():
  tree = one_weight(dropout=0.5)
  fn = lambda p, x: jnp.tanh(x @ p["w"])
  loss = lambda f: lambda t: jnp.sum(jaxlora.wrap(f, dropout_key=jax.random.key(3))(t, X) ** 2)
  helpers.assert_close(jaxlora.grad(loss(jax.checkpoint(fn)))(tree), jaxlora.grad(loss(fn))(tree), 1e-5)


def test_materialising_says_that_dropout_does_not_act():
  tree = one_weight(dropout=0.5)
  with pytest.warns(jaxlora.MaterializeWarning, match="the adapter's dropout does not act there"):
    jaxlora.wrap(use_whole, dropout_key=KEY)(tree, X)


# ----------------------------------------------------------------------------------------------------------------------
# Control flow that hides what it does with a weight.


def stack_of_layers():
  weights = {"w": helpers.array(1, (3, 5, 5), jnp.float32)}
  config = jaxlora.LoraConfig(rank=2, alpha=3, targets="w", axes={"w": "sio"})
  return helpers.trained(jaxlora.adapt(weights, config, KEY))


def test_a_batched_predicate_of_a_loop():
  """A loop under vmap whose length is data: every element stops when it is through."""

  def fn(p, x):
    grow = lambda x: jnp.tanh(x @ p["w"]) * 2 + x
    return jax.vmap(lambda x: lax.while_loop(lambda x: jnp.sum(jnp.abs(x @ p["w"])) < 30, grow, x))(x)

  tree = one_weight((5, 5))
  helpers.check(fn, tree, (X,), 1e-5, reverse=False)


@pytest.mark.parametrize("boundary", [jax.checkpoint, jax.jit], ids=["remat", "jit"])
def test_weights_that_a_body_hands_on_through_a_call_stay_factored(boundary):
  """As `nnx.scan` with `nnx.remat` does: the state of a module comes out of the loop, and is used after it."""
  body = boundary(lambda x, w: (jnp.tanh(x @ w), w))

  def through_xs(p, x):
    x, stack = lax.scan(body, x, p["w"])
    return lax.scan(body, x, stack)[0]

  def through_carry(p, x):
    step = boundary(lambda state: (jnp.tanh(state[0] @ state[1]), state[1]))
    (x, w), _ = lax.scan(lambda state, _: (step(state), None), (x, p["w"][0]), length=2)
    return x @ w

  def through_cond(p, x):
    one, other = boundary(lambda x, w: (x @ w, w)), boundary(lambda x, w: (x, w))
    x, w = lax.cond(x[0, 0] > 0, one, other, x, p["w"][1])
    return x @ w

  for fn in (through_xs, through_carry, through_cond):
    helpers.check(fn, stack_of_layers(), (X,), 1e-5)


def test_a_scan_over_an_axis_of_one():
  fn = lambda p, x: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["w"][None])[0]
  helpers.check(fn, one_weight((5, 5)), (X,), 1e-5)


@pytest.mark.parametrize(
  "pick",
  [
    lambda w, k: w[k],
    lambda w, k: lax.dynamic_index_in_dim(w, k, 0, keepdims=False),
    lambda w, k: lax.dynamic_slice(w, (k, 0, 0), (1, 5, 5))[0],
  ],
  ids=["index", "dynamic_index", "dynamic_slice"],
)
def test_an_expert_for_each_example_under_vmap(pick):
  fn = lambda p, x: jax.vmap(lambda x, k: x @ pick(p["w"], k))(x, jnp.array([2, 0, 1]))
  helpers.check(fn, stack_of_layers(), (X,), 1e-5)


def test_platform_dependent_branches():
  def fn(p, x):
    return lax.platform_dependent(p["w"], x, cpu=lambda w, x: x @ w, default=lambda w, x: x @ w * 2)

  helpers.check(fn, one_weight(), (X,), 1e-5)


def test_a_remat_of_a_gradient_keeps_its_barrier():
  def fn(p, x):
    inner = jax.checkpoint(lambda x: jnp.sum(jnp.tanh(x @ p["w"])))
    return jax.grad(lambda x: inner(x))(x)

  tree = one_weight()
  lowered = [jax.jit(f).lower(t, X).as_text() for f, t in ((fn, jaxlora.merge(tree)), (jaxlora.wrap(fn), tree))]
  assert [text.count("optimization_barrier") > 0 for text in lowered] == [True, True]


# ----------------------------------------------------------------------------------------------------------------------
# One jitted layer for many weights.


def layers(count, **fields):
  params = {f"layer_{k}": helpers.array(k, (5, 5), jnp.float32) for k in range(count)}
  config = jaxlora.LoraConfig(**{"rank": 2, "alpha": 3, "targets": ".*"} | fields)
  return helpers.trained(jaxlora.adapt(params, config, KEY))


def test_a_jitted_layer_stays_one_function():
  @jax.jit
  def block(w, x):
    return jnp.tanh(x @ w)

  def fn(p, x):
    for w in p.values():
      x = block(w, x)
    return x

  tree = layers(6)
  helpers.check(fn, tree, (X,), 1e-5)
  texts = [jax.jit(jaxlora.wrap(fn)).lower(layers(count), X).as_text() for count in (2, 6)]
  assert texts[0].count("func.func") == texts[1].count("func.func")
  assert len(re.findall(r"func\.func private @block\w*\(", texts[1])) == 1
  assert [use.path for use in jaxlora.explain(fn, tree, X).uses] == list(tree)


def test_jits_of_one_function_keep_their_own_shardings():
  mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
  place = lambda *names: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*names))
  layer = lambda w, x: jnp.tanh(x @ w)
  apart, together = (jax.jit(layer, out_shardings=sharding) for sharding in (place("data"), place()))
  fn = lambda p, x: (apart(p["layer_0"], x), together(p["layer_1"], x))
  outs = jax.jit(jaxlora.wrap(fn, on_materialize="error"))(layers(2), helpers.array(3, (16, 5), jnp.float32))
  assert [
    out.sharding.is_equivalent_to(place(*names), 2) for out, names in zip(outs, (("data",), ()), strict=True)
  ] == [
    True,
    True,
  ]


def test_what_a_jitted_layer_materialises_is_said_of_every_weight():
  layer = jax.jit(lambda w, x: x @ jnp.sin(w))
  fn = lambda p, x: layer(p["layer_1"], layer(p["layer_0"], x))
  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    jaxlora.wrap(fn)(layers(2), X)
  assert [str(warning.message).split(":")[0] for warning in caught] == ["layer_0", "layer_1"]
  with pytest.raises(jaxlora.MaterializeError, match="layer_0"):
    jaxlora.wrap(fn, on_materialize="error")(layers(2), X)


def test_jitted_layers_have_dropout_masks_of_their_own():
  tree = layers(1, dropout=0.5)
  layer = jax.jit(lambda w, x: x @ w)
  assert masks_differ(lambda p, x: (layer(p["layer_0"], x), layer(p["layer_0"], x)), tree)


# ----------------------------------------------------------------------------------------------------------------------
# Places and numbers.


def test_lines_inside_jitted_numpy_functions_are_the_users():
  """The line is part of what makes a place: two calls are two places, and both are told of."""

  def fn(p, x):
    first = jnp.clip(p["w"], -1, 1)
    second = jnp.clip(p["w"], -2, 2)
    return x @ first @ second.T

  with pytest.warns(jaxlora.MaterializeWarning) as caught:
    jaxlora.wrap(fn)(one_weight(), X)
  lines = {str(warning.message).split("(")[1].split(")")[0] for warning in caught}
  assert len(lines) == 2
  assert all("test_transform.py" in line for line in lines)


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.int32])
def test_dropout_of_integer_activations(dtype):
  tree, x = one_weight(dropout=0.5), jnp.arange(10, dtype=dtype).reshape(2, 5)
  fn = lambda p, x: lax.dot_general(x, p["w"], (((1,), (0,)), ((), ())))
  out = jaxlora.wrap(fn, dropout_key=KEY, on_materialize="error")(tree, x)
  assert bool(jnp.isfinite(out).all())
  assert not np.array_equal(out, jaxlora.wrap(fn)(tree, x))


@pytest.mark.parametrize("kind", ["dot", "conv"])
def test_the_update_has_the_products_own_precision(kind):
  """float16 in, float32 out: 4096 terms of 20 do not fit into the first, and the base product says so by its dtype."""
  n, options = 4096, {"preferred_element_type": jnp.float32}
  x = jnp.full((1, 2, n), 20.0, jnp.float16)
  if kind == "dot":
    fn, roles, shape = lambda p, x: jnp.matmul(x, p["w"], **options), "io", (n, 3)
  else:
    numbers = ("NHC", "HIO", "NHC")
    fn = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=numbers, **options)
    roles, shape = "iio", (1, n, 3)
  a, b = jnp.ones((1, *shape[:-1]), jnp.float16), jnp.full((1, 3), 1e-3, jnp.float16)
  weight = jaxlora.LoraWeight(jnp.zeros(shape, jnp.float16), a, b, roles=roles, rank=1, alpha=1.0)
  out = jaxlora.wrap(fn, on_materialize="error")({"w": weight}, x)
  assert out.dtype == jnp.float32
  np.testing.assert_allclose(out, 20 * n * float(b[0, 0]) * np.ones_like(out), rtol=1e-3)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_factors_beside_a_base_of_eight_bits_keep_their_own(dtype):
  base = helpers.array(1, (6, 5), jnp.float32).astype(dtype)
  tree = helpers.trained(jaxlora.adapt({"w": base}, jaxlora.LoraConfig(rank=2, targets="w", dtype="float32"), KEY))
  fn = lambda p, x: x @ p["w"].astype(jnp.float32)
  x, w = helpers.array(2, (3, 6), jnp.float32), tree["w"]
  want = x @ (base.astype(jnp.float32) + w.scale * w.a.T @ w.b)
  helpers.assert_close(jaxlora.wrap(fn, on_materialize="error")(tree, x), want, 1e-5)


def test_shards_of_data_have_dropout_masks_of_their_own():
  mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
  spec = jax.sharding.PartitionSpec
  local = lambda p, x: x @ p["w"]
  fn = lambda p, x: jax.shard_map(local, mesh=mesh, in_specs=(spec(), spec("data")), out_specs=spec("data"))(p, x)
  out = jaxlora.wrap(fn, dropout_key=KEY)(one_weight(dropout=0.5), jnp.ones((2, 5)))
  assert not np.allclose(out[0], out[1])


def test_explicit_sharding_of_results():
  """A lookup and a row-parallel product that say how their results are sharded."""
  mesh = jax.make_mesh(
    (2, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Explicit,) * 2, devices=jax.devices()[:4]
  )
  spec = jax.sharding.PartitionSpec
  with jax.set_mesh(mesh):
    put = lambda leaf, *names: jax.device_put(leaf, jax.sharding.NamedSharding(mesh, spec(*names)))
    w = helpers.trained(jaxlora.adapt({"w": helpers.array(1, (6, 8), jnp.float32)}, jaxlora.LoraConfig(rank=2), KEY))[
      "w"
    ]
    rows = jaxlora.LoraWeight(put(w.base, "model"), put(w.a, None, "model"), put(w.b), rank=2, alpha=w.alpha)
    whole = jaxlora.LoraWeight(put(w.base), put(w.a), put(w.b), rank=2, alpha=w.alpha)
    take = lambda p, ids: p["w"].at[ids].get(out_sharding=spec("data", None))
    product = lambda p, x: jnp.einsum("bi,io->bo", x, p["w"], out_sharding=spec("data", None))
    x = helpers.array(2, (4, 6), jnp.float32)
    merged = jaxlora.merge({"w": w})["w"]
    for fn, weight, data, want in (
      (take, whole, put(jnp.arange(4), "data"), merged[:4]),
      (product, rows, put(x, "data", "model"), x @ merged),
    ):
      got = jax.jit(jaxlora.wrap(fn, on_materialize="error"))({"w": weight}, data)
      assert jax.typeof(got).sharding.spec == spec("data", None)
      helpers.assert_close(np.asarray(got), np.asarray(want), 1e-5)


def test_kernels_that_are_concatenated_first_are_kernels():
  """Linen's OptimizedLSTMCell makes one kernel of its gates' before the product: all are adapted, and told of."""
  cell = nn.OptimizedLSTMCell(4)
  carry = (jnp.zeros((3, 4)), jnp.zeros((3, 4)))
  params = cell.init(KEY, carry, X)["params"]
  fn = lambda p: cell.apply({"params": p}, carry, X)[1]
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY, probe=fn)
  assert {leaf.path for leaf in jaxlora.summary(tree).leaves} == {f"{s}{g}/kernel" for s in "ih" for g in "figo"}
  assert {use.path for use in jaxlora.explain(fn, tree).materialized} == {
    f"{s}{g}/kernel" for s in "ih" for g in "figo"
  }
