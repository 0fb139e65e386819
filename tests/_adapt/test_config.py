"""Bad input gets an error that names the field or leaf, what was found, what was expected, and what to do."""

import copy
import dataclasses
import json
import math
import pickle

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
from tests.helpers import adapted_paths

KEY = jax.random.key(0)
PARAMS = {
  "encoder": {"query": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones((4,))}, "value": {"kernel": jnp.ones((6, 4))}},
  "conv": {"kernel": jnp.ones((3, 6, 4))},
  "steps": jnp.zeros((3, 4), jnp.int32),
}
QUERY = r"encoder/query/kernel"


@pytest.mark.parametrize("rank", [0, -1, 2.5, "8", True, None])
def test_rank_must_be_a_whole_number_of_at_least_one(rank):
  with pytest.raises(ValueError, match=rf"LoraConfig\.rank: found {rank!r}, expected a whole number"):
    jaxlora.LoraConfig(rank=rank)


def test_rank_takes_numpy_integers():
  assert jaxlora.LoraConfig(rank=np.int64(4)).rank == 4


@pytest.mark.parametrize("alpha", [math.nan, math.inf, 0, -2, "16", True])
def test_alpha_must_be_finite_and_positive(alpha):
  with pytest.raises(ValueError, match=r"LoraConfig\.alpha: found .*, expected a finite number above 0"):
    jaxlora.LoraConfig(alpha=alpha)


@pytest.mark.parametrize("dropout", [-0.1, 1, 1.5, math.nan, "0.1"])
def test_dropout_must_be_a_probability_below_one(dropout):
  with pytest.raises(ValueError, match=r"LoraConfig\.dropout: found .*, expected a probability in \[0, 1\)"):
    jaxlora.LoraConfig(dropout=dropout)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"targets": []}, r"LoraConfig\.targets: found an empty list and no train=.*say train= to train leaves whole"),
    ({"targets": "("}, r"LoraConfig\.targets: '\(' is not a regular expression"),
    ({"exclude": "["}, r"LoraConfig\.exclude: '\[' is not a regular expression"),
    ({"train": "*"}, r"LoraConfig\.train: '\*' is not a regular expression"),
    ({"overrides": {"(": {"rank": 2}}}, r"LoraConfig\.overrides: '\(' is not a regular expression"),
    ({"overrides": {".*": {"ranks": 2}}}, r"found 'ranks', expected one of 'rank', 'alpha'"),
    ({"overrides": {".*": {"rank": 0}}}, r"LoraConfig\.overrides\['\.\*'\]\['rank'\]: found 0"),
    ({"axes": {".*": "ix"}}, r"LoraConfig\.axes\['\.\*'\]: found 'ix', expected one letter per axis"),
    ({"axes": {".*": "ii"}}, r"'ii' needs at least one 'i' and one 'o'"),
    ({"scaling": "rs"}, r"LoraConfig\.scaling: found 'rs', expected one of 'standard', 'rslora'"),
    ({"init": "zeros"}, r"LoraConfig\.init: found 'zeros', expected one of 'kaiming'"),
    ({"variant": "doora"}, r"LoraConfig\.variant: found 'doora', expected one of 'lora', 'lora_fa'"),
    ({"dtype": "int8"}, r"LoraConfig\.dtype: found 'int8', expected a real floating dtype"),
    ({"dtype": "float99"}, r"LoraConfig\.dtype: found 'float99', expected a real floating dtype"),
  ],
)
def test_other_fields(fields, message):
  with pytest.raises(ValueError, match=message):
    jaxlora.LoraConfig(**fields)


@pytest.mark.parametrize("fields", [{"targets": 3}, {"train": []}, {"train": [1]}, {"axes": "io"}, {"overrides": [1]}])
def test_fields_of_the_wrong_kind(fields):
  with pytest.raises(TypeError, match=rf"LoraConfig\.{next(iter(fields))}: found"):
    jaxlora.LoraConfig(**fields)


def test_json_round_trip():
  config = jaxlora.LoraConfig(
    rank=4,
    alpha=8,
    targets=["query", "attn/out"],
    exclude=r".*/bias",
    overrides={r".*/out/kernel": {"rank": 2, "init": "gaussian"}},
    axes={".*": "ioo"},
    train=r"head/.*",
    dtype=jnp.bfloat16,
    dropout=0.1,
    scaling="rslora",
  )
  assert jaxlora.LoraConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.float16, jnp.float8_e4m3fn, np.dtype("float32"), "bfloat16"])
def test_every_value_is_json_ready(dtype):
  config = jaxlora.LoraConfig(
    rank=np.int32(3),
    alpha=np.float32(2),
    dropout=np.float64(0.1),
    targets=("query", "attn/out"),
    train=("head",),
    dtype=dtype,
    overrides={".*": {"dtype": dtype, "alpha": np.float32(2), "rank": np.int64(2)}, "q": {}},
    axes={},
  )
  back = jaxlora.LoraConfig.from_dict(json.loads(json.dumps(config.to_dict())))
  assert back == config
  assert hash(back) == hash(config)
  assert config.overrides == {".*": {"rank": 2, "alpha": 2.0, "dtype": jnp.dtype(dtype)}, "q": {}}
  assert type(config.overrides[".*"]["rank"]) is int


def test_a_config_is_a_value():
  names, overrides, axes = ["query"], {".*": {"rank": 1}}, {".*": "io"}
  config = jaxlora.LoraConfig(targets=names, overrides=overrides, axes=axes)
  same = jaxlora.LoraConfig(targets=tuple(names), overrides=overrides, axes=axes)
  for other in (same, copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
    assert (other, hash(other)) == (config, hash(config))
  names.append("key")
  overrides["("] = {"rank": -1}
  overrides[".*"]["rank"] = 7
  axes[".*"] = "?"
  assert config == same
  assert (config.targets, config.overrides, config.axes) == (("query",), {".*": {"rank": 1}}, {".*": "io"})
  with pytest.raises(TypeError):
    config.overrides["x"] = {}
  with pytest.raises(TypeError):
    config.overrides[".*"]["rank"] = 2
  # The first pattern that matches counts, so the order of patterns is part of the value.
  two = [jaxlora.LoraConfig(overrides=dict(items)) for k in (1, -1) for items in [[("a", {}), ("b", {})][::k]]]
  assert two[0] != two[1]
  assert hash(jaxlora.LoraConfig(targets=np.isscalar)) == hash(jaxlora.LoraConfig(targets=np.isscalar))


@pytest.mark.parametrize("fields", [None, [1], "rank"])
def test_from_dict_takes_a_mapping(fields):
  with pytest.raises(TypeError, match=r"LoraConfig\.from_dict: found .*, expected a mapping of fields, as to_dict"):
    jaxlora.LoraConfig.from_dict(fields)


def test_a_callable_does_not_go_into_json():
  with pytest.raises(TypeError, match=r"LoraConfig\.targets is a callable"):
    jaxlora.LoraConfig(targets=lambda path, leaf: True).to_dict()


def test_from_dict_names_an_unknown_field():
  with pytest.raises(ValueError, match=r"LoraConfig\.from_dict: found 'r', expected one of 'rank'"):
    jaxlora.LoraConfig.from_dict({"r": 8})


# ----------------------------------------------------------------------------------------------------------------------
# adapt


def adapt(params=PARAMS, key=KEY, probe=None, **fields):
  return jaxlora.adapt(params, jaxlora.LoraConfig(**{"rank": 2, "targets": QUERY} | fields), key, probe=probe)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"targets": "query/kernel"}, r"'query/kernel' matches none of the 5 leaves.*Nearest: encoder/query/kernel"),
    ({"targets": ["query", "valeu"]}, r"LoraConfig\.targets: 'valeu' matches none.*Nearest: encoder/value/kernel"),
    (
      {"targets": lambda path, leaf: False},
      r"LoraConfig\.targets: the callable .* none of the 5 leaves; expected True for at least one \(path, leaf\)",
    ),
    ({"exclude": "nothing"}, r"LoraConfig\.exclude: 'nothing' matches none"),
    ({"train": ["scale"]}, r"LoraConfig\.train: 'scale' matches none"),
    ({"exclude": QUERY}, r"leaves nothing to adapt after exclude"),
    ({"train": QUERY}, r"to adapt after exclude=None and train='encoder/query/kernel'.*targets=\[\] adapts none"),
    (
      {"overrides": {".*/value/kernel": {"rank": 1}}},
      r"LoraConfig\.overrides\['.*'\]: .* matches none of the 1 adapted leaves.*It matches encoder/value/kernel, which"
      r" targets do not pick: widen targets, or drop",
    ),
    (
      {"axes": {"conv/kernel": "iio"}},
      r"LoraConfig\.axes\['conv/kernel'\]: .* matches none of the 1 adapted leaves.*It matches conv/kernel",
    ),
    ({"axes": {"query": "io"}}, r"none of the 1 adapted leaves \(a regex must.*\)\. Nearest: encoder/query/kernel"),
    (
      {"params": {"norm": {"scale": jnp.ones(3)}, "w": jnp.ones((6, 4))}, "targets": ["w", "norm"]},
      r"LoraConfig\.targets: 'norm' names no kernel, only norm/scale.*LoraConfig\.train",
    ),
    (
      {"params": {"norm": {"kernel": jnp.ones((6, 4), jnp.int8)}, "w": jnp.ones((6, 4))}, "targets": ["norm"]},
      r"LoraConfig\.targets: 'norm' names no kernel of floats, only norm/kernel \(int8\)\. .*\(jaxlora\.quantize\)",
    ),
    ({"targets": QUERY, "exclude": ".*"}, r"Widen targets, or narrow exclude or train"),
    ({"rank": 5}, r"encoder/query/kernel: rank 5 is larger than the smaller side.*fan-in 6 and fan-out 4.*at most 4"),
    ({"targets": "steps"}, r"steps: dtype int32 cannot be trained; expected a floating dtype"),
    ({"train": "steps"}, r"steps: dtype int32 cannot be trained"),
    ({"targets": ".*/bias"}, r"encoder/query/bias: shape \(4,\) has fewer than two axes"),
    ({"targets": "conv/kernel"}, r"conv/kernel: shape \(3, 6, 4\) has 3 axes, and nothing tells.*axes=.*probe="),
    (
      {"params": {"layers": {name: {"kernel": jnp.ones((2, 4, 4))} for name in "cab"}}, "targets": "all-linear"},
      r"layers/a/kernel: shape \(2, 4, 4\) .* nor those of layers/b/kernel \(2, 4, 4\), layers/c/kernel \(2, 4, 4\)\."
      r" Say them, with an entry for each",
    ),
    (
      {"params": {"a": {"kernel": jnp.ones((2, 4), jnp.int8)}}, "targets": "all-linear"},
      r"the preset 'all-linear' finds nothing among a/kernel\. a/kernel \(int8\): integers are no kernels\. .*quantize",
    ),
    (
      {"params": {"a": jnp.ones((2, 4))}, "targets": "attention", "probe": lambda p: p["a"].T @ p["a"]},
      r"the preset 'attention' finds nothing among a\. The probe multiplies by none of them\. Name the leaves",
    ),
    ({"targets": "conv/kernel", "axes": {"conv/.*": "io"}}, r"'io' has 2 letters for conv/kernel, whose shape"),
  ],
)
def test_adapt_says_which_leaf_and_what_to_do(fields, message):
  before = jax.tree.map(np.array, PARAMS)
  with pytest.raises(ValueError, match=message) as caught:
    adapt(**fields)
  assert not (callable(fields.get("targets")) and "regex" in str(caught.value))
  jax.tree.map(np.testing.assert_array_equal, PARAMS, before)


class Foreign:
  """Like an array, and nothing that JAX can trace."""

  shape, ndim, dtype = (6, 4), 2, np.dtype("float32")

  def __jax_array__(self):
    return jnp.ones(self.shape)


@pytest.mark.parametrize("probe", [None, lambda p: jnp.ones((2, 6)) @ jnp.asarray(p["a"]["kernel"])])
def test_arrays_of_other_libraries_are_named_with_or_without_a_probe(probe):
  params = {"a": {"kernel": Foreign()}}
  for targets in ("all-linear", "a/kernel"):
    with pytest.raises(
      ValueError, match=r"a/kernel: found a Foreign, expected an array .*\(jax\.numpy\.asarray\)"
    ) as said:
      adapt(params, probe=probe, targets=targets)
    assert "probe" not in str(said.value)
  with pytest.raises(ValueError, match=r"JAX cannot trace a/scale \(a Foreign\)"):
    adapt({"a": {"scale": Foreign()}}, probe=None, targets="all-linear")
  adapt({"a": {"kernel": jnp.asarray(Foreign())}}, probe=probe, targets="a/kernel")  # the remedy


def test_codes_with_their_scales_are_a_kernel():
  codes = jaxlora.quantize({"norm": {"kernel": jnp.ones((6, 4))}, "w": jnp.ones((6, 4))}, "int8")
  assert adapt(codes, targets=["norm"])["norm"]["kernel"].a.shape == (2, 6)


def test_no_targets_train_whole_leaves_alone():
  tree = adapt(targets=[], train=".*/(query|value)/kernel")
  assert jaxlora.LoraConfig.from_dict(jaxlora.LoraConfig(targets=[], train=".*").to_dict()).targets == ()
  trainable = jaxlora.split(tree)[1]
  assert [leaf.shape for leaf in jax.tree.leaves(trainable)] == [PARAMS["encoder"]["query"]["kernel"].shape] * 2
  jax.tree.map(np.testing.assert_array_equal, jaxlora.merge(tree), PARAMS)
  assert "whole" in str(jaxlora.summary(tree))


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.float4_e2m1fn, jnp.float8_e8m0fnu])
def test_factors_are_real_and_wide_enough(dtype):
  name = jnp.dtype(dtype).name
  with pytest.raises(
    ValueError, match=r"LoraConfig\.dtype: found .*, expected a real floating dtype of at least 8 bits"
  ):
    jaxlora.LoraConfig(dtype=dtype)
  params = {"w": jnp.ones((6, 4)).astype(dtype)}
  with pytest.raises(
    ValueError, match=rf"^w: dtype {name} (cannot be adapted|holds no factors); expected a real floating"
  ):
    adapt(params, targets="w")
  if dtype != jnp.complex64:
    weight = adapt(params, targets="w", overrides={"w": {"dtype": "bfloat16"}})["w"]
    assert (weight.base.dtype, weight.a.dtype) == (dtype, jnp.bfloat16)


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2, jnp.bfloat16, jnp.float16])
def test_narrow_floats_hold_factors(dtype):
  assert adapt({"w": jnp.ones((6, 4)).astype(dtype)}, targets="w")["w"].a.dtype == dtype
  assert jaxlora.LoraConfig(dtype=dtype).dtype == dtype


def test_a_probe_takes_the_parameters_alone():
  params = {"params": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
  model = nn.Dense(4)
  for probe, message in [
    (lambda p, x: x, "adapt: probe cannot be called with the parameters alone: missing a required argument: 'x'"),
    (lambda: 1, "adapt: probe cannot be called with the parameters alone: too many positional arguments"),
    (model.apply, "adapt: probe raised TypeError on the parameters: .*missing 1 required positional argument"),
  ]:
    with pytest.raises(
      TypeError, match=message + r".*; expected a function of the parameters alone, such as lambda p:"
    ):
      adapt(params, targets=["kernel"], probe=probe)
  with pytest.raises(jax.errors.TracerBoolConversionError):  # JAX says what is wrong with the program
    adapt(params, targets=["kernel"], probe=lambda p: 1 if p["params"]["kernel"].sum() > 0 else 0)


@pytest.mark.parametrize("targets", ["w", ["w"], "all-linear", lambda path, leaf: path == "w"])
@pytest.mark.parametrize("with_probe", [True, False])
def test_leaves_of_any_kind_reach_the_probe_as_they_are(targets, with_probe):
  params = {"name": "x", "times": 2, "key": KEY, "v": jnp.ones((5, 3)), "w": jnp.ones((6, 4))}

  def probe(p):
    assert (p["name"], p["times"]) == ("x", 2)
    return jnp.tanh(p["w"] @ jax.random.uniform(p["key"], (4, 5))) @ p["v"] * p["times"]

  tree = adapt(params, targets=targets, probe=probe if with_probe else None)
  assert tree["w"].roles == ("oi" if with_probe else "io")
  assert (tree["name"], tree["times"]) == ("x", 2)


def test_a_leaf_the_probe_does_not_multiply_by_is_named():
  params = {"stacked_bias": jnp.ones((3, 4)), "w": jnp.ones((5, 4))}
  probe = lambda p: jax.lax.scan(lambda c, b: (c + b, None), jnp.ones((2, 5)) @ p["w"], p["stacked_bias"][:, None] * 1)
  with pytest.raises(ValueError, match=r"stacked_bias: shape \(3, 4\): no product tells which axes are contracted"):
    adapt(params, targets="stacked_bias", probe=probe)


def test_what_a_loop_carries_into_its_next_step_is_seen():
  """`first` reaches `second` one step later: it is no classifier, though it is the last to make a result."""
  params = {"before": jnp.ones((7, 5)), "first": jnp.ones((5, 6)), "second": jnp.ones((6, 4))}

  def probe(p):
    step = lambda carry, x: ((x @ p["first"], carry[1] + carry[0] @ p["second"]), None)
    return jax.lax.scan(step, (jnp.zeros((2, 6)), jnp.zeros((2, 4))), jnp.ones((3, 2, 7)) @ p["before"])[0]

  assert adapted_paths(adapt(params, targets="all-linear", probe=probe)) == ["before", "first"]


def test_leaves_that_are_no_arrays_stay_as_they_are():
  params = {"w": jnp.ones((6, 4)), "temperature": 0.5}
  assert adapt(params, targets="w")["temperature"] == 0.5
  assert jaxlora.summary(adapt(params, targets="w")).total_parameters == 25
  with pytest.raises(ValueError, match="temperature: dtype float cannot be trained"):
    adapt(params, targets="w", train="temperature")


def test_adapted_and_empty_trees():
  with pytest.raises(ValueError, match=r"adapt: encoder/query/kernel is adapted already"):
    adapt(adapt())
  with pytest.raises(ValueError, match="the tree has no leaves"):
    adapt({})
  with pytest.raises(TypeError, match=r"adapt: config is .*, expected a jaxlora\.LoraConfig"):
    jaxlora.adapt(PARAMS, {"rank": 8}, KEY)
  with pytest.raises(TypeError, match=r"adapt: probe is 3, expected a function of the parameters alone"):
    adapt(probe=3)


@pytest.mark.parametrize("key", [0, None, jnp.zeros((2,)), jnp.zeros((3,), jnp.uint32), jax.random.split(KEY)])
def test_something_that_is_no_key(key):
  with pytest.raises(TypeError, match=r"adapt: key: found .*, expected one random key"):
    adapt(key=key)
  with pytest.raises(TypeError, match=r"wrap: dropout_key: found"):
    jaxlora.wrap(lambda p: p, dropout_key=key if key is not None else 0)


def test_raw_keys_of_another_generator():
  raw = jax.random.PRNGKey(3, impl="rbg")
  assert raw.shape == (4,)
  typed = adapt(key=jax.random.key(3, impl="rbg"))
  np.testing.assert_array_equal(adapt(key=raw)["encoder"]["query"]["kernel"].a, typed["encoder"]["query"]["kernel"].a)


def test_typed_and_raw_keys_give_the_same_factors():
  typed, raw = adapt(key=jax.random.key(3)), adapt(key=jax.random.PRNGKey(3))
  np.testing.assert_array_equal(typed["encoder"]["query"]["kernel"].a, raw["encoder"]["query"]["kernel"].a)


# ----------------------------------------------------------------------------------------------------------------------
# Trees put together wrongly


def test_join_of_halves_of_different_trees():
  frozen, trainable = jaxlora.split(adapt())
  with pytest.raises(ValueError, match=r"different trees.*Only in the frozen half: conv/kernel"):
    jaxlora.join(frozen, {k: v for k, v in trainable.items() if k != "conv"})
  with pytest.raises(
    ValueError, match=r"encoder/query/kernel: LoraWeight in the frozen half, nothing in the trainable"
  ):
    jaxlora.join(frozen, jaxlora.split(adapt(targets=r"encoder/value/kernel"))[1])
  with pytest.raises(ValueError, match=r"encoder/query/kernel: expected \(frozen, trainable\)"):
    jaxlora.join(trainable, frozen)
  other = {**PARAMS, "encoder": {**PARAMS["encoder"], "query": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones((4,))}}}
  with pytest.raises(ValueError, match=r"factor a has shape \(2, 8\), expected \(2, 6\) for a base of shape \(6, 4\)"):
    jaxlora.join(frozen, jaxlora.split(adapt(other))[1])


def test_join_says_how_halves_differ_and_what_to_do():
  sized = lambda shape: adapt({"w": jnp.ones((4, 4)), "b": jnp.ones(shape)}, targets="w", train="b")
  frozen, trainable = jaxlora.split(sized((4,)))
  turned = jaxlora.split(adapt({"w": jnp.ones((4, 4)), "b": jnp.ones(4)}, targets="w", train="b", axes={"w": "oi"}))[1]
  lacking = lambda part: {**trainable, "w": dataclasses.replace(trainable["w"], **{part: None})}
  remedy = r".*Join what one jaxlora\.split returned"
  for wrong, message in [
    (turned, "join: w: roles 'io' in the frozen half, 'oi' in the trainable half"),
    (
      jaxlora.split(sized((5,)))[1],
      r"join: b: value has shape \(5,\), expected the base's, \(4,\)\..*join it with the base",
    ),
    (flax.core.freeze(trainable), r"root: dict in the frozen half, FrozenDict in the trainable half"),
    (lacking("a"), "join: w: expected .* a missing in the trainable half"),
    (lacking("b"), "join: w: expected .* b missing in the trainable half"),
    ({**trainable, "b": jaxlora.FullWeight(None, None)}, "join: b: expected .* value missing in the trainable half"),
    ({**trainable, "b": None}, "join: b: FullWeight in the frozen half, nothing in the trainable"),
    ({"w": trainable["w"]}, "Only in the frozen half: b; only in the trainable half: nothing"),
  ]:
    with pytest.raises(ValueError, match=message + ("" if "join it" in message else remedy)):
      jaxlora.join(frozen, wrong)
  with pytest.raises(ValueError, match=r"join: w: expected .* base missing in the frozen half"):
    jaxlora.join({**frozen, "w": dataclasses.replace(frozen["w"], base=None)}, trainable)


def test_join_names_the_first_other_container():
  make = lambda layers: adapt({"b": {"layers": layers}, "c": {}}, targets="b/.*")
  frozen = jaxlora.split(make([jnp.ones((6, 4)), {"deep": jnp.ones((6, 4))}]))[0]
  trainable = jaxlora.split(make((jnp.ones((6, 4)), {"deep": jnp.ones((6, 4))})))[1]
  with pytest.raises(ValueError, match="b/layers: list in the frozen half, tuple in the trainable half") as caught:
    jaxlora.join(frozen, trainable)
  assert "PyTreeDef" not in str(caught.value)
  with pytest.raises(ValueError, match="c: dict in the frozen half, list in the trainable half"):
    jaxlora.join(frozen, jaxlora.split(make([jnp.ones((6, 4)), {"deep": jnp.ones((6, 4))}]))[1] | {"c": []})
  boxed = lambda *names: adapt({"w": nn.Partitioned(jnp.ones((6, 4)), names)}, targets="w")
  with pytest.raises(ValueError, match="w: the Partitioned in the frozen half has other static fields"):
    jaxlora.join(jaxlora.split(boxed("a", "b"))[0], jaxlora.split(boxed("b", "a"))[1])


def halves():
  return dict(zip(("frozen", "trainable"), jaxlora.split(adapt(train=".*/bias")), strict=True))


@pytest.mark.parametrize(
  ("half", "missing"), [("frozen", "encoder/query/bias: value"), ("trainable", "encoder/query/bias: base")]
)
@pytest.mark.parametrize("name", ["merge", "summary", "split", "optimizer", "strip"])
def test_a_half_is_no_tree(name, half, missing):
  call = jaxlora.optimizer(optax.sgd(1.0)).init if name == "optimizer" else getattr(jaxlora, name)
  tree = halves()[half]
  if (name, half) == ("strip", "frozen"):  # which is all that it needs
    jax.tree.map(np.testing.assert_array_equal, call(tree), PARAMS)
  elif (name, half) == ("optimizer", "trainable"):  # as for any other transformation
    assert jax.tree.structure(call(tree)) == jax.tree.structure(optax.sgd(1.0).init(tree))
  else:
    with pytest.raises(ValueError, match=rf"{name}: {missing} missing: this is one half.*jaxlora\.join"):
      call(tree)


def test_parts_must_fit_their_base():
  weight = adapt({"w": jnp.ones((6, 4))}, targets="w")["w"]
  fn = jaxlora.wrap(lambda p: p["w"] * 2, on_materialize="ignore")
  for wrong, message in [
    (dataclasses.replace(weight, a=weight.a[:, 1:]), r"w: factor a has shape \(2, 5\), expected \(2, 6\)"),
    (dataclasses.replace(weight, b=weight.b[:, 1:]), r"w: factor b has shape \(2, 3\), expected \(2, 4\)"),
    (jaxlora.FullWeight(jnp.ones(4), jnp.ones(3)), r"w: value has shape \(3,\), expected the base's, \(4,\)"),
  ]:
    for call in (fn, jaxlora.merge):
      with pytest.raises(ValueError, match=message + r".*join it with the base that it was made for, or adapt"):
        call({"w": wrong})
  for lacking in (jaxlora.FullWeight(jnp.ones(4), None), jaxlora.FullWeight(None, jnp.ones(4))):
    with pytest.raises(ValueError, match=r"w: (value|base) missing: this is one half"):
      fn({"w": lacking})


def test_wrapped_calls_check_that_the_factors_fit():
  tree = adapt({"w": jnp.ones((6, 4))}, targets="w")
  broken = {"w": jaxlora.LoraWeight(tree["w"].base, tree["w"].a[:1], tree["w"].b, rank=2)}
  fn = jaxlora.wrap(lambda p, x: x @ p["w"])
  with pytest.raises(ValueError, match=r"w: factor a has shape \(1, 6\), expected \(2, 6\).*rank 2"):
    fn(broken, jnp.ones((3, 6)))
  with pytest.raises(ValueError, match=r"w: base missing: this is one half.*jaxlora\.join"):
    fn(jaxlora.split(tree)[1], jnp.ones((3, 6)))
  with pytest.raises(ValueError, match=r"roles 'io' name 2 axes, the base has shape \(1, 6, 4\)"):
    fn(jax.tree.map(lambda leaf: leaf[None], tree), jnp.ones((3, 6)))


def test_wrap_names_its_choices():
  with pytest.raises(ValueError, match=r"on_materialize is 'raise', expected one of 'ignore', 'warn', 'error'"):
    jaxlora.wrap(lambda p: p, on_materialize="raise")


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize(("leaf", "part"), [("query/kernel", "a"), ("query/kernel", "b"), ("query/bias", "value")])
def test_merge_refuses_factors_that_diverged(leaf, part, bad):
  tree = adapt(train=".*/bias")
  _, name = leaf.split("/")
  query = tree["encoder"]["query"]
  query[name] = dataclasses.replace(query[name], **{part: getattr(query[name], part).at[0].set(bad)})
  with pytest.raises(ValueError, match=rf"merge: found NaN or infinite values in encoder/{leaf} \({part}\), expected"):
    jaxlora.merge(tree)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float16])
def test_merge_refuses_sums_that_overflow(dtype):
  huge = jnp.finfo(dtype).max / 2
  weight = jaxlora.LoraWeight(jnp.ones((6, 4), dtype), jnp.full((2, 6), huge), jnp.full((2, 4), huge), rank=2)
  with pytest.raises(ValueError, match=r"merge: found NaN or infinite values in w \(base \+ A B\), expected finite"):
    jaxlora.merge({"w": weight})
  assert jax.jit(jaxlora.merge)({"w": weight})["w"].shape == (6, 4)  # where values are not known
  masked = adapt({"w": jnp.full((6, 4), -jnp.inf)}, targets="w")  # the base's own infinities are its business
  assert not jnp.isfinite(jaxlora.merge(masked)["w"]).any()


def test_trees_without_an_adapter():
  for call in (jaxlora.split, jaxlora.summary, jaxlora.optimizer(optax.sgd(1.0)).init, jaxlora.grad(lambda p: 0.0)):
    with pytest.raises(ValueError, match=r"no adapted leaf.*jaxlora\.adapt"):
      call(PARAMS)
  with pytest.raises(ValueError, match="no argument holds an adapted weight"):
    jaxlora.explain(lambda p: p, PARAMS)


def test_an_adapted_leaf_is_no_array():
  with pytest.raises(TypeError, match=r"a LoraWeight was used as an array.*jaxlora\.wrap"):
    jnp.asarray(adapt()["encoder"]["query"]["kernel"])
  for node, name in ((adapt()["encoder"]["query"]["kernel"], "LoraWeight"), (jaxlora.FullWeight(1, 1), "FullWeight")):
    for call in (np.asarray, lambda node: np.array(node, np.float32), lambda node: np.ones((2, 6)) @ node):
      with pytest.raises(TypeError, match=rf"a {name} was used as an array.*jaxlora\.wrap"):
        call(node)
