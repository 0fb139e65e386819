"""A user's own variant: one record, and the library does with it whatever it does with its own."""

import dataclasses
import doctest

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint
from jaxlora._weight import register
from tests import helpers

LORA = jaxlora.variants["lora"]


def gated(**fields):
  """LoRA whose terms have a trained gate each."""
  record = jaxlora.Variant(
    trains={**LORA.trains, "gate": "magnitude"},
    shapes=lambda shape, roles, rank: {
      **LORA.shapes(shape, roles, rank),
      "gate": (*(n for n, role in zip(shape, roles, strict=True) if role == "s"), rank),
    },
    start=lambda start: {**LORA.start(start), "gate": start.full((*start.stack, start.rank), 1)},
    factors=lambda parts, roles: (parts["a"], parts["b"] * _along(parts["gate"], parts["b"])),
  )
  return record._replace(**fields)


def _along(gate, b):
  return gate.reshape(*gate.shape, *[1] * (b.ndim - gate.ndim))


@pytest.fixture
def own_variant():
  jaxlora.register_variant("gated", gated())
  yield "gated"
  jaxlora.unregister_variant("gated")


@pytest.mark.parametrize("build", ["dense_general", "vmapped_layers", "conv_2d_strided", "embed_tied"])
def test_factored_equals_merged(own_variant, build, x64):
  case = helpers.BUILDERS[build](jnp.float64)
  config = dataclasses.replace(case.config, variant=own_variant)
  tree = jaxlora.adapt(case.params, config, jax.random.key(7), probe=lambda p: case.fn(p, *case.args))
  np.testing.assert_array_equal(jaxlora.wrap(case.fn)(tree, *case.args), case.fn(case.params, *case.args))
  helpers.check(case.fn, helpers.trained(tree), case.args, 1e-12, on_materialize="error")


def test_it_is_split_summed_up_saved_and_taken_apart(own_variant, tmp_path):
  params = {"w": jax.device_put(helpers.normal(1, (6, 5), np.float32))}
  tree = helpers.adapted(params, rank=2, variant=own_variant)
  gate = tree["w"].extra["gate"]
  assert jaxlora.labels(tree)["w"].extra == {"gate": "magnitude"}
  assert jaxlora.summary(tree).trainable_parameters == 2 * (6 + 5 + 1)
  frozen, trainable = jaxlora.split(tree)
  assert jax.tree.structure(jaxlora.join(frozen, trainable)) == jax.tree.structure(tree)
  want = params["w"] + tree["w"].a.T @ (gate[:, None] * tree["w"].b)
  np.testing.assert_allclose(jaxlora.merge(tree)["w"], want, rtol=1e-5)
  np.testing.assert_allclose(jaxlora.merge(jaxlora.compress(tree, energy=1.0))["w"], want, rtol=1e-4)
  checkpoint.save(tmp_path / "a", tree)
  np.testing.assert_array_equal(checkpoint.load(tmp_path / "a", params)["w"].extra["gate"], gate)


def test_a_plain_variant_starts_from_inits_of_both_factors():
  jaxlora.register_variant("renamed", LORA._replace(start=lambda start: LORA.start(start)))
  try:
    params = {"w": jax.device_put(helpers.normal(1, (6, 5), np.float32))}
    same = [helpers.adapted(params, seed=None, variant=name, init="pissa")["w"] for name in ("lora", "renamed")]
    np.testing.assert_array_equal(same[0].a, same[1].a)
    with pytest.raises(ValueError, match=r"'gated' is not registered; expected one of 'lora', .*register_variant"):
      dataclasses.replace(same[0], variant="gated").factors()
  finally:
    jaxlora.unregister_variant("renamed")


def test_predicates_of_a_record():
  assert [name for name, variant in jaxlora.variants.items() if not variant.linear] == ["dora", "dora_exact"]
  plain = [name for name, variant in jaxlora.variants.items() if variant.plain]
  assert plain == ["lora", "lora_fa", "dora", "dora_exact"]
  assert not gated().plain
  assert gated().linear


def test_names_come_and_go():
  before = list(jaxlora.variants)
  with pytest.raises(ValueError, match=r"LoraConfig\.variant: found 'gated', expected one of 'lora', "):
    jaxlora.LoraConfig(variant="gated")
  jaxlora.register_variant("gated", gated())
  assert jaxlora.LoraConfig(variant="gated", overrides={".*": {"variant": "gated"}}).variant == "gated"
  with pytest.raises(ValueError, match="'gated' is registered already"):
    jaxlora.register_variant("gated", gated())
  jaxlora.unregister_variant("gated")
  assert list(jaxlora.variants) == before
  for name in ("gated", "lora"):
    with pytest.raises(ValueError, match=f"unregister_variant: found '{name}'"):
      jaxlora.unregister_variant(name)


@pytest.mark.parametrize(
  ("name", "record", "error", "match"),
  [
    ("", gated(), TypeError, "name is '', expected a non-empty string"),
    ("x", {"trains": {}}, TypeError, r"expected a jaxlora\.Variant"),
    ("x", gated(factors=None), TypeError, "factors is None, expected a function"),
    ("x", gated(gain=3), TypeError, "gain is 3, expected a function"),
    ("x", gated(trains={}), ValueError, "trains is {}, expected at least one of the parts a, b, gate"),
    ("x", gated(trains={"gates": "a"}), ValueError, "expected at least one of the parts a, b, gate"),
    ("x", gated(trains={"gate": "gate"}), ValueError, "each with a label out of 'a', 'b', 'magnitude'"),
    ("x", gated(shapes=lambda shape, roles, rank: {"a": (shape[0], rank)}), ValueError, "expected the parts a and b"),
    ("x", gated(start=LORA.start), ValueError, "start makes parts of the shapes .*, expected those of its own shapes"),
    ("x", gated(factors=lambda parts, roles: (parts["a"].T, parts["b"])), ValueError, r"factors gives shapes \(6, 2\)"),
    ("x", gated(gain=lambda parts, roles, a, b: parts["gate"]), ValueError, r"gain has shape \(2,\), expected \(1, 4"),
  ],
)
def test_records_that_contradict_themselves(name, record, error, match):
  with pytest.raises(error, match=match):
    jaxlora.register_variant(name, record)
  assert name not in jaxlora.variants


def test_the_example_leaves_nothing_behind():
  before = list(jaxlora.variants)
  result = doctest.testmod(register, optionflags=doctest.NORMALIZE_WHITESPACE)
  assert result.attempted >= 10
  assert not result.failed
  assert list(jaxlora.variants) == before
