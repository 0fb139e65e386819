"""Which factor starts at zero, and the recommended settings."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

KEY = jax.random.key(0)
PARAMS = {"w": helpers.array(1, (64, 32), jnp.float32)}
X = helpers.array(2, (3, 64), jnp.float32)


def adapted(params=PARAMS, **fields):
  return jaxlora.adapt(params, jaxlora.LoraConfig(**{"rank": 4, "targets": ".*", "zero": "a"} | fields), KEY)


@pytest.mark.parametrize("variant", ["lora", pytest.param("dora", marks=pytest.mark.nightly)])
def test_a_starts_at_zero_and_b_is_drawn_as_a_map_from_the_rank(variant):
  node = adapted(variant=variant)["w"]
  assert not node.a.any()
  assert 0.9 / 2 < float(jnp.abs(node.b).max()) < 1 / 2  # uniform in ±1/sqrt(rank)
  apply = lambda params, x: x @ params["w"]
  np.testing.assert_array_equal(jaxlora.wrap(apply)({"w": node}, X), apply(PARAMS, X))
  grads = jaxlora.grad(lambda tree: jnp.square(jaxlora.wrap(apply)(tree, X)).sum())({"w": node})["w"]
  assert grads.a.any()
  assert not grads.b.any()


def test_each_leaf_may_have_its_own_and_the_config_is_written():
  params = {"v": PARAMS["w"], **PARAMS}
  config = jaxlora.LoraConfig(rank=4, targets=".*", overrides={"v": {"zero": "a"}})
  assert jaxlora.LoraConfig.from_dict(config.to_dict()) == config
  tree = jaxlora.adapt(params, config, KEY)
  assert [bool(tree[name].a.any()) for name in ("v", "w")] == [False, True]
  own = lambda key, shape, dtype, fan_in, rank: jnp.full(shape, fan_in, dtype)
  assert bool((adapted(init=own)["w"].b == 4).all())
  shapes = adapted(jax.eval_shape(lambda: PARAMS))["w"]
  np.testing.assert_array_equal(shapes.b, adapted()["w"].b)


@pytest.mark.parametrize(
  ("fields", "why"),
  [
    ({"init": "pissa"}, "init 'pissa' makes both factors"),
    ({"variant": "lora_fa"}, "the variant 'lora_fa' never trains A"),
    ({"variant": "vera"}, "the variant 'vera' starts otherwise than with a product of A and B"),
  ],
)
def test_where_a_cannot_be_zero_the_remedy_works(fields, why):
  with pytest.raises(ValueError, match=rf"w: zero='a' wants A zero and B drawn, and {why}") as caught:
    adapted(**fields)
  remedy = eval(re.search(r"LoraConfig\((overrides=.*)\)\)\.$", str(caught.value))[1].removeprefix("overrides="))
  assert isinstance(adapted(**fields, overrides=remedy)["w"], jaxlora.LoraWeight)
  with pytest.raises(ValueError, match=r"LoraConfig\.zero: found 'c', expected one of 'a', 'b'"):
    jaxlora.LoraConfig(zero="c")


@pytest.mark.nightly
def test_adams_first_update_moves_further_where_a_is_zero():
  """Its signs move a loss by the sum of absolute slopes, which is `fan_in / sqrt(rank fan_out)` times as large."""
  fan_in, rank = 1024, 8
  params = {"w": helpers.array(1, (fan_in, 16), jnp.float32)}
  x, direction = helpers.array(2, (4, fan_in), jnp.float32), helpers.array(3, (4, 16), jnp.float32)
  apply = lambda params: (x @ params["w"] * direction).sum()

  def moved(zero):
    frozen, factors = jaxlora.split(adapted(params, rank=rank, zero=zero))
    grads = jax.grad(lambda t: jaxlora.wrap(apply)(jaxlora.join(frozen, t)))(factors)
    return sum(float(jnp.abs(g).sum()) for g in jax.tree.leaves(grads))

  assert moved("a") / moved("b") == pytest.approx(fan_in / (rank * 16) ** 0.5, rel=0.5)


def test_the_recommended_settings():
  config = jaxlora.LoraConfig.recommended(rank=16, experts={".*experts.*": 4}, overrides={"head": {"rank": 2}})
  assert (config.rank, config.alpha, config.targets) == (16, 32.0, "all-linear")
  assert list(config.overrides) == ["head", ".*experts.*"]
  assert dict(config.overrides[".*experts.*"]) == {"rank": 4}
  assert jaxlora.LoraConfig.recommended(targets="w").targets == "w"
  rate = jaxlora.LoraConfig.recommended_rate
  assert [rate(2e-4), rate(2e-4, 100), rate(2e-4, 99)] == pytest.approx([2e-3, 2e-3, 3e-3])
  with pytest.raises(ValueError, match=r"rank 6 is no multiple of 4, .* rank=8"):
    jaxlora.LoraConfig.recommended(rank=6, experts={"experts": 4})
  with pytest.raises(ValueError, match=r"recommended_rate: full is 0, expected a finite number above 0"):
    rate(0)
