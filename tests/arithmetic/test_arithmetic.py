"""Sums of updates: exact to rounding whatever the ranks, alphas and scalings, or at a rank with what that loses."""

import dataclasses
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora._weight.variant import VARIANTS
from tests.helpers import adapted, normal, traced, trained

KEY = jax.random.key(0)
SHAPE = (9, 7)


def base(dtype=np.float64):
  return {
    "w": jax.device_put(normal(0, SHAPE, dtype)),
    "stack": jax.device_put(normal(1, (2, *SHAPE), dtype)),
    "bias": jax.device_put(normal(2, (7,), dtype)),
    "frozen": jax.device_put(normal(3, (4,), dtype)),
    "ids": jnp.arange(3),
  }


def adapter(seed, rank, alpha=None, scaling="standard", dtype=np.float64, **fields):
  """An adapter of one base with random factors."""
  fields = {"targets": "w|stack", "train": "bias", "axes": {"stack": "sio"}} | fields
  tree = adapted(base(dtype), seed=None, rank=rank, alpha=alpha, scaling=scaling, **fields)
  frozen, trainable = jaxlora.split(tree)
  return trained(jaxlora.join(frozen, jax.tree.map(jnp.zeros_like, trainable)), seed, width=1.0)


def deltas(tree):
  """The brute force: merged less stripped, leaf by leaf."""
  floats = lambda params: {name: np.asarray(x) for name, x in params.items() if name != "ids"}
  after, before = floats(jaxlora.merge(tree)), floats(jaxlora.strip(tree))
  return {name: after[name] - before[name] for name in after}


def weighted_sum(trees, weights):
  each = [deltas(tree) for tree in trees]
  return {name: sum(w * d[name] for w, d in zip(weights, each, strict=True)) for name in each[0]}


def assert_deltas(tree, want, tolerance=1e-12):
  got = deltas(tree)
  for name, x in want.items():
    np.testing.assert_allclose(got[name], x, atol=tolerance * max(1.0, np.abs(x).max()), rtol=0, err_msg=name)


def mixed():
  """Adapters that differ in rank, alpha and scaling: what PEFT's "linear" gets wrong."""
  return [adapter(10, 2, 8.0), adapter(20, 3, 5.0, "rslora"), adapter(30, 1)]


# ----------------------------------------------------------------------------------------------------------------------
# Exact.


def test_exact_is_the_sum_of_the_deltas(x64):
  trees, weights = mixed(), [0.7, -1.3, 2.0]
  combined, report = jaxlora.combine_with_report(trees, weights)
  assert_deltas(combined, weighted_sum(trees, weights))
  assert [combined[name].rank for name in ("w", "stack")] == [6, 6]
  assert report.residual == 0
  assert {row.path for row in report.leaves} == {"w", "stack", "bias"}
  chex.assert_trees_all_equal(jaxlora.strip(combined), base())
  x = jax.device_put(normal(5, (3, 9), np.float64))
  np.testing.assert_allclose(jaxlora.wrap(lambda p: x @ p["w"])(combined), x @ jaxlora.merge(combined)["w"], rtol=1e-12)


@pytest.mark.parametrize("method", ["exact", "svd"])
def test_one_adapter_of_weight_one_is_itself(method):
  for tree in (adapter(10, 2, 8.0, "rslora", dropout=0.1, dtype=np.float32), adapter(20, 3, dtype=np.float32)):
    combined = jaxlora.combine([tree], [1], method)
    chex.assert_trees_all_equal(combined, tree)
    assert jax.tree.structure(combined) == jax.tree.structure(tree)
    also = jaxlora.combine(
      [tree, adapter(40, 4, dtype=np.float32)], [1.0, 0], method, **({"rank": 8} if method == "svd" else {})
    )
    chex.assert_trees_all_equal(also, tree)


def test_opposite_weights_cancel(x64):
  tree = adapter(10, 3, 8.0, "rslora")
  zero = {name: 0 * x for name, x in deltas(tree).items()}
  assert_deltas(jaxlora.combine([tree, tree], [1.7, -1.7]), zero)
  assert_deltas(jaxlora.combine([tree, adapter(20, 2)], [0, 0]), zero)
  assert_deltas(jaxlora.subtract(tree, tree), zero)


def test_dropout_is_the_common_one():
  trees = [adapter(k, 2, dropout=0.5, dtype=np.float32) for k in (10, 20)]
  assert jaxlora.combine(trees, [1, 1])["w"].dropout == 0.5
  assert jaxlora.combine([*trees, adapter(30, 2, dtype=np.float32)], [1, 1, 1])["w"].dropout == 0


def test_adapters_of_other_leaves(x64):
  """A leaf that one does not adapt has no update there; one trained whole takes the sum whole."""
  here, there = adapter(10, 2), adapter(20, 3, targets="w", axes=None, train=None)
  whole = adapter(30, 2, targets="stack", train="w|bias")
  combined = jaxlora.combine([here, there, whole], [1, 2, -0.5])
  assert_deltas(combined, weighted_sum([here, there, whole], [1, 2, -0.5]))
  assert isinstance(combined["w"], jaxlora.FullWeight)
  assert combined["stack"].rank == 4


def test_weights_may_be_traced(x64):
  trees = mixed()
  combined = jax.jit(lambda w: jaxlora.combine(trees, list(w)))(jnp.asarray([0.7, -1.3, 2.0]))
  assert_deltas(combined, weighted_sum(trees, [0.7, -1.3, 2.0]))


def test_scale_subtract_interpolate(x64):
  one, two, _ = mixed()
  for factor in (0.0, -1.0, 0.3):
    scaled = jaxlora.scale(one, factor)
    assert_deltas(scaled, weighted_sum([one], [factor]))
    assert jax.tree.structure(scaled) == jax.tree.structure(one)
  assert jaxlora.scale(one, 1) is one
  assert_deltas(jaxlora.subtract(one, two), weighted_sum([one, two], [1, -1]))
  assert_deltas(jaxlora.interpolate(one, two, 0.25), weighted_sum([one, two], [0.75, 0.25]))
  for t, tree in ((0, one), (1, two)):
    chex.assert_trees_all_equal(jaxlora.interpolate(one, two, t), tree)


def test_norms_and_cosines(x64):
  one, two, _ = mixed()
  left, right = deltas(one), deltas(two)
  for name, value in jaxlora.norms(one).items():
    np.testing.assert_allclose(value, np.linalg.norm(left[name]), rtol=1e-12)
  cosines = jaxlora.cosine(one, two)
  assert set(cosines) == {"w", "stack", "bias"}
  for name, value in cosines.items():
    want = np.sum(left[name] * right[name]) / np.linalg.norm(left[name]) / np.linalg.norm(right[name])
    np.testing.assert_allclose(value, want, rtol=1e-10)
  np.testing.assert_allclose(list(jaxlora.cosine(one, jaxlora.scale(one, -2)).values()), -1, rtol=1e-12)
  np.testing.assert_array_equal(list(jaxlora.cosine(one, jaxlora.scale(one, 0)).values()), 0)


def test_nothing_of_the_weights_size_is_formed():
  node = jaxlora.LoraWeight(jnp.ones((60, 50)), jnp.ones((2, 60)), jnp.ones((2, 50)), rank=2)
  fns = [
    lambda w: jaxlora.combine([{"w": w}, {"w": w}], [1, 2], "svd", rank=1)["w"].a,
    lambda w: jaxlora.combine([{"w": w}, {"w": w}], [1, 2])["w"].a,
    lambda w: jaxlora.norms({"w": w}),
    lambda w: jaxlora.cosine({"w": w}, {"w": w}),
  ]
  for fn in fns:
    equations = traced(lambda a, b, fn=fn: fn(dataclasses.replace(node, a=a, b=b)), node.a, node.b)
    assert max(var.aval.size for eqn in equations for var in eqn.outvars) <= 4 * 60


# ----------------------------------------------------------------------------------------------------------------------
# Every variant, and starts that are taken off.

NONLINEAR = {"dora", "dora_exact"}
KINDS = [*({"variant": name} for name in VARIANTS), {"init": "pissa"}, {"init": "orthogonal"}]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: next(iter(kind.values())))


def of_kind(kind, seed=10):
  return adapter(seed, 2, 3.0, targets="w", axes=None, train=None, **kind)


@each_kind
@pytest.mark.parametrize("method", ["exact", "svd"])
def test_one_adapter_of_weight_one_is_itself_in_every_variant(kind, method):
  tree = of_kind(kind)
  combined = jaxlora.combine([tree], [1], method)
  chex.assert_trees_all_equal(combined, tree)
  assert jax.tree.structure(combined) == jax.tree.structure(tree)


@each_kind
def test_variants_add_up_where_they_can(x64, kind):
  tree, plain = of_kind(kind), of_kind({}, 40)
  if kind.get("variant") in NONLINEAR:
    for call in (
      lambda: jaxlora.combine([tree, plain], [1, 1]),
      lambda: jaxlora.combine([tree], [0.5]),
      lambda: jaxlora.scale(tree, 0.5),
      lambda: jaxlora.spectrum(tree),
      lambda: jaxlora.compress(tree, rank=1),
    ):
      with pytest.raises(ValueError, match=r"w is of variant 'dora.* no product of thin factors.*'svd'"):
        call()
  else:
    assert_deltas(jaxlora.combine([tree, plain], [0.7, -2.0]), weighted_sum([tree, plain], [0.7, -2.0]))
    for factor in (0.0, -0.5, jnp.asarray(0.3)):
      assert_deltas(jaxlora.scale(tree, factor), weighted_sum([tree], [factor]))
    traced = jax.jit(lambda factor: jaxlora.scale(tree, factor))(0.3)
    assert_deltas(traced, weighted_sum([tree], [0.3]))
    opposite = jaxlora.combine([tree, tree], [1.7, -1.7])
    assert_deltas(opposite, {name: 0 * x for name, x in deltas(tree).items()})
  left, right = deltas(tree)["w"], deltas(plain)["w"]
  np.testing.assert_allclose(jaxlora.norms(tree)["w"], np.linalg.norm(left), rtol=1e-9)
  want = np.sum(left * right) / np.linalg.norm(left) / np.linalg.norm(right)
  np.testing.assert_allclose(jaxlora.cosine(tree, plain)["w"], want, rtol=1e-8)


@each_kind
def test_variants_come_to_a_rank(x64, kind):
  trees, weights = [of_kind(kind), of_kind({}, 40)], [0.7, -2.0]
  want = weighted_sum(trees, weights)["w"]
  whole = jaxlora.combine(trees, weights, "svd", rank=7)
  assert_deltas(whole, {"w": want}, 1e-11)
  combined, report = jaxlora.combine_with_report(trees, weights, "svd", rank=3)
  assert (combined["w"].rank, combined["w"].variant, combined["w"].extra) == (3, "lora", {})
  np.testing.assert_allclose(deltas(combined)["w"], truncated(want, 3), atol=1e-10)
  lost = np.linalg.norm(want - truncated(want, 3)) / np.linalg.norm(want)
  np.testing.assert_allclose(report.residual, lost, atol=1e-9)


# ----------------------------------------------------------------------------------------------------------------------
# At a rank.


def truncated(x, rank):
  u, s, vt = np.linalg.svd(x, full_matrices=False)
  return (u[..., :rank] * s[..., None, :rank]) @ vt[..., :rank, :]


def test_svd_is_the_best_at_its_rank(x64):
  trees, weights = mixed(), [0.7, -1.3, 2.0]
  want = weighted_sum(trees, weights)
  combined, report = jaxlora.combine_with_report(trees, weights, "svd")  # the largest rank among them
  assert [combined[name].rank for name in ("w", "stack")] == [3, 3]
  best = {name: x if name in ("bias", "frozen") else truncated(x, 3) for name, x in want.items()}
  assert_deltas(combined, best)
  residuals = {row.path: row.residual for row in report.leaves}
  assert residuals["bias"] == 0
  for name in ("w", "stack"):
    lost = np.linalg.norm(best[name] - want[name]) / np.linalg.norm(want[name])
    np.testing.assert_allclose(residuals[name], lost, rtol=1e-9)


def by_hand(method, each, weights, density):
  """The papers' algorithms on rows of elements, written as loops."""

  def trim(row):
    keep = max(1, round(density * row.size))
    kept = np.argsort(-np.abs(row))[:keep]
    return np.where(np.isin(np.arange(row.size), kept), row, 0)

  terms = [w * np.stack([trim(row) for row in x]) for x, w in zip(each, weights, strict=True)]
  total = sum(terms)
  if method == "magnitude":
    return total
  merged = np.zeros_like(total)
  for at in itertools.product(*map(range, total.shape)):
    agreeing = [x[at] for x in terms if x[at] != 0 and np.sign(x[at]) == np.sign(total[at])]
    merged[at] = np.mean(agreeing) if agreeing else 0
  return merged


@pytest.mark.parametrize("method", ["ties", "magnitude"])
def test_sparse_merges_are_the_papers(x64, method):
  """At full rank nothing is lost, so that the elements themselves can be compared; slices are thinned out apart."""
  trees, weights = mixed(), [1.0, 0.5, -2.0]
  combined, report = jaxlora.combine_with_report(trees, weights, method, rank=7, density=0.3)
  each = [deltas(tree) for tree in trees]
  for name, rows in (("w", 1), ("stack", 2), ("bias", 1)):
    want = by_hand(method, [x[name].reshape(rows, -1) for x in each], weights, 0.3)
    np.testing.assert_allclose(deltas(combined)[name].reshape(rows, -1), want, atol=1e-12)
  assert report.residual < 1e-14


def test_dare_drops_and_rescales(x64):
  trees, weights = [adapter(10, 2), adapter(20, 2)], [1.0, 2.0]
  whole = {name: weighted_sum(trees, weights)[name] for name in ("w", "stack", "bias")}
  draws = [jaxlora.combine(trees[:1], [1.0], "dare", rank=7, density=0.5, key=jax.random.key(k)) for k in range(2)]
  for name in ("w", "stack", "bias"):
    want = deltas(trees[0])[name]
    ratios = deltas(draws[0])[name] / want
    np.testing.assert_allclose(ratios, np.round(ratios / 2) * 2, atol=1e-9)  # dropped, or twice itself
    assert np.any(np.abs(ratios) < 1e-9)
    assert np.any(np.abs(ratios - 2) < 1e-9)
    assert not np.allclose(deltas(draws[1])[name], deltas(draws[0])[name])
  assert_deltas(jaxlora.combine(trees, weights, "dare", rank=7, density=1.0, key=KEY), whole)
  means = [
    deltas(jaxlora.combine(trees, weights, "dare", rank=7, density=0.5, key=jax.random.key(k))) for k in range(40)
  ]
  for name, x in whole.items():
    squares = sum((w * deltas(tree)[name]) ** 2 for tree, w in zip(trees, weights, strict=True))
    error = np.mean([draw[name] for draw in means], axis=0) - x
    assert np.abs(error / np.sqrt(squares / 40)).max() < 5  # the variance of an element is its square, at density 1/2


def test_a_thinned_out_update_has_no_low_rank(x64):
  """The residual is reported: it is what the elements of the truth and the truth at that rank differ by."""
  trees = mixed()
  _, report = jaxlora.combine_with_report(trees, [1, 1, 1], "ties", rank=2, density=0.2)
  full = deltas(jaxlora.combine(trees, [1, 1, 1], "ties", rank=7, density=0.2))
  lost = np.linalg.norm(full["w"] - truncated(full["w"], 2)) / np.linalg.norm(full["w"])
  residual = next(row.residual for row in report.leaves if row.path == "w")
  np.testing.assert_allclose(residual, lost, rtol=1e-9)
  assert residual > 0.3


# ----------------------------------------------------------------------------------------------------------------------
# Refusals.


@pytest.mark.parametrize(
  ("weights", "options", "match"),
  [
    ([1], {}, "found 2 trees and 1 weights"),
    ([1, float("nan")], {}, "weight 1 is nan"),
    ([1, 1], {"method": "linear"}, "'linear', expected one of 'exact', 'svd', 'ties', 'dare', 'magnitude'"),
    ([1, 1], {"rank": 2}, "rank=2 with method 'exact'"),
    ([1, 1], {"method": "ties"}, "density=None with method 'ties'"),
    ([1, 1], {"method": "ties", "density": 0}, "density is 0"),
    ([1, 1], {"density": 0.5}, "density=0.5 with method 'exact'"),
    ([1, 1], {"method": "dare", "density": 0.5}, "needs a key"),
    ([1, 1], {"key": KEY}, "nothing random"),
    ([1, 1], {"method": "svd", "rank": 0}, "rank is 0"),
  ],
)
def test_options_that_do_not_fit(weights, options, match):
  trees = [adapter(10, 2, dtype=np.float32), adapter(20, 2, dtype=np.float32)]
  with pytest.raises(ValueError, match=match):
    jaxlora.combine(trees, weights, **options)


def test_weights_that_are_no_numbers():
  with pytest.raises(TypeError, match="weight 0 is 'half'"):
    jaxlora.combine([adapter(10, 2, dtype=np.float32)], ["half"])
  with pytest.raises(TypeError, match="factor is None"):
    jaxlora.scale(adapter(10, 2, dtype=np.float32), None)


def test_trees_that_do_not_fit():
  tree = adapter(10, 2, dtype=np.float32)
  other = dict(tree)
  w = tree["w"]
  for change, match in (
    ({"extra": jnp.ones(2)}, "Only in tree 0: nothing; only in tree 1: extra"),
    ({"w": dataclasses.replace(w, base=w.base + 1)}, "w has other values in the base of tree 1"),
    ({"frozen": tree["frozen"] + 1}, "frozen has other values"),
    ({"frozen": jnp.ones(5)}, r"base of frozen has shape \(4,\)"),
    ({"w": dataclasses.replace(w, roles="oi", a=w.b, b=w.a)}, "roles 'io' in tree 0 and 'oi' in tree 1"),
    ({"w": dataclasses.replace(w, a=w.a * jnp.nan)}, r"NaN or infinite values in w \(a\) of tree 1"),
    ({"bias": dataclasses.replace(tree["bias"], value=tree["bias"].value / 0)}, r"bias \(value\) of tree 1"),
    ({"w": dataclasses.replace(w, rank=3)}, r"combine: tree 1: w: factor a has shape \(2, 9\)"),
  ):
    with pytest.raises(ValueError, match=match):
      jaxlora.combine([tree, other | change], [1, 1])
  with pytest.raises(ValueError, match="tree 1: the tree has no adapted leaf"):
    jaxlora.combine([tree, jaxlora.strip(tree)], [1, 1])
  with pytest.raises(ValueError, match="half of a split tree"):
    jaxlora.norms(jaxlora.split(tree)[1])
