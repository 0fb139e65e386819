"""How factors start: distributions, the papers' equations, and an adapted model that is the base all the same."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import adapted, normal

KEY = jax.random.key(0)
BOTH = ["orthogonal", "pissa", "pissa_niter_4", "olora"]


def params(dtype=np.float64):
  return {"w": jax.device_put(normal(0, (40, 30), dtype)), "heads": jax.device_put(normal(1, (3, 20, 2, 6), dtype))}


def started(init, rank=4, dtype=np.float64, targets=".*", **fields):
  axes = {"heads": "sioo"} if targets == ".*" else None
  fields = {"targets": targets, "axes": axes, "init": init} | fields
  return adapted(params(dtype), seed=None, rank=rank, alpha=6.0, **fields)


def apply(p, x):
  return x @ p["w"], jnp.einsum("bi,sihd->bshd", x[:, :20], p["heads"])


def data(dtype):
  return jax.device_put(normal(5, (3, 40), dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Both factors.


@pytest.mark.parametrize(("init", "scaling"), [*((init, "standard") for init in BOTH), ("pissa", "rslora")])
def test_the_adapted_model_is_the_base(x64, init, scaling):
  """Relative to the base's output: 1e-12 in double precision; strip is the base, bit for bit."""
  tree = started(init, scaling=scaling)
  assert all(leaf.b.any() for leaf in tree.values())
  for got, want in zip(jaxlora.wrap(apply)(tree, data(np.float64)), apply(params(), data(np.float64)), strict=True):
    np.testing.assert_allclose(got, want, atol=1e-12 * float(jnp.abs(want).max()))
  chex.assert_trees_all_equal(jaxlora.strip(tree), params())
  chex.assert_trees_all_close(jaxlora.merge(tree), params(), rtol=1e-12)


@pytest.mark.parametrize("init", BOTH)
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-6), (jnp.bfloat16, 8e-3)])
def test_in_other_precisions(init, dtype, tolerance):
  base = {"w": params(dtype)["w"]}
  tree = jaxlora.adapt(base, jaxlora.LoraConfig(rank=4, alpha=6.0, targets="w", init=init), KEY)
  assert tree["w"].a.dtype == dtype
  got, want = (
    np.asarray(fn(tree, data(dtype)), np.float32)
    for tree, fn in ((tree, jaxlora.wrap(lambda p, x: x @ p["w"])), (base, lambda p, x: x @ p["w"]))
  )
  np.testing.assert_allclose(got, want, atol=tolerance * np.abs(want).max())


@pytest.mark.parametrize("variant", ["lora_fa", "dora"])
def test_variants_of_a_product_start_so_too(x64, variant):
  tree = started("pissa", targets="w", variant=variant)
  chex.assert_trees_all_close(jaxlora.merge(tree), params(), rtol=1e-11)


def test_the_start_is_no_alias_and_stays():
  """Training may donate the factors; what is taken off is frozen, and the update is a plain product of rank 2 r."""
  tree = started("pissa", targets="w", dtype=np.float32)
  w = tree["w"]
  assert w.extra["a0"] is not w.a
  np.testing.assert_array_equal(w.extra["a0"], w.a)
  assert set(jax.tree.leaves(jaxlora.labels(w).extra)) == {"frozen"}
  frozen, trainable = jaxlora.split(tree)
  moved = jaxlora.join(frozen, jax.tree.map(lambda x: 1.5 * x, trainable))
  a, b = moved["w"].factors()
  assert a.shape == (8, 40)
  plain = jaxlora.LoraWeight(w.base, a, b, rank=8, alpha=8.0)
  np.testing.assert_allclose(jaxlora.merge(moved)["w"], jaxlora.merge(plain), rtol=1e-6)
  assert jaxlora.compress(moved, rank=4)["w"].extra == {}


def test_pissa_is_the_principal_part(x64):
  w = started("pissa", targets="w")["w"]
  u, s, vt = np.linalg.svd(np.asarray(w.base))
  np.testing.assert_allclose(w.scale * w.a.T @ w.b, (u[:, :4] * s[:4]) @ vt[:4], atol=1e-12)
  np.testing.assert_allclose(w.a @ w.a.T, np.diag(s[:4]) / w.scale, atol=1e-12)
  np.testing.assert_allclose(w.b @ w.b.T, np.diag(s[:4]) / w.scale, atol=1e-12)


def test_pissa_by_a_randomised_svd(x64):
  exact, fast = started("pissa")["heads"], started("pissa_niter_16")["heads"]
  products = [jnp.einsum("sri,srhd->sihd", w.a, w.b) for w in (exact, fast)]
  np.testing.assert_allclose(products[1], products[0], atol=1e-6)


def test_olora_is_a_qr_decomposition(x64):
  w = started("olora", targets="w")["w"]
  np.testing.assert_allclose(w.b @ w.b.T, np.eye(4), atol=1e-12)
  q, r = np.linalg.qr(np.asarray(w.base).T)
  np.testing.assert_allclose(w.a.T @ w.b, r[:4].T @ q[:, :4].T, atol=1e-12)
  np.testing.assert_allclose(np.tril(np.asarray(w.a)[:, :4], -1), 0, atol=1e-12)


def test_orthogonal_halves():
  """A and B are Gaussian of width sqrt(r / 2 / r) / 10 = sqrt(1/2) / 10 on average, and their product is zero."""
  config = jaxlora.LoraConfig(rank=16, targets="w", init="orthogonal")
  w = jaxlora.adapt({"w": jnp.ones((900, 700))}, config, KEY)["w"]
  assert w.extra == {}
  for factor in (w.a, w.b):
    assert float(factor.var()) == pytest.approx(1 / 200, rel=0.05)  # 8 of 16 directions: 8 x 700 draws, 1.9 % wide
    assert int(np.linalg.matrix_rank(factor)) == 8
  assert float(jnp.abs(w.a.T @ w.b).max()) < 1e-6
  half = jaxlora.adapt(
    {"w": jnp.ones((9, 8), jnp.bfloat16)}, jaxlora.LoraConfig(rank=2, targets="w", init="orthogonal"), KEY
  )
  assert set(half["w"].extra) == {"a0", "b0"}  # what rounding leaves of the product is taken off


@pytest.mark.parametrize(
  ("fields", "match"),
  [
    ({"init": "orthogonal", "rank": 3}, "w: init 'orthogonal' halves the rank, found 3"),
    ({"init": "pissa", "variant": "vera"}, "w: init 'pissa' gives both factors .*'vera'"),
    ({"init": "svd"}, "'svd', expected one of 'kaiming', .*'pissa_niter_"),
    ({"init": "pissa_niter_"}, "expected one of"),
  ],
)
def test_inits_that_do_not_fit(fields, match):
  with pytest.raises(ValueError, match=match):
    jaxlora.adapt({"w": jnp.ones((6, 5))}, jaxlora.LoraConfig(**{"rank": 2, "targets": "w"} | fields), KEY)


# ----------------------------------------------------------------------------------------------------------------------
# A alone: the whole distribution, not its variance alone.


def kolmogorov(values, cdf):
  """The largest distance between the distribution of the values and `cdf`, times sqrt(n): above 1.95 with p = 0.001."""
  x = np.sort(np.asarray(values, np.float64).ravel())
  steps = np.arange(len(x) + 1) / len(x)
  return np.sqrt(len(x)) * max((cdf(x) - steps[:-1]).max(), (steps[1:] - cdf(x)).max())


@pytest.mark.parametrize(
  ("init", "cdf"),
  [
    ("kaiming", lambda x: (x * 20 + 1) / 2),  # uniform in ±1/sqrt(400)
    ("he_uniform", lambda x: (x * 20 / 6**0.5 + 1) / 2),
    ("gaussian", lambda x: np.asarray(jax.scipy.stats.norm.cdf(jnp.asarray(x * 8, jnp.float32)))),
  ],
)
def test_distributions(init, cdf):
  config = jaxlora.LoraConfig(rank=8, targets="w", axes={"w": "sio"}, init=init)
  weights = [jaxlora.adapt({"w": jnp.ones((2, 400, 20))}, config, jax.random.key(seed))["w"].a for seed in range(3)]
  distances = [kolmogorov(a, cdf) for a in weights]
  assert max(distances) < 1.95
  assert kolmogorov(1.1 * weights[0], lambda x: np.clip(cdf(x), 0, 1)) > 1.95  # what a wrong width would give


# ----------------------------------------------------------------------------------------------------------------------
# A is drawn only where it is kept.


def draws_of(monkeypatch, **fields):
  """How many arrays of A's shape are drawn in adapting two weights."""
  count = 0

  def counted(draw):
    def drawn(key, shape=(), *args, **kwargs):
      nonlocal count
      count += tuple(shape) in ((4, 40), (3, 4, 20))
      return draw(key, shape, *args, **kwargs)

    return drawn

  with monkeypatch.context() as patch:
    for name in ("uniform", "normal"):
      patch.setattr(jax.random, name, counted(getattr(jax.random, name)))
    started(dtype=np.float32, **fields)
  return count


@pytest.mark.parametrize("variant", ["lora", "lora_fa", "dora", "dora_exact"])
@pytest.mark.parametrize(
  ("init", "draws"), [("kaiming", 2), ("he_uniform", 2), ("gaussian", 2), *((i, 0) for i in BOTH)]
)
def test_no_factor_is_drawn_to_be_thrown_away(monkeypatch, init, draws, variant):
  assert draws_of(monkeypatch, init=init, variant=variant) == draws


def test_an_init_of_ones_own_draws_what_it_draws(monkeypatch):
  assert draws_of(monkeypatch, init=lambda key, shape, dtype, fan_in, rank: jnp.zeros(shape, dtype)) == 0


# ----------------------------------------------------------------------------------------------------------------------
# An init of one's own.


def scaled(key, shape, dtype, fan_in, rank):
  return jax.random.normal(key, shape, dtype) * jnp.asarray(rank / fan_in, dtype)


def test_an_init_of_ones_own_makes_a():
  calls = []

  def own(key, shape, dtype, fan_in, rank):
    calls.append((shape, jnp.dtype(dtype).name, fan_in, rank))
    return scaled(key, shape, dtype, fan_in, rank)

  tree = started(own, dtype=np.float32, overrides={"heads": {"rank": 2, "dtype": "bfloat16"}})
  assert sorted(calls) == [((3, 2, 20), "bfloat16", 20, 2), ((4, 40), "float32", 40, 4)]
  assert (tree["heads"].a.dtype, tree["w"].a.dtype) == (jnp.bfloat16, jnp.float32)
  assert not tree["w"].b.any()
  np.testing.assert_array_equal(tree["w"].a, started(scaled, dtype=np.float32)["w"].a)
  mixed = started(dtype=np.float32, init="kaiming", overrides={"w": {"init": scaled}})
  np.testing.assert_array_equal(mixed["w"].a, tree["w"].a)
  np.testing.assert_array_equal(mixed["heads"].a, started("kaiming", dtype=np.float32)["heads"].a)


@pytest.mark.parametrize("variant", ["dora", "vera", "loha", "lokr"])
def test_variants_take_it_too(variant):
  tree = started(scaled, dtype=np.float32, variant=variant)
  np.testing.assert_allclose(jaxlora.merge(tree)["w"], params(np.float32)["w"], rtol=1e-6)


def test_an_init_of_another_shape_or_dtype_is_named():
  wrong = {
    r"w: init gives an array of shape \(40, 4\), dtype float32; expected shape \(4, 40\), dtype float32": (
      lambda key, shape, dtype, fan_in, rank: jnp.zeros(shape[::-1], dtype)
    ),
    r"w: init gives an array of shape \(4, 40\), dtype float16; expected": (
      lambda key, shape, dtype, fan_in, rank: jnp.zeros(shape, jnp.float16)
    ),
  }
  for match, init in wrong.items():
    with pytest.raises(ValueError, match=match):
      started(init, dtype=np.float32, targets="w")


def test_a_config_with_an_init_of_ones_own_is_hashable_and_not_json():
  config = jaxlora.LoraConfig(init=scaled)
  assert config == jaxlora.LoraConfig(init=scaled)
  assert hash(config) == hash(jaxlora.LoraConfig(init=scaled))
  with pytest.raises(TypeError, match=r"LoraConfig\.init is a callable, which to_dict cannot write"):
    config.to_dict()
  with pytest.raises(TypeError, match=r"LoraConfig\.overrides\['w'\]\['init'\] is a callable"):
    jaxlora.LoraConfig(overrides={"w": {"init": scaled}}).to_dict()
