"""Factors that start from the floats that codes were made of, and what is written again as codes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests import helpers

KEY = jax.random.key(0)
WEIGHT = helpers.array(0, (128, 96), np.float32)
PARAMS = {"w": WEIGHT}
NF4 = jaxlora.quantize(PARAMS, "nf4", targets="w")


def config(init, **fields):
  return jaxlora.LoraConfig(**{"rank": 24, "alpha": 16, "targets": "w", "init": init} | fields)


def started(init, base=NF4, floats=PARAMS, **fields):
  return jaxlora.adapt(base, config(init, **fields), KEY, floats=floats)


def loss(tree):
  return float(jnp.linalg.norm(jaxlora.merge(tree)["w"] - WEIGHT) / jnp.linalg.norm(WEIGHT))


def written(w, format="nf4"):
  """The floats that codes of an array stand for."""
  return np.asarray(jaxlora.quantize({"w": jnp.asarray(w)}, format, targets="w")["w"].dequantize())


def principal(w, rank):
  u, s, vt = np.linalg.svd(np.asarray(w), full_matrices=False)
  return (u[:, :rank] * s[:rank]) @ vt[:rank]


def loftq(w, rank, steps):
  """Algorithm 1 of the paper: the floats of the codes, and the product of the factors."""
  low = np.zeros_like(w)
  for _ in range(steps):
    codes = written(w - low)
    low = principal(w - codes, rank)
  return codes, low


@pytest.mark.parametrize(("init", "steps"), [("residual", 1), ("loftq_niter_1", 1), ("loftq_niter_2", 2)])
def test_loftq_is_the_papers_algorithm(init, steps):
  node = started(init)["w"]
  codes, low = loftq(np.asarray(WEIGHT), 24, steps)
  agree = np.isclose(node.base.dequantize(), codes, atol=1e-5).mean()
  assert agree == 1 if steps == 1 else agree > 0.999  # a rounding of the factors may move a value by one code
  helpers.assert_close(node.delta(), low, 1e-3 if steps == 1 else 0.05)
  assert (init == "residual") == (node.base.codes is NF4["w"].codes)
  assert node.extra == {}


def test_each_step_loses_less():
  errors = [loss(started(init)) for init in ("residual", "loftq_niter_2", "loftq")]
  without = loss(jaxlora.adapt(NF4, config("kaiming"), KEY))
  assert without > errors[0] > errors[1] > errors[2]
  assert errors[2] < 0.8 * without


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_parts_of_the_floats_are_taken_out_and_the_rest_is_written(init):
  """QPiSSA: the factors are those that the floats have by themselves; the codes are those of what they leave."""
  node = started(init)["w"]
  alone = jaxlora.adapt(PARAMS, config(init), KEY)["w"]
  helpers.assert_close(node.a, alone.a, 1e-4)
  helpers.assert_close(node.b, alone.b, 1e-4)
  helpers.assert_close(node.base.dequantize(), written(WEIGHT - node.delta()), 1e-4)
  assert node.extra == {}
  assert loss({"w": node}) < loss(jaxlora.adapt(NF4, config("kaiming"), KEY))
  kept = jaxlora.adapt(NF4, config(init), KEY)["w"]  # without floats: of what the codes stand for, and taken off again
  assert kept.base.codes is NF4["w"].codes
  helpers.assert_close(jaxlora.merge({"w": kept})["w"], NF4["w"].dequantize(), 1e-4)


def test_stacks_heads_scales_and_dtypes():
  """Every matrix of a stack by itself; half precision; rslora; the factors' own dtype."""
  stack = jax.random.normal(KEY, (2, 64, 4, 16), jnp.bfloat16)
  base = jaxlora.quantize({"w": stack}, "int4", targets="w", axes={"w": "sioo"}, double=False, block_size=32)
  fields = {"axes": {"w": "sioo"}, "scaling": "rslora", "dtype": "float32", "rank": 8}
  for init in ("residual", "loftq_niter_2"):
    tree = started(init, base, {"w": np.asarray(stack)}, **fields)
    node = tree["w"]
    assert (node.dtype, node.a.dtype, node.base.block) == (jnp.bfloat16, jnp.float32, (1, 32, 1, 1))
    assert jax.tree.structure(node.base) == jax.tree.structure(base["w"])
    whole = jaxlora.merge(tree, dtype=jnp.float32)["w"]
    floats = [np.asarray(x, np.float32).reshape(2, -1) for x in (whole, base["w"].dequantize(), stack)]
    assert (np.linalg.norm(floats[0] - floats[2], axis=1) < 0.95 * np.linalg.norm(floats[1] - floats[2], axis=1)).all()


@pytest.mark.parametrize("variant", ["dora", "lora_fa"])
def test_variants_start_so_too(variant):
  """DoRA's magnitude is that of the codes and the factors together: the weight is what LoRA's is."""
  helpers.assert_close(
    jaxlora.merge(started("residual", variant=variant))["w"], jaxlora.merge(started("residual"))["w"], 1e-5
  )


def test_wrapped_functions_train_and_only_codes_are_kept():
  tree = started("loftq_niter_2")
  x = jax.random.normal(KEY, (4, 128))
  helpers.check(lambda p, x: jnp.tanh(x @ p["w"]), tree, (x,), 1e-4)
  assert jaxlora.strip(tree)["w"].format == "nf4"


def test_shapes_alone():
  base, floats = jax.eval_shape(lambda: (NF4, PARAMS))
  for given in ((base, floats), (base, PARAMS), (NF4, floats)):
    tree = started("loftq_niter_1", *given)
    real = started("loftq_niter_1")
    assert jax.tree.structure(tree) == jax.tree.structure(real)
    assert jax.tree.map(lambda x: (x.shape, x.dtype), tree) == jax.tree.map(lambda x: (x.shape, x.dtype), real)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Foreign:
  """Another library's codes."""

  codes: Any = dataclasses.field(default_factory=lambda: jnp.round(WEIGHT * 4).astype(jnp.int8))

  shape, dtype, ndim = (128, 96), jnp.dtype(jnp.float32), 2

  def dequantize(self):
    return self.codes.astype(jnp.float32) / 4


REFUSED = {
  "no floats": (
    lambda: started("residual", floats=None),
    r"w: init 'residual' .*adapt\(quantised, config, key, floats=",
  ),
  "a base of floats": (
    lambda: started("loftq", PARAMS),
    r"w: init 'loftq' .*this base is float32.*jaxlora.quantize.*'kaiming'",
  ),
  "no leaf": (lambda: started("residual", floats={"v": WEIGHT}), "floats has no leaf w; expected the tree"),
  "another shape": (lambda: started("pissa", floats={"w": WEIGHT.T}), r"floats: w: found shape \(96, 128\)"),
  "codes": (lambda: started("residual", floats=NF4), "floats: w: found codes, expected the floats"),
  "integers": (lambda: started("residual", floats={"w": jnp.ones((128, 96), int)}), "floats: w: found .* int32"),
  "other weights": (lambda: started("residual", floats={"w": WEIGHT[::-1]}), r"w: found other weights: .* 1\.4"),
  "not finite": (lambda: started("residual", floats={"w": WEIGHT * jnp.nan}), "w: found NaN"),
  "no use of floats": (lambda: started("kaiming"), "floats is given, and no leaf starts from it.*leave floats out"),
  "no use of a product": (lambda: started("orthogonal"), "floats is given, and no leaf"),
  "no factors": (lambda: started("residual", variant="vera"), "w: init 'residual' gives both factors"),
  "nothing lost": (
    lambda: started("residual", floats={"w": NF4["w"].dequantize()}),
    r"w: init 'residual': its codes stand for its floats exactly.*'kaiming'",
  ),
  "codes that are not written": (
    lambda: started("loftq", {"w": Foreign()}),
    "no function writes .* Foreign.*'residual'",
  ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_start_so(case):
  make, match = REFUSED[case]
  with pytest.raises(ValueError, match=match):
    make()


def test_the_remedies():
  fields = {"overrides": {"w": {"init": "kaiming"}}, "targets": "w|v"}
  both = {"w": WEIGHT, "v": WEIGHT + 1}
  mixed = started("residual", {"w": WEIGHT, "v": jaxlora.quantize(both, "nf4", targets="v")["v"]}, both, **fields)
  assert not mixed["w"].b.any()
  assert mixed["v"].b.any()
  assert loss(started("residual", {"w": Foreign()})) < 0.07
  with pytest.raises(ValueError, match=r"init: found 'loftq_niter_0', expected one of .*'residual', 'loftq'"):
    config("loftq_niter_0")


# ----------------------------------------------------------------------------------------------------------------------
# Merged, and written again.


def trained(base, **fields):
  return helpers.trained(jaxlora.adapt(base, config("kaiming", **fields), KEY))


@pytest.mark.parametrize(("format", "double"), [("nf4", True), ("int8", False), ("q4_0", True)])
def test_merged_into_codes(format, double):
  """Codes and scales are those of the merged floats, in the base's blocks, which are none of the default's."""
  base = jaxlora.quantize(PARAMS, format, targets="w", block_size=32, double=double)
  tree = trained(base)
  merged, report = jaxlora.quant.merge_and_requantize(tree)
  whole = jaxlora.merge(tree)
  again = jaxlora.quantize(whole, format, targets="w", block_size=32, double=double)
  jax.tree.map(np.testing.assert_array_equal, merged, again)
  (leaf,) = report.leaves
  off = jnp.linalg.norm(merged["w"].dequantize() - whole["w"])
  assert leaf.error == pytest.approx(float(off / jnp.linalg.norm(whole["w"])), rel=1e-4)
  assert leaf.update_error == pytest.approx(float(off / jnp.linalg.norm(tree["w"].delta())), rel=1e-4)
  assert f"{leaf.update_error:.4f}" in str(report)
  assert "of the update" in str(report)


def test_merged_beside_floats_and_weights_trained_whole():
  params = {"w": WEIGHT, "v": WEIGHT * 2, "head": WEIGHT + 1, "frozen": WEIGHT}
  base = jaxlora.quantize(params, "int8", targets="w|head|frozen")
  tree = trained(base, targets="w|v", train="head")
  merged, report = jaxlora.quant.merge_and_requantize(tree)
  want = jaxlora.merge(tree)
  assert merged["frozen"].codes is base["frozen"].codes
  np.testing.assert_array_equal(merged["v"], want["v"])
  assert [leaf.path for leaf in report.leaves] == ["head", "w"]
  for name in ("w", "head"):
    assert isinstance(merged[name], jaxlora.QuantizedArray)
    helpers.assert_close(merged[name].dequantize(), want[name], 0.02)
  assert want["w"].dtype == jnp.float32
  assert jaxlora.merge(tree, dtype=jnp.bfloat16)["w"].dtype == jnp.bfloat16


def test_an_update_of_zero_leaves_the_codes():
  tree = jaxlora.adapt(NF4, config("kaiming"), KEY)
  merged, report = jaxlora.quant.merge_and_requantize(tree)
  assert merged["w"].codes is NF4["w"].codes
  assert (report.leaves[0].error, report.leaves[0].update_error) == (0, 0)


def test_what_cannot_be_merged_into_codes():
  with pytest.raises(ValueError, match=r"no adapted weight whose base is codes.*jaxlora.merge.*jaxlora.quantize"):
    jaxlora.quant.merge_and_requantize(trained(PARAMS))
  foreign = trained({"w": Foreign()})
  with pytest.raises(ValueError, match=r"w: no function writes floats as a Foreign. Merge it in floats: jaxlora.merge"):
    jaxlora.quant.merge_and_requantize(foreign)
  assert jaxlora.merge(foreign)["w"].shape == (128, 96)
  tree = trained(NF4)
  broken = {"w": dataclasses.replace(tree["w"], b=tree["w"].b * jnp.inf)}
  with pytest.raises(ValueError, match=r"merge: found NaN or infinite values in w \(b\)"):
    jaxlora.quant.merge_and_requantize(broken)
  frozen, trainable = jaxlora.split(tree)
  with pytest.raises(ValueError, match=r"merge_and_requantize: w: base missing.*jaxlora.join"):
    jaxlora.quant.merge_and_requantize(trainable)
  assert jaxlora.quant.merge_and_requantize(jaxlora.join(frozen, trainable))[1].leaves


def test_merged_in_a_trace():
  tree = trained(NF4)
  merged = jax.jit(lambda tree: jaxlora.quant.merge_and_requantize(tree)[0])(tree)
  want = jaxlora.quant.merge_and_requantize(tree)[0]
  assert jax.tree.structure(merged) == jax.tree.structure(want)
  assert (np.asarray(merged["w"].codes) != np.asarray(want["w"].codes)).mean() < 1e-3
