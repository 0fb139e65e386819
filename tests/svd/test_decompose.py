"""Truncated decompositions of matrices, of updates, and of what fine-tuning changed."""

import importlib.util
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import factored, normal, traced
from tests.helpers.paths import EXAMPLES

KEY = jax.random.key(0)
EXAMPLE = EXAMPLES / "article.py"


def decaying(seed=0, shape=(30, 20), decay=0.5):
  """A matrix with singular values decay^k."""
  u, _ = np.linalg.qr(normal(seed, (shape[0], min(shape)), np.float64))
  v, _ = np.linalg.qr(normal(seed + 1, (shape[1], min(shape)), np.float64))
  return (u * decay ** np.arange(min(shape))) @ v.T


def weight(seed=0, shape=(9, 7), roles="io", rank=3, alpha=5.0, dtype=np.float64, **fields):
  """An adapted weight with factors away from zero."""
  return factored(jax.device_put(normal(seed, shape, dtype)), roles, rank, alpha, seed=seed + 1, **fields)


def delta(node):
  """The brute force: what is added to the base, as one array."""
  return np.asarray(jaxlora.merge(node)) - np.asarray(node.base)


LAYOUTS = [("io", (9, 7)), ("ioo", (9, 2, 4)), ("sio", (3, 9, 7)), ("oiso", (2, 9, 3, 4))]


# ----------------------------------------------------------------------------------------------------------------------
# A matrix.


def test_low_rank_is_numpys_svd(x64):
  x = normal(0, (2, 9, 7), np.float64)
  _, s, _ = np.linalg.svd(x)
  found = jaxlora.low_rank(x, 3)
  np.testing.assert_allclose(found.s, s[:, :3], rtol=1e-13)
  lost = np.linalg.norm(x - found.array(), axis=(1, 2)) / np.linalg.norm(x, axis=(1, 2))
  np.testing.assert_allclose(found.error, lost, rtol=1e-12)
  a, b = found.factors()
  np.testing.assert_allclose(jnp.einsum("sri,sro->sio", a, b), found.array(), atol=1e-13)


def test_low_rank_by_energy(x64):
  x = decaying()
  s = np.linalg.svd(x, compute_uv=False)
  found = jaxlora.low_rank(x, energy=0.95)
  kept = np.cumsum(s**2) / np.sum(s**2)
  assert found.rank == int(np.argmax(kept >= 0.95)) + 1
  assert float(found.error) ** 2 <= 0.05
  assert jaxlora.low_rank(np.outer(np.ones(5), np.ones(4)), energy=1.0).rank == 1  # rounding is no rank


def test_randomised_is_near_the_best(x64):
  x = decaying(shape=(200, 150), decay=0.8)
  best, found = (jaxlora.low_rank(x, 10, key=key) for key in (None, KEY))
  assert float(best.error) * (1 - 1e-12) <= float(found.error) <= 1.001 * float(best.error)
  np.testing.assert_allclose(found.s, best.s, rtol=1e-3)
  np.testing.assert_allclose(found.u.T @ found.u, np.eye(10), atol=1e-12)
  measured = np.linalg.norm(x - found.array()) / np.linalg.norm(x)
  np.testing.assert_allclose(found.error, measured, rtol=1e-12)
  again = jaxlora.low_rank(x, 10, key=KEY)
  np.testing.assert_array_equal(again.s, found.s)


@pytest.mark.parametrize(
  ("x", "options", "match"),
  [
    (np.ones((100, 10), np.float32), {"rank": 20}, r"rank 20 .* 100 x 10 .* has 10 singular values.*use rank=10"),
    (np.ones(3, np.float32), {"rank": 1}, r"shape \(3,\)"),
    (np.ones((3, 3), np.int32), {"rank": 1}, "int32"),
    (np.full((3, 3), np.nan, np.float32), {"rank": 1}, "NaN or infinite values in x"),
    (np.ones((3, 3), np.float32), {}, "expected one of the two"),
    (np.ones((3, 3), np.float32), {"rank": 1, "energy": 0.5}, "expected one of the two"),
    (np.ones((3, 3), np.float32), {"rank": 0}, "whole number of at least 1"),
    (np.ones((3, 3), np.float32), {"energy": 1.5}, "share to keep"),
    (np.ones((3, 3), np.float32), {"energy": 0.5, "key": KEY}, "randomised algorithm never has"),
  ],
)
def test_low_rank_refuses(x, options, match):
  with pytest.raises(ValueError, match=match):
    jaxlora.low_rank(x, **options)


def test_low_rank_of_zero_has_no_error():
  assert float(jaxlora.low_rank(np.zeros((4, 3), np.float32), 1).error) == 0


def test_energy_under_jit_says_why():
  with pytest.raises(ValueError, match="not known under jit"):
    jax.jit(lambda x: jaxlora.low_rank(x, energy=0.5).s)(jnp.ones((3, 3)))


# ----------------------------------------------------------------------------------------------------------------------
# The update of a leaf.


@pytest.mark.parametrize(("roles", "shape"), LAYOUTS)
def test_spectrum_is_that_of_the_delta(x64, roles, shape):
  node = weight(shape=shape, roles=roles)
  order = [d for role in "sio" for d, own in enumerate(roles) if own == role]
  stack = [n for n, own in zip(shape, roles, strict=True) if own == "s"]
  fan_in = math.prod(n for n, own in zip(shape, roles, strict=True) if own == "i")
  whole = np.transpose(delta(node), order).reshape(*stack, fan_in, -1)
  want = np.linalg.svd(whole, compute_uv=False)[..., :3]
  np.testing.assert_allclose(jaxlora.spectrum({"w": node})["w"], want, rtol=1e-12)


@pytest.mark.parametrize(("roles", "shape"), LAYOUTS)
def test_compress_is_the_best_approximation(x64, roles, shape):
  node = weight(shape=shape, roles=roles)
  tree, report = jaxlora.compress_with_report({"w": node}, rank=2)
  s = np.asarray(jaxlora.spectrum({"w": node})["w"])
  lost = np.linalg.norm(delta(tree["w"]) - delta(node))
  np.testing.assert_allclose(lost, np.linalg.norm(s[..., 2:]), rtol=1e-10)
  (row,) = report.leaves
  np.testing.assert_allclose([row.residual, report.residual], lost / np.linalg.norm(s), rtol=1e-10)
  assert (row.path, row.rank, tree["w"].rank, tree["w"].scale) == ("w", 2, 2, 1)
  assert "residual of all" in str(report)
  chex.assert_trees_all_equal(jaxlora.strip(tree), {"w": node.base})


def test_compress_without_loss(x64):
  """A rank that was never used goes away: twice the same factors are one."""
  node = weight()
  twice = jaxlora.LoraWeight(node.base, *(jnp.concatenate([x, x]) for x in (node.a, node.b)), rank=6, alpha=node.alpha)
  tree = jaxlora.compress({"w": twice}, energy=1.0)
  assert tree["w"].rank == 3
  np.testing.assert_allclose(delta(tree["w"]), delta(twice), atol=1e-13)
  assert jaxlora.compress({"w": node}, rank=3)["w"] is node  # nothing to do


def test_no_update_is_formed():
  node = weight(shape=(40, 50), rank=4, dtype=np.float32)
  for fn in (lambda w: jaxlora.compress({"w": w}, rank=2)["w"].a, lambda w: jaxlora.spectrum({"w": w})["w"]):
    sizes = [var.aval.size for eqn in traced(fn, node) for var in eqn.outvars]
    assert max(sizes) <= 4 * 50


def test_compress_in_half_precision_keeps_the_dtype():
  node = weight(dtype=np.float32)
  half = jaxlora.LoraWeight(*(x.astype(jnp.bfloat16) for x in (node.base, node.a, node.b)), rank=3, alpha=5.0)
  tree = jaxlora.compress({"w": half}, rank=2)
  assert (tree["w"].a.dtype, tree["w"].b.dtype) == (jnp.bfloat16, jnp.bfloat16)


def test_allocated_ranks_go_into_compress_and_config(x64):
  tree = {"layer+1": weight(0), "other": weight(5)}
  tree["layer+1"] = jaxlora.compress({"w": tree["layer+1"]}, rank=1)["w"]
  ranks = jaxlora.allocate(jaxlora.spectrum(tree), budget=3)
  assert ranks == {r"layer\+1": {"rank": 1}, "other": {"rank": 2}}
  smaller = jaxlora.compress(tree, rank=ranks)
  assert [smaller[name].rank for name in tree] == [1, 2]
  config = jaxlora.LoraConfig(targets=".*", overrides=ranks)
  fresh = jaxlora.adapt(jaxlora.strip(tree), config, KEY)
  assert [fresh[name].rank for name in tree] == [1, 2]


def test_allocate_gives_every_term_to_the_largest_shares():
  spectra = {name: np.sort(np.abs(normal(k, (2, 6), np.float64)))[:, ::-1] for k, name in enumerate("abc")}
  ranks = {name: fields["rank"] for name, fields in jaxlora.allocate(spectra, 10).items()}
  assert sum(ranks.values()) == 10
  shares = {name: (s**2 / (s**2).sum(1, keepdims=True)).mean(0) for name, s in spectra.items()}
  kept = min(shares[name][rank - 1] for name, rank in ranks.items() if rank > 1)
  gone = max(shares[name][rank] for name, rank in ranks.items() if rank < 6)
  assert kept >= gone


@pytest.mark.parametrize(
  ("spectra", "budget", "match"),
  [
    ({}, 3, "spectra is empty"),
    ({"a": [1.0], "b": [1.0]}, 1, "budget of at least 2"),
    ({"a": [np.nan]}, 1, "a: found .*finite"),
  ],
)
def test_allocate_refuses(spectra, budget, match):
  with pytest.raises(ValueError, match=match):
    jaxlora.allocate(spectra, budget)


def test_broken_factors_are_named():
  node = weight(dtype=np.float32)
  tree = {"w": jaxlora.LoraWeight(node.base, node.a * jnp.nan, node.b, rank=3)}
  for fn in (jaxlora.spectrum, lambda tree: jaxlora.compress(tree, rank=1)):
    with pytest.raises(ValueError, match=r"NaN or infinite values in w \(a\)"):
      fn(tree)
  with pytest.raises(ValueError, match="rank says nothing of w"):
    jaxlora.compress({"w": node}, rank={"v": {"rank": 1}})


# ----------------------------------------------------------------------------------------------------------------------
# What fine-tuning changed.


def fine_tuned(rank=2):
  base = {
    "layers": jax.device_put(normal(0, (3, 9, 7), np.float64)),
    "head": jax.device_put(normal(1, (7, 2), np.float64)),
    "same": jax.device_put(normal(2, (5, 5), np.float64)),
    "bias": jnp.zeros(7),
    "steps": jnp.arange(3),
  }
  change = jax.device_put(normal(3, (3, 9, rank), np.float64) @ normal(4, (3, rank, 7), np.float64))
  return base, base | {"layers": base["layers"] + change, "head": base["head"] + 1, "bias": base["bias"] + 1}


def apply_stack(params):
  x = jnp.ones((1, 9))
  return jax.lax.scan(lambda total, w: (total, x @ w), jnp.zeros(()), params["layers"])[1] + params["bias"][None, None]


def test_extract_is_exact_at_the_rank_of_the_change(x64, lenient):
  base, tuned = fine_tuned()
  tree, report = jaxlora.extract_with_report(base, tuned, rank=2, probe=apply_stack)
  chex.assert_trees_all_close(jaxlora.merge(tree), tuned, rtol=1e-12)
  chex.assert_trees_all_equal(jaxlora.strip(tree), base)
  assert tree["layers"].roles == "sio"
  kinds = {name: type(node).__name__ for name, node in tree.items() if name in ("head", "bias")}
  assert kinds == {"head": "FullWeight", "bias": "FullWeight"}  # no wider than the rank; no matrix
  assert not isinstance(tree["same"], (jaxlora.LoraWeight, jaxlora.FullWeight))
  assert {row.path: row.rank for row in report.leaves} == {"layers": 2, "head": None, "bias": None}
  assert report.residual < 1e-14


def test_extract_reports_what_is_lost(x64):
  base, tuned = fine_tuned(rank=4)
  config = jaxlora.LoraConfig(
    rank=2, alpha=6, scaling="rslora", targets="layers", train="bias|head", axes={"layers": "sio"}, init="gaussian"
  )
  tree, report = jaxlora.extract_with_report(base, tuned, config=config)
  assert (tree["layers"].rank, tree["layers"].alpha, tree["layers"].scaling) == (2, 6, "rslora")
  change = np.asarray(tuned["layers"] - base["layers"])
  lost = np.linalg.norm(delta(tree["layers"]) - change) / np.linalg.norm(change)
  by_path = {row.path: row.residual for row in report.leaves}
  np.testing.assert_allclose(by_path["layers"], lost, rtol=1e-10)
  s = np.linalg.svd(change, compute_uv=False)
  np.testing.assert_allclose(lost, np.linalg.norm(s[:, 2:]) / np.linalg.norm(s), rtol=1e-10)


def test_extract_by_energy(x64):
  base, tuned = fine_tuned(rank=4)
  config = jaxlora.LoraConfig(targets="layers", train="bias|head", axes={"layers": "sio"})
  tree = jaxlora.extract(base, tuned, config=config, energy=1.0)
  assert tree["layers"].rank == 4
  chex.assert_trees_all_close(jaxlora.merge(tree), tuned, rtol=1e-12)
  tree, report = jaxlora.extract_with_report(base, tuned, config=config, energy=0.8)
  assert tree["layers"].rank < 4
  assert report.leaves[-1].residual ** 2 <= 0.2


def test_extract_says_what_it_leaves_out():
  base, tuned = fine_tuned()
  config = jaxlora.LoraConfig(rank=2, targets="layers", axes={"layers": "sio"})
  with pytest.warns(UserWarning, match="changed bias, head, which the config neither"):
    jaxlora.extract(base, tuned, config=config)
  _, report = jaxlora.extract_with_report(base, tuned, config=config)
  assert {row.path: row.residual for row in report.leaves if row.rank is None} == {"bias": 1, "head": 1}


@pytest.mark.parametrize(
  ("change", "options", "match"),
  [
    ({}, {"rank": 1}, "no update to extract"),
    ({"extra": jnp.ones(3)}, {"rank": 1}, "Only in base: nothing; only in tuned: extra"),
    ({"w": jnp.ones((4, 5))}, {"rank": 1}, r"w has shape \(6, 5\)"),
    ({"w": jnp.full((6, 5), jnp.inf)}, {"rank": 1}, r"w \(tuned\)"),
    ({"w": jnp.zeros((6, 5))}, {}, "found rank=None and energy=None"),
    ({"w": jnp.zeros((6, 5))}, {"energy": 0.9, "config": {"overrides": {"w": {"rank": 2}}}}, "both say the rank"),
    ({"w": jnp.zeros((6, 5))}, {"config": {"rank": 6}}, "rank 6 is larger than the smaller side"),
  ],
)
def test_extract_refuses(change, options, match):
  base = {"w": jnp.ones((6, 5))}
  if "config" in options:
    options = options | {"config": jaxlora.LoraConfig(targets="w", **options["config"])}
  with pytest.raises(ValueError, match=match):
    jaxlora.extract(base, base | change, **options)


# ----------------------------------------------------------------------------------------------------------------------
# The article's program.


def test_the_articles_program():
  """Rank 20 of 10 columns is refused with the remedy; rank 10 is the original; less is worse, and its error is said."""
  pytest.importorskip("sklearn", reason="the article's program needs jaxlora[bench]")
  if not EXAMPLE.exists():
    pytest.skip("the examples are not beside the tests")
  spec = importlib.util.spec_from_file_location("article", EXAMPLE)
  article = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(article)
  pretrained, x, labels = article.data()
  assert (pretrained.shape, x.shape, set(labels)) == ((100, 100), (100, 10), {0, 1})
  assert "use rank=10" in article.refusal(x)
  whole, *_, least = article.fits(x, labels, (10, 1))
  assert (whole.error, whole.agreement) == (0, 1)
  s = np.linalg.svd(x, compute_uv=False)
  assert least.error == pytest.approx(np.linalg.norm(s[1:]) / np.linalg.norm(s), rel=1e-4)
  assert least.agreement < 1
  assert least.numbers == 100 + 1 + 10


# ----------------------------------------------------------------------------------------------------------------------
# Reports.


def test_an_extraction_draws_nothing(monkeypatch):
  """The factors come from the difference of the trees: an A that is drawn would be thrown away."""
  for name in ("uniform", "normal"):
    monkeypatch.setattr(jax.random, name, lambda *args, **kwargs: pytest.fail("a factor was drawn"))
  base, tuned = fine_tuned()
  config = jaxlora.LoraConfig(rank=2, targets="layers", train="bias|head", axes={"layers": "sio"}, dropout=0.2)
  tree = jaxlora.extract(base, tuned, config=config)
  assert (tree["layers"].rank, tree["layers"].dropout) == (2, 0.2)


def flagged():
  """Calls of the older spelling, and what takes its place."""
  base, tuned = fine_tuned()
  config = jaxlora.LoraConfig(rank=2, targets="layers", train="bias|head", axes={"layers": "sio"})
  tree = jaxlora.extract(base, tuned, config=config)
  return {
    "compress": (jaxlora.compress, jaxlora.compress_with_report, (tree,), {"rank": 1}),
    "extract": (jaxlora.extract, jaxlora.extract_with_report, (base, tuned), {"config": config}),
    "combine": (jaxlora.combine, jaxlora.combine_with_report, ([tree], [0.5], "svd"), {"rank": 1}),
  }


@pytest.mark.parametrize("name", ["compress", "extract", "combine"])
def test_the_older_spelling_of_a_report_works_and_names_the_newer_one(name):
  plain, with_report, args, options = flagged()[name]
  with pytest.warns(
    DeprecationWarning, match=rf"{name}_with_report\(\.\.\.\), which returns \(tree, Truncation\)"
  ) as seen:
    tree, report = plain(*args, with_report=True, **options)
  assert seen[0].filename == __file__
  wanted, expected = with_report(*args, **options)
  assert report == expected
  chex.assert_trees_all_equal(tree, wanted)
  chex.assert_trees_all_equal(plain(*args, **options), wanted)


def test_a_report_needs_values():
  _, _, (tree,), _ = flagged()["compress"]
  jax.jit(lambda tree: jaxlora.compress(tree, rank=1))(tree)
  with pytest.raises(ValueError, match="layers: a report reads values, which are not known under jit"):
    jax.jit(lambda tree: jaxlora.compress_with_report(tree, rank=1)[0])(tree)
