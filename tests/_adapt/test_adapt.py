"""Which leaves adapt, how they start, and the halves that a tree splits into."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import adapted_paths, square_weights

KEY = jax.random.key(0)


class Block(nn.Module):
  @nn.compact
  def __call__(self, ids):
    x = nn.Embed(11, 8, name="embed")(ids)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, name="attn")(x)
    x = x + nn.Dense(8, name="down")(nn.gelu(nn.Dense(16, name="up")(nn.LayerNorm()(x))))
    return nn.Dense(3, name="classes")(x.mean(axis=1))


IDS = jnp.array([[1, 2, 3], [4, 5, 6]])


def block():
  model = Block()
  params = jax.jit(model.init)(KEY, IDS)["params"]
  return params, lambda p: model.apply({"params": p}, IDS)


ATTENTION = {f"attn/{name}/kernel" for name in ("query", "key", "value", "out")}


@pytest.mark.parametrize(
  ("targets", "expected"),
  [
    ("all-linear", {*ATTENTION, "up/kernel", "down/kernel"}),
    ("attention", ATTENTION),
    (r".*/(query|value)/kernel", {"attn/query/kernel", "attn/value/kernel"}),
    (["query", "attn/out"], {"attn/query/kernel", "attn/out/kernel"}),
    (["up/kernel"], {"up/kernel"}),
    (["embed"], {"embed/embedding"}),
    (lambda path, leaf: path.startswith("up") and leaf.ndim == 2, {"up/kernel"}),
  ],
)
def test_targets(targets, expected):
  params, probe = block()
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=targets), KEY, probe=probe)
  assert set(adapted_paths(tree)) == expected


def test_all_linear_without_a_probe_goes_by_name():
  params = {
    "embed": {"embedding": jnp.ones((9, 4))},
    "up": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones((3, 6))},
    "norm": {"scale": jnp.ones((3, 4))},
    "head": {"kernel": jnp.ones((6, 3))},
  }
  assert set(adapted_paths(jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY))) == {"up/kernel"}


def test_attention_layers_are_those_with_a_query():
  kernel = {"kernel": jnp.ones((4, 4))}
  params = {
    "layer": {"q_proj": kernel, "k_proj": kernel, "v_proj": kernel, "o_proj": kernel, "up_proj": kernel},
    "policy": kernel,
    "value": kernel,  # a critic's head, not a projection
  }
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="attention"), KEY)
  assert set(adapted_paths(tree)) == {f"layer/{name}_proj/kernel" for name in "qkvo"}


def test_all_linear_keeps_the_last_matrix_of_a_network_without_a_classifier():
  """A residual stream reaches the end around every kernel: none of them is a classifier."""
  params = {"up": jnp.ones((4, 6)), "down": jnp.ones((6, 4))}
  x = jnp.ones((2, 4))
  residual = lambda p: x + jnp.tanh(x @ p["up"]) @ p["down"]
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY, probe=residual)
  assert set(adapted_paths(tree)) == {"up", "down"}
  plain = lambda p: jnp.tanh(x @ p["up"]) @ p["down"]
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), KEY, probe=plain)
  assert set(adapted_paths(tree)) == {"up"}


def test_exclude_overrides_and_train():
  params, probe = block()
  config = jaxlora.LoraConfig(
    rank=2,
    alpha=4,
    exclude=["attn/key"],
    overrides={r".*/query/kernel": {"rank": 1, "alpha": 3}, "up/kernel": {"init": "gaussian", "scaling": "rslora"}},
    train=["classes", "bias"],
  )
  tree = jaxlora.adapt(params, config, KEY, probe=probe)
  weights = {leaf.path: leaf for leaf in jaxlora.summary(tree).leaves}
  assert "attn/key/kernel" not in weights
  assert (weights["attn/query/kernel"].rank, weights["attn/query/kernel"].scale) == (1, 3)
  assert weights["up/kernel"].scale == pytest.approx(4 / 2**0.5)
  assert weights["down/kernel"].scale == 2
  assert isinstance(tree["classes"]["kernel"], jaxlora.FullWeight)
  assert isinstance(tree["attn"]["key"]["bias"], jaxlora.FullWeight)
  assert weights["classes/kernel"].rank is None


def test_overrides_of_dropout_and_dtype():
  params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
  config = jaxlora.LoraConfig(
    rank=2, targets=".*", dropout=0.5, dtype="float16", overrides={"v": {"dropout": 0.25, "dtype": jnp.bfloat16}}
  )
  tree = jaxlora.adapt(params, config, KEY)
  assert [tree[name].dropout for name in "wv"] == [0.5, 0.25]
  assert [(tree[name].a.dtype, tree[name].b.dtype) for name in "wv"] == [(jnp.float16,) * 2, (jnp.bfloat16,) * 2]


def test_axes_win_over_the_probe():
  params, probe = {"w": jnp.ones((5, 4))}, lambda p: jnp.ones((2, 5)) @ p["w"]
  for axes, roles in ((None, "io"), ({"w": "oi"}, "oi")):
    tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w", axes=axes), KEY, probe=probe)
    assert tree["w"].roles == roles


def test_alpha_defaults_to_the_rank_of_the_leaf():
  params = {"w": jnp.ones((8, 8)), "v": jnp.ones((8, 8))}
  config = jaxlora.LoraConfig(rank=2, targets=".*", overrides={"v": {"rank": 4}})
  tree = jaxlora.adapt(params, config, KEY)
  assert [tree[name].scale for name in "wv"] == [1, 1]
  assert [tree[name].alpha for name in "wv"] == [2, 4]


@pytest.mark.parametrize(
  ("init", "variance"), [("kaiming", 1 / (3 * 400)), ("he_uniform", 2 / 400), ("gaussian", 1 / 16**2)]
)
def test_initialisers(init, variance):
  """A's variance as the papers give it, with fan-in over contracted axes alone; B is zero."""
  config = jaxlora.LoraConfig(rank=16, targets="w", axes={"w": "sio"}, init=init)
  weight = jaxlora.adapt({"w": jnp.ones((3, 400, 50))}, config, KEY)["w"]
  chex.assert_shape([weight.a, weight.b], [(3, 16, 400), (3, 16, 50)])
  assert float(weight.a.var()) == pytest.approx(variance, rel=0.05)
  assert float(jnp.abs(weight.a.mean())) < 4 * (variance / weight.a.size) ** 0.5
  assert not weight.b.any()


def test_kaiming_stays_within_its_bound():
  weight = jaxlora.adapt({"w": jnp.ones((100, 50))}, jaxlora.LoraConfig(targets="w"), KEY)["w"]
  assert 0.09 < float(jnp.abs(weight.a).max()) <= 0.1


def test_every_leaf_has_a_key_of_its_own():
  params = {name: jnp.ones((6, 5)) for name in "uvw"}
  both = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="u|v"), KEY)
  all_three = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=".*"), KEY)
  np.testing.assert_array_equal(both["u"].a, all_three["u"].a)
  assert not np.array_equal(all_three["u"].a, all_three["v"].a)


def test_dtype_of_the_factors():
  params = {"w": jnp.ones((6, 5), jnp.bfloat16)}
  weight = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w", dtype="float32"), KEY)["w"]
  assert (weight.base.dtype, weight.a.dtype, weight.b.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
  assert weight.materialize().dtype == jnp.bfloat16
  out = jaxlora.wrap(lambda p, x: x @ p["w"])({"w": weight}, jnp.ones((2, 6), jnp.bfloat16))
  assert out.dtype == jnp.bfloat16


def test_strip_and_merge():
  params, probe = block()
  config = jaxlora.LoraConfig(rank=2, train=["classes"])
  tree = jaxlora.adapt(params, config, KEY, probe=probe)
  chex.assert_trees_all_equal(jaxlora.strip(tree), params)
  chex.assert_trees_all_equal(jaxlora.merge(tree), params)
  frozen, trainable = jaxlora.split(tree)
  trained = jaxlora.join(frozen, jax.tree.map(lambda leaf: leaf + 1, trainable))
  chex.assert_trees_all_equal(jaxlora.strip(trained), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(jaxlora.merge(trained), params)
  assert not np.array_equal(jaxlora.merge(trained)["up"]["kernel"], params["up"]["kernel"])
  np.testing.assert_array_equal(jaxlora.merge(trained)["classes"]["bias"], params["classes"]["bias"] + 1)


def test_merging_leaves_the_tree_and_its_base_as_they_were():
  tree = jaxlora.adapt({"w": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2, targets="w"), KEY)
  frozen, trainable = jaxlora.split(tree)
  tree = jaxlora.join(frozen, jax.tree.map(lambda leaf: leaf + 1, trainable))
  merged = jaxlora.merge(tree)
  np.testing.assert_array_equal(jaxlora.strip(tree)["w"], jnp.ones((6, 5)))
  chex.assert_trees_all_equal(jaxlora.strip(merged), merged)


def test_merge_is_the_formula(x64):
  rng = np.random.default_rng(0)
  base, a, b = rng.standard_normal((6, 5)), rng.standard_normal((2, 6)), rng.standard_normal((2, 5))
  weight = jaxlora.LoraWeight(*map(jnp.asarray, (base, a, b)), rank=2, alpha=3)
  np.testing.assert_allclose(jaxlora.merge(weight), base + 1.5 * a.T @ b, rtol=1e-14)


@pytest.mark.parametrize("factors", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("base", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16, jnp.float32])
def test_merge_sums_in_the_wider_dtype(base, factors):
  """Against the sum in fp32, rounded once: what a narrower sum would lose shows."""
  rng = np.random.default_rng(0)
  make = lambda shape, dtype: jnp.asarray(rng.standard_normal(shape)).astype(dtype)
  weight = jaxlora.LoraWeight(make((40, 30), base), make((3, 40), factors), make((3, 30), factors), rank=3, alpha=2)
  base32, a, b = (np.asarray(part, np.float32) for part in (weight.base, weight.a, weight.b))
  exact = base32 + np.float32(weight.scale) * a.T @ b
  merged = jaxlora.merge({"w": weight})["w"]
  assert merged.dtype == base
  wide = factors if jnp.finfo(base).bits < 16 else jnp.float32 if base != factors else base
  error = np.abs(np.asarray(merged, np.float32) - exact) / np.abs(exact).max()
  allowed = jnp.finfo(base).eps / 2 + 4 * jnp.finfo(wide).eps
  assert error.max() <= allowed
  if wide == jnp.float32:  # rounded once, from a sum that is right
    want = jnp.asarray(exact).astype(base)
    assert np.mean(np.asarray(merged != want)) < (0.01 if base != jnp.float32 else 1)


def test_full_weights_do_not_alias_their_base():
  for leaf in (jnp.ones(4), np.ones(4, np.float32)):
    tree = jaxlora.adapt({"w": jnp.ones((6, 4)), "b": leaf}, jaxlora.LoraConfig(rank=2, targets="w", train="b"), KEY)
    assert not np.shares_memory(np.asarray(tree["b"].value), np.asarray(tree["b"].base))
    jax.jit(lambda value: value + 1, donate_argnums=0)(tree["b"].value)
    np.testing.assert_array_equal(tree["b"].base, np.ones(4))


def test_split_and_join_are_inverse_and_complementary():
  params, probe = block()
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, train=["classes"]), KEY, probe=probe)
  frozen, trainable = jaxlora.split(tree)
  chex.assert_trees_all_equal(jaxlora.join(frozen, trainable), tree)
  assert len(jax.tree.leaves(frozen)) + len(jax.tree.leaves(trainable)) == len(jax.tree.leaves(tree))
  # The base's leaves are handed on, not copied.
  assert frozen["up"]["kernel"].base is params["up"]["kernel"]


def test_another_tasks_adapter_takes_the_place_of_the_first():
  params = {"w": jnp.ones((6, 5))}
  first = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets="w"), KEY)
  other = jaxlora.adapt(params, jaxlora.LoraConfig(rank=3, alpha=7, targets="w"), jax.random.key(1))
  swapped = jaxlora.join(jaxlora.split(first)[0], jaxlora.split(other)[1])
  chex.assert_trees_all_equal(swapped, other)


@chex.dataclass
class Holder:
  kernel: jax.Array
  layers: list


def test_the_halves_of_square_weights_are_joined_part_by_part():
  tree = square_weights(2)
  chex.assert_trees_all_equal(jaxlora.join(*jaxlora.split(tree)), tree)
  other = square_weights(2, seed=3)
  swapped = jaxlora.join(jaxlora.split(tree)[0], jaxlora.split(other)[1])
  chex.assert_trees_all_equal(swapped, other)


def test_any_pytree_is_a_parameter_tree():
  params = Holder(kernel=jnp.ones((4, 3)), layers=[(jnp.ones((3, 5)),), jnp.ones((5,))])
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=r"kernel|layers/0/0"), KEY)
  fn = lambda p, x: x @ p.kernel @ p.layers[0][0] + p.layers[1][None]
  assert jaxlora.wrap(fn, on_materialize="error")(tree, jnp.ones((2, 4))).shape == (2, 5)
  assert set(adapted_paths(tree)) == {"kernel", "layers/0/0"}
  chex.assert_trees_all_equal(jaxlora.strip(tree), params)


def test_adapt_and_merge_under_jit_and_shapes_alone():
  params = {"w": jnp.ones((6, 5)), "b": jnp.ones((5,))}
  config = jaxlora.LoraConfig(rank=2, targets="w", train="b")
  eager = jaxlora.adapt(params, config, KEY)
  chex.assert_trees_all_close(jax.jit(lambda p, k: jaxlora.adapt(p, config, k))(params, KEY), eager)
  abstract = jax.eval_shape(lambda p: jaxlora.adapt(p, config, KEY), params)
  chex.assert_trees_all_equal_shapes_and_dtypes(abstract, eager)
  assert jaxlora.summary(abstract) == jaxlora.summary(eager)
  chex.assert_trees_all_equal(jax.jit(jaxlora.merge)(eager), params)


def test_boxed_parameters():
  """Flax's partitioning metadata stays around the weight, and is no part of its path."""
  init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
  model = nn.Dense(4, kernel_init=init)
  variables = model.init(KEY, jnp.ones((2, 6)))
  tree = jaxlora.adapt(variables, jaxlora.LoraConfig(rank=2, targets="params/kernel"), KEY)
  assert tree["params"]["kernel"].names == ("in", "out")
  out = jaxlora.wrap(model.apply, on_materialize="error")(tree, jnp.ones((2, 6)))
  np.testing.assert_array_equal(out, model.apply(variables, jnp.ones((2, 6))))
