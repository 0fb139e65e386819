"""Rows of tokens that train, and tables with more of them: against what the merged tree computes."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxlora
import jaxlora.checkpoint
from tests import helpers

KEY = jax.random.key(0)
VOCABULARY, WIDTH = 19, 6
IDS = (3, 18, 7)
TOKENS = jnp.asarray([[3, 1, 18, 18], [7, 0, 7, 2]])


def array(seed, *shape):
  return helpers.array(seed, shape, jnp.float32)


PARAMS = {
  "embed": {"embedding": array(1, VOCABULARY, WIDTH)},
  "up": {"kernel": array(2, WIDTH, WIDTH)},
  "lm_head": {"kernel": array(3, WIDTH, VOCABULARY)},
}


def tied(params, tokens):
  x = jnp.tanh(jnp.take(params["embed"]["embedding"], tokens, axis=0) @ params["up"]["kernel"])
  return x @ params["embed"]["embedding"].T


def untied(params, tokens):
  x = jnp.tanh(jnp.take(params["embed"]["embedding"], tokens, axis=0) @ params["up"]["kernel"])
  return x @ params["lm_head"]["kernel"]


def config(**fields):
  return jaxlora.LoraConfig(**{"rank": 2, "tokens": {".*embedding|lm_head/kernel": IDS}} | fields)


def moved(params=PARAMS, **fields):
  frozen, factors = jaxlora.split(jaxlora.adapt(params, config(**fields), KEY))
  return jaxlora.join(frozen, jax.tree.map(lambda x: x + array(9, *x.shape), factors))


@pytest.mark.parametrize("fn", [tied, pytest.param(untied, marks=pytest.mark.nightly)])
def test_a_look_up_and_a_head_see_the_rows(fn):
  """Values and gradients are those of the merged tree, and nothing is formed."""
  frozen, factors = jaxlora.split(moved())
  loss = lambda f: lambda t: jnp.sum(jnp.sin(f(jaxlora.join(frozen, t))))
  wrapped = lambda tree: jaxlora.wrap(fn, on_materialize="error")(tree, TOKENS)
  merged = lambda tree: fn(jaxlora.merge(tree), TOKENS)
  got, want = (jax.jit(jax.value_and_grad(loss(f)))(factors) for f in (wrapped, merged))
  helpers.assert_close(got, want, 1e-5)


@pytest.mark.nightly
def test_at_first_it_is_the_base_and_only_those_rows_move():
  tree = jaxlora.adapt(PARAMS, config(), KEY)
  np.testing.assert_array_equal(jax.jit(jaxlora.wrap(tied))(tree, TOKENS), jax.jit(tied)(PARAMS, TOKENS))
  table = np.asarray(jaxlora.merge(moved())["embed"]["embedding"])
  others = [k for k in range(VOCABULARY) if k not in IDS]
  np.testing.assert_array_equal(table[others], PARAMS["embed"]["embedding"][jnp.asarray(others)])
  head = np.asarray(jaxlora.merge(moved())["lm_head"]["kernel"])
  np.testing.assert_array_equal(head[:, others], PARAMS["lm_head"]["kernel"][:, jnp.asarray(others)])
  assert (table[list(IDS)] != np.asarray(PARAMS["embed"]["embedding"])[list(IDS)]).all()


def test_state_moments_and_files_hold_those_rows_alone(tmp_path):
  tree = moved(targets=[])
  rows = jaxlora.split(tree)[1]
  assert [x.shape for x in jax.tree.leaves(rows)] == [(len(IDS), WIDTH)] * 2
  assert {x.shape for x in jax.tree.leaves(optax.adam(1e-3).init(rows))} == {(), (len(IDS), WIDTH)}
  assert jaxlora.labels(tree)["embed"]["embedding"].b == "full"
  assert jaxlora.summary(tree).trainable_parameters == 2 * len(IDS) * WIDTH
  jaxlora.checkpoint.save(tmp_path / "run", tree)
  helpers.assert_close(jaxlora.checkpoint.load(tmp_path / "run", PARAMS), tree, 0)
  tx = jaxlora.optimizer(optax.sgd(0.1))
  grads = jax.grad(lambda t: jnp.sum(jaxlora.wrap(tied)(t, TOKENS)))(tree)  # by the whole tree, as train states do
  updates, _ = tx.update(grads, tx.init(tree), tree)
  new = optax.apply_updates(tree, updates)
  np.testing.assert_array_equal(new["embed"]["embedding"].a, tree["embed"]["embedding"].a)


@pytest.mark.nightly
def test_rows_of_narrow_floats_and_of_a_tree_that_was_cast():
  narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
  tree = moved(narrow, tokens={".*embedding": [0, 17]}, dtype="float32")
  node = tree["embed"]["embedding"]
  assert (node.a.dtype, node.b.dtype) == (jnp.float32, jnp.float32)
  expected = node.base.astype(jnp.float32).at[jnp.asarray([0, 17])].add(node.b).astype(jnp.bfloat16)
  np.testing.assert_array_equal(jaxlora.merge(tree)["embed"]["embedding"], expected)
  cast = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree)
  with pytest.raises(ValueError, match=r"rows of tokens: the list of tokens \(a\) is bfloat16, which rounds"):
    jaxlora.wrap(tied)(cast, TOKENS)


@pytest.mark.nightly
@pytest.mark.parametrize("method", ["eva", "lora_ga"])
def test_factors_beside_rows_start_from_data(method):
  """The rows count as what they are, and stay."""
  tree = jaxlora.adapt(PARAMS, config(targets=".*up/kernel"), KEY)
  fn = tied if method == "eva" else lambda params, tokens: tied(params, tokens).sum()
  new = jaxlora.init_from_data(tree, fn, [TOKENS], jax.random.key(1), method=method)
  assert new["embed"]["embedding"] is tree["embed"]["embedding"]
  assert not np.allclose(new["up"]["kernel"].a, tree["up"]["kernel"].a)


@pytest.mark.nightly
def test_a_bank_serves_rows_beside_factors():
  trees = {"rows": moved(targets=[]), "other": moved(targets=[], tokens={".*embedding": [5]})}
  bank = jaxlora.stack(trees)
  got = jax.jit(jaxlora.route(tied))(PARAMS, bank, bank.ids(["rows", "other"]), TOKENS)
  want = [jaxlora.wrap(tied)(trees[name], TOKENS[k : k + 1])[0] for k, name in enumerate(trees)]
  helpers.assert_close(got, jnp.stack(want), 1e-5)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    ({".*embedding": [1, 2, 1]}, "found 1 twice, expected each token once"),
    ({".*embedding": [-1]}, r"found \[-1\], expected a list of token ids"),
    ({".*embedding": [True]}, "expected a list of token ids"),
    ({".*embedding": []}, "expected a list of token ids"),
    ({".*embedding": "all"}, "found 'all', expected a list of token ids"),
    ({"embeding": [1]}, r"LoraConfig\.tokens\['embeding'\]: 'embeding' matches none .* Nearest: embed/embedding"),
    ({"up/kernel": [1]}, "up/kernel: rows of it train, and targets picks it, too"),
    ({"bias": [1]}, r"bias: found shape \(6,\), dtype float32, expected a matrix of floats"),
  ],
  ids=str,
)
def test_tokens_that_cannot_be(tokens, message):
  with pytest.raises(ValueError, match=message):
    jaxlora.adapt({**PARAMS, "bias": jnp.zeros(6)}, config(tokens=tokens, targets=".*up/kernel"), KEY)


def test_tokens_beyond_the_table_and_the_remedy():
  with pytest.raises(ValueError, match=r"embed/embedding: found token 21, expected tokens below 19") as caught:
    jaxlora.adapt(PARAMS, config(tokens={".*embedding": [21]}), KEY)
  pattern, size = re.search(r"jaxlora\.resize\(params, '(.*)', (\d+)\)", str(caught.value)).groups()
  params = jaxlora.resize(PARAMS, pattern, int(size))
  tree = jaxlora.adapt(params, config(tokens={".*embedding": [21]}), KEY)
  assert tree["embed"]["embedding"].shape == (22, WIDTH)


def test_an_axis_that_nothing_tells_and_the_remedies():
  params = {"table": array(1, VOCABULARY, WIDTH), "up": PARAMS["up"]}
  with pytest.raises(ValueError, match=r"table: nothing tells which of its axes, .*is that of the tokens"):
    jaxlora.adapt(params, config(tokens={"table": [1]}), KEY)
  probe = lambda p: jnp.take(p["table"], TOKENS, axis=0) @ p["up"]["kernel"]
  for more in ({"axes": {"table": "io"}}, {}):
    tree = jaxlora.adapt(params, config(tokens={"table": [1]}, **more), KEY, probe=None if more else probe)
    assert tree["table"].roles == "io"
  with pytest.raises(ValueError, match=r"embed/embedding: rows of it train, and train picks it, too"):
    jaxlora.adapt(PARAMS, config(train=["embed"]), KEY)
  again = jaxlora.LoraConfig.from_dict(config().to_dict())
  assert again == config()


@pytest.mark.parametrize("adapted", [pytest.param("lora", marks=pytest.mark.nightly), "whole", "rows"])
def test_a_longer_table_has_means_of_what_it_had(adapted):
  """Of merged and of adapted trees alike."""
  fields = {
    "lora": {"targets": ["embed", "lm_head"], "axes": {".*embedding": "io"}, "tokens": None},
    "whole": {"train": ["embed", "lm_head"], "tokens": None},
    "rows": {},
  }[adapted]
  tree = moved(**fields)
  both = r"embed/embedding|lm_head/kernel"
  longer = jaxlora.resize(tree, both, VOCABULARY + 2)
  want = jaxlora.resize(jaxlora.strip(tree), both, VOCABULARY + 2)
  helpers.assert_close(jaxlora.strip(longer), want, 0)
  table, old = (np.asarray(jaxlora.merge(t)["embed"]["embedding"]) for t in (longer, tree))
  mean = np.asarray(PARAMS["embed"]["embedding"] if adapted == "rows" else old).mean(0)
  np.testing.assert_allclose(table[VOCABULARY:], [mean] * 2, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(table[:VOCABULARY], old, rtol=1e-6)
  assert jaxlora.strip(longer)["lm_head"]["kernel"].shape == (WIDTH, VOCABULARY + 2)


def test_what_cannot_grow_and_the_remedy():
  shapes = jax.eval_shape(lambda: PARAMS)
  assert jaxlora.resize(shapes, ".*embedding", 30)["embed"]["embedding"].shape == (30, WIDTH)
  with pytest.raises(ValueError, match=r"embed/embedding: has 19 tokens, expected at most the new size, 4"):
    jaxlora.resize(PARAMS, ".*embedding", 4)
  with pytest.raises(ValueError, match="resize: pattern: 'tables' matches none of the 3 leaves"):
    jaxlora.resize(PARAMS, "tables", 30)
  dora = moved(targets=["embed"], tokens=None, variant="dora")
  with pytest.raises(ValueError, match=r"variant 'dora' has parts that follow from the whole table.*Resize the param"):
    jaxlora.resize(dora, ".*embedding", 30)
  grown = jaxlora.adapt(
    jaxlora.resize(PARAMS, ".*embedding", 30), config(targets=["embed"], tokens=None, variant="dora"), KEY
  )
  assert grown["embed"]["embedding"].shape == (30, WIDTH)
