"""The variants: factored as they merge, on every kind of weight, at first the base, by their papers' equations."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from jaxlora._weight.variant import VARIANTS
from tests import helpers
from tests.helpers import profiles

OTHERS = [name for name in VARIANTS if name != "lora"]
# All kinds of weight for the one that adds to the transform itself; one of each family for those that make factors.
FAMILIES = ("dense_general", "vmapped_layers", "experts_dispatched", "conv_2d_strided", "embed_tied")
# By default each variant meets three of the five in turn, and each of the five meets several variants.
CROSS = profiles.alternating(OTHERS, FAMILIES, each=3)
CROSS += profiles.every_other([build for build in helpers.BUILDERS if build not in FAMILIES], "dora")
# The sum over experts scales each expert's outputs before they are summed, so no gain can follow the product.
MATERIALISES = {("dora", "experts_all")}


@functools.cache
def adapted(variant, build, dtype, moved=True):
  case = helpers.BUILDERS[build](dtype)
  config = dataclasses.replace(case.config, variant=variant)
  tree = jaxlora.adapt(case.params, config, jax.random.key(7), probe=lambda p: case.fn(p, *case.args))
  return helpers.trained(tree) if moved else tree


@pytest.mark.parametrize(("variant", "build"), CROSS)
def test_factored_equals_merged(variant, build, x64):
  case = helpers.BUILDERS[build](jnp.float64)
  allowed = "ignore" if (variant, build) in MATERIALISES else "error"
  helpers.check(case.fn, adapted(variant, build, jnp.float64), case.args, 1e-12, on_materialize=allowed)


# Products in which neither the input nor the result has every axis that DoRA scales.
BETWEEN = {
  "one of two output axes": ("ihv,bhw->biwv", "ihv", "ioo"),
  "output axes of every expert": ("sio,bo->sbi", "sio", "sio"),
  "summed experts": ("sio,sbi->bo", "sio", "sio"),
}
SIZES = dict(zip("sihvobw", (2, 5, 3, 4, 7, 6, 2), strict=True))


@pytest.mark.parametrize("name", BETWEEN)
def test_a_gain_that_fits_neither_input_nor_result_materialises(name, x64):
  spec, axes, roles = BETWEEN[name]
  x_axes = spec.split("->")[0].split(",")[1]
  params, x = (helpers.array(k, tuple(SIZES[a] for a in s), jnp.float64) for k, s in enumerate((axes, x_axes)))
  fn = lambda p, x: jnp.einsum(spec, p["w"], x)
  tree = helpers.adapted({"w": params}, axes={"w": roles}, variant="dora")
  helpers.check(fn, tree, (x,), 1e-12, on_materialize="ignore")
  (use,) = jaxlora.explain(fn, tree, x).materialized
  assert use.reason.startswith("of the axes along which its variant scales the weight")


@pytest.mark.parametrize("wrap", helpers.WRAPPERS)
@pytest.mark.parametrize("variant", ["dora"])
def test_in_every_control_flow(variant, wrap, x64):
  case = helpers.BUILDERS["dense"](jnp.float64)
  fn = helpers.WRAPPERS[wrap](case.fn)
  helpers.check(fn, adapted(variant, "dense", jnp.float64), case.args, 1e-12, reverse=wrap not in helpers.FORWARD_ONLY)


@pytest.mark.parametrize(("variant", "build"), profiles.alternating(OTHERS, ["dense", "embed_tied"]))
def test_at_init_the_function_is_the_base_bit_for_bit(variant, build):
  case = helpers.BUILDERS[build](jnp.float32)
  jit = functools.partial(jax.jit, compiler_options=helpers.OPTIMISED)
  got = jit(jaxlora.wrap(case.fn))(adapted(variant, build, jnp.float32, moved=False), *case.args)
  np.testing.assert_array_equal(got, jit(case.fn)(case.params, *case.args))


@pytest.mark.parametrize("variant", VARIANTS)
def test_halves_labels_and_the_way_back(variant):
  case = helpers.BUILDERS["attention"](jnp.float32)
  tree = adapted(variant, "attention", jnp.float32)
  frozen, trainable = jaxlora.split(tree)
  assert jax.tree.structure(jaxlora.join(frozen, trainable)) == jax.tree.structure(tree)
  labels = jaxlora.labels(tree)
  assert jax.tree.structure(labels) == jax.tree.structure(tree)
  for half, trains in ((frozen, False), (trainable, True)):
    paths = {path for path, _ in jax.tree_util.tree_leaves_with_path(half)}
    for path, label in jax.tree_util.tree_leaves_with_path(labels):
      assert (path in paths) == ((label != "frozen") == trains)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.strip(tree), case.params)
  trained = sum(leaf.size for leaf in jax.tree.leaves(trainable))
  assert jaxlora.summary(tree).trainable_parameters == trained


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_step_of_a_train_state_moves_what_trains_and_nothing_else(variant):
  case = helpers.BUILDERS["dense"](jnp.float32)
  tree = adapted(variant, "dense", jnp.float32)
  apply, tx = jaxlora.wrap(case.fn), jaxlora.optimizer(optax.sgd(0.1))

  @jax.jit
  def step(tree):
    grads = jaxlora.grad(lambda tree: jnp.sum(apply(tree, *case.args) ** 2))(tree)
    updates, _ = tx.update(grads, tx.init(tree), tree)
    return optax.apply_updates(tree, updates)

  new = step(tree)
  moved = jax.tree.map(lambda x, y: bool((x != y).any()), tree, new)
  assert moved == jaxlora.mask(tree)


@pytest.mark.parametrize("variant", OTHERS)
def test_flax_state_dicts(variant):
  serialization = pytest.importorskip("flax.serialization")
  tree = adapted(variant, "dense", jnp.float32)
  blank = jax.tree.map(jnp.zeros_like, tree)
  back = serialization.from_bytes(blank, serialization.to_bytes(tree))
  jax.tree.map(np.testing.assert_array_equal, back, tree)


def test_an_override_gives_a_leaf_its_own_variant():
  params = {"one": jnp.ones((6, 4)), "two": jnp.ones((6, 4))}
  config = jaxlora.LoraConfig(rank=2, targets=r"one|two", overrides={"two": {"variant": "dora"}})
  tree = jaxlora.adapt(params, config, jax.random.key(0))
  assert (tree["one"].variant, tree["two"].variant) == ("lora", "dora")
  assert not tree["one"].extra


def test_parts_of_another_variant_are_named():
  tree = jaxlora.adapt({"w": jnp.ones((6, 4))}, jaxlora.LoraConfig(rank=2, variant="dora"), jax.random.key(0))
  other = dataclasses.replace(tree["w"], variant="lora")
  with pytest.raises(ValueError, match=r"w: found the parts a, b, base, magnitude, norm, expected base, a, b"):
    jaxlora.merge({"w": other})
  lora = jaxlora.adapt({"w": jnp.ones((6, 4))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
  with pytest.raises(ValueError, match="different trees"):
    jaxlora.join(jaxlora.split(tree)[0], jaxlora.split(lora)[1])


# ----------------------------------------------------------------------------------------------------------------------
# Each by the equation of its paper, formed whole.


def weight(variant, rank=2, roles="io", shape=(6, 8), alpha=3.0, scaling="standard"):
  params = {"w": jax.device_put(helpers.normal(3, shape, np.float64))}
  fields = {"rank": rank, "alpha": alpha, "axes": {"w": roles}, "variant": variant, "scaling": scaling}
  return helpers.adapted(params, 1, targets="w", **fields)["w"]


@pytest.mark.usefixtures("lenient")
def test_dora_is_the_magnitude_times_the_direction(x64):
  w = weight("dora")
  whole = np.asarray(w.base + 1.5 * w.a.T @ w.b)
  want = np.asarray(w.extra["magnitude"]) * whole / np.linalg.norm(whole, axis=0, keepdims=True)
  np.testing.assert_allclose(w.materialize(), want, rtol=1e-12)


@pytest.mark.usefixtures("lenient")
def test_doras_norm_is_over_the_inputs_of_each_output_and_layer(x64):
  w = weight("dora", roles="sio", shape=(3, 6, 8))
  whole = np.asarray(w.base + 1.5 * jnp.einsum("sri,sro->sio", w.a, w.b))
  want = np.asarray(w.extra["magnitude"]) * whole / np.linalg.norm(whole, axis=1, keepdims=True)
  np.testing.assert_allclose(w.materialize(), want, rtol=1e-12)


@pytest.mark.usefixtures("lenient")
def test_the_norm_is_a_constant_of_doras_gradient_and_not_of_the_exact_ones(x64):
  x = jax.device_put(helpers.normal(4, (5, 6), np.float64))

  def gradient(variant):
    tree = {"w": weight(variant)}
    return jaxlora.grad(lambda tree: jnp.sum(jaxlora.wrap(lambda p: x @ p["w"])(tree) ** 3))(tree)["w"].b

  def by_hand(b, hold):
    w = weight("dora")
    whole = w.base + 1.5 * w.a.T @ b
    norm = jnp.linalg.norm(whole, axis=0)
    norm = jax.lax.stop_gradient(norm) if hold else norm
    return jnp.sum((x @ (w.extra["magnitude"] * whole / norm)) ** 3)

  for variant, hold in (("dora", True), ("dora_exact", False)):
    np.testing.assert_allclose(gradient(variant), jax.grad(by_hand)(weight("dora").b, hold), rtol=1e-11)
  assert np.abs(gradient("dora") - gradient("dora_exact")).max() > 1e-3


@pytest.mark.usefixtures("lenient")
def test_vera_scales_rows_of_shared_factors(x64):
  w = weight("vera")
  want = w.base + 1.5 * (w.a.T * w.extra["lambda_d"]) @ w.b * w.extra["lambda_b"][0]
  np.testing.assert_allclose(w.materialize(), want, rtol=1e-12)
  params = {"one": jnp.ones((6, 8)), "two": jnp.zeros((6, 8)), "else": jnp.zeros((6, 4))}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, variant="vera"), jax.random.key(0))
  np.testing.assert_array_equal(tree["one"].a, tree["two"].a)
  np.testing.assert_array_equal(tree["one"].b, tree["two"].b)


@pytest.mark.usefixtures("lenient")
def test_adalora_drops_what_is_masked(x64):
  w = weight("adalora", rank=4)
  keep = jax.device_put(np.array([1.0, 0.0, 1.0, 0.0]))
  masked = dataclasses.replace(w, extra={**w.extra, "keep": keep})
  want = w.base + 0.75 * (w.a.T * (w.extra["e"] * keep)) @ w.b
  np.testing.assert_allclose(masked.materialize(), want, rtol=1e-12)


@pytest.mark.usefixtures("lenient")
def test_loha_is_the_hadamard_product_of_two_updates(x64):
  w = weight("loha", scaling="rslora")
  want = w.base + 3 / np.sqrt(2) * (w.a.T @ w.b) * (w.extra["a2"].T @ w.extra["b2"])
  np.testing.assert_allclose(w.materialize(), want, rtol=1e-12)


@pytest.mark.usefixtures("lenient")
def test_lokr_is_a_kronecker_product(x64):
  w = weight("lokr")
  want = w.base + 1.5 * np.kron(w.extra["c"], w.a.T @ w.b)
  np.testing.assert_allclose(w.materialize(), want, rtol=1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# What they save, and what they cost.


def compiled_step(variant, tokens=1024, d=128, rank=4):
  """The compiled training step of three layers without an activation between them: every input must be kept."""
  params = {f"w{k}": jnp.ones((d, d)) for k in range(3)}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=rank, variant=variant), jax.random.key(0))
  frozen, trainable = jaxlora.split(tree)

  @functools.partial(jaxlora.wrap, on_materialize="error")
  def apply(p, x):
    for k in range(3):
      x = x @ p[f"w{k}"]
    return x

  step = jax.jit(jax.grad(lambda trainable, frozen, x: jnp.sum(apply(jaxlora.join(frozen, trainable), x) ** 2)))
  return step.lower(trainable, frozen, jnp.ones((tokens, d))).compile()


def test_with_a_frozen_no_input_is_kept():
  lora, frozen = (compiled_step(variant).memory_analysis().temp_size_in_bytes for variant in ("lora", "lora_fa"))
  assert lora - frozen >= 1024 * 128 * 4  # the inputs of the second and of the third layer


def test_doras_norm_costs_a_share_of_rank_over_tokens_and_forms_no_weight():
  lora, dora = (compiled_step(variant).cost_analysis()["flops"] for variant in ("lora", "dora"))
  base = 3 * 2 * 2 * 1024 * 128 * 128
  assert dora - lora < 0.03 * base


# ----------------------------------------------------------------------------------------------------------------------
# Optimisers and adaptive rank.


@pytest.mark.parametrize("learning_rate", [0.01, optax.constant_schedule(0.01)])
def test_lora_plus_moves_b_faster(learning_rate):
  tree = helpers.adapted({"w": jnp.ones((6, 4)), "bias": jnp.zeros(4)}, variant="dora", train=["bias"])
  frozen, trainable = jaxlora.split(tree)
  ones = jax.tree.map(jnp.ones_like, trainable)
  tx = jaxlora.lora_plus(learning_rate, ratio=4, make=optax.sgd)
  updates, _ = tx.update(ones, tx.init(trainable), trainable)
  assert jnp.allclose(updates["w"].b, -0.04)
  for slow in (updates["w"].a, updates["w"].extra["magnitude"], updates["bias"].value):
    assert jnp.allclose(slow, -0.01)
  whole = jaxlora.optimizer(tx)
  updates, _ = whole.update(jaxlora.join(frozen, ones), whole.init(tree), tree)
  assert jnp.allclose(updates["w"].b, -0.04)
  assert not updates["w"].base.any()


@pytest.mark.parametrize("ratio", [0, -1, float("nan"), float("inf"), "4", True])
def test_lora_plus_wants_a_ratio(ratio):
  with pytest.raises(ValueError, match="lora_plus: ratio is"):
    jaxlora.lora_plus(1e-3, ratio)


def pruned_setup():
  params = {"one": jnp.ones((6, 8)), "two": jnp.ones((2, 6, 8)), "else": jnp.ones((6, 8))}
  fields = {"axes": {"two": "sio"}, "targets": ".*", "overrides": {"else": {"variant": "lora"}}}
  return helpers.adapted(params, rank=3, variant="adalora", **fields)


def test_pruning_keeps_the_budget_and_does_not_recompile():
  tree = pruned_setup()
  x = jax.device_put(helpers.normal(2, (4, 6), np.float32))

  @jaxlora.wrap
  def apply(p):
    return jnp.sum((x @ p["one"]) ** 2) + jnp.sum((x @ p["two"][0]) ** 2) + jnp.sum((x @ p["two"][1]) ** 3)

  traces = 0

  @jax.jit
  def step(tree, budget):
    nonlocal traces
    traces += 1
    scores = jaxlora.sensitivity(tree, jaxlora.grad(apply)(tree))
    return jaxlora.prune(tree, scores, budget), scores

  for budget in (9, 4, 1, 6):
    new, scores = step(tree, budget)
    kept = {path: np.asarray(new[path].extra["keep"]) for path in ("one", "two")}
    assert sum(mask.sum() for mask in kept.values()) == budget
    chosen = np.concatenate([np.asarray(scores[path])[mask == 1] for path, mask in kept.items()])
    left = np.concatenate([np.asarray(scores[path])[mask == 0] for path, mask in kept.items()])
    assert chosen.min() > left.max(initial=0)
  assert traces == 1
  np.testing.assert_array_equal(new["else"].a, tree["else"].a)


def test_a_masked_term_has_no_part_in_the_update_and_comes_back():
  tree = pruned_setup()
  scores = {"one": jnp.asarray([3.0, 2.0, 1.0]), "two": jnp.zeros((2, 3))}
  one = jaxlora.prune(tree, scores, 1)["one"]
  w = tree["one"]
  want = np.outer(w.a[0], w.b[0]) * w.extra["e"][0] * w.scale
  np.testing.assert_allclose(one.delta(), want, rtol=1e-5, atol=1e-6)
  back = jaxlora.prune(jaxlora.prune(tree, scores, 1), scores, 9)
  np.testing.assert_array_equal(back["one"].delta(), w.delta())


def test_what_pruning_cannot_use_is_named():
  tree = pruned_setup()
  with pytest.raises(ValueError, match=r"prune: scores of two: found none, expected an array of shape \(2, 3\)"):
    jaxlora.prune(tree, {"one": jnp.zeros(3)}, 2)
  with pytest.raises(ValueError, match=r"prune: scores of one: found \(4,\), expected an array of shape \(3,\)"):
    jaxlora.prune(tree, {"one": jnp.zeros(4), "two": jnp.zeros((2, 3))}, 2)
  plain = jaxlora.adapt({"w": jnp.ones((6, 8))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
  for call in (lambda: jaxlora.prune(plain, {}, 2), lambda: jaxlora.sensitivity(plain, plain)):
    with pytest.raises(ValueError, match="no leaf of the variant 'adalora'"):
      call()
  with pytest.raises(ValueError, match="no gradients for one"):
    jaxlora.sensitivity(tree, {"one": None})
