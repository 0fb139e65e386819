"""The evidence on roles: what a tree tells by itself, and what becomes of a matrix of which nothing tells."""

import equinox as eqx
import jax
from jax import lax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from tests.helpers import adapted, array

KEY = jax.random.key(0)
X = array(9, (3, 8), jnp.float32)


def square(seed=1):
  return array(seed, (8, 8), jnp.float32)


def roles(tree):
  nodes, _ = jax.tree.flatten(tree, is_leaf=lambda node: isinstance(node, jaxlora.LoraWeight))
  return [(node.roles, node.sure) for node in nodes if isinstance(node, jaxlora.LoraWeight)]


def matrix(*shape):
  return array(1, shape, jnp.float32)


@pytest.mark.parametrize(
  ("params", "expected"),
  [
    ({"kernel": square()}, ("io", False)),  # by its name alone
    ({"kernel": matrix(6, 8)}, ("io", False)),
    ({"kernel": matrix(6, 8), "bias": matrix(8)}, ("io", True)),
    ({"w": square()}, ("io", False)),
    ({"weight": square()}, ("oi", False)),
    ({"other": square()}, ("io", False)),
    ({"kernel": matrix(6, 8), "bias": matrix(6)}, ("oi", True)),  # transformers' Flax GPT-2
    ({"weight": matrix(6, 8), "bias": matrix(8)}, ("io", True)),  # torch's GPT-2
    ({"weight": matrix(6, 8), "bias": matrix(6)}, ("oi", True)),
    ({"W": matrix(6, 8), "b": matrix(6)}, ("oi", True)),
    ({"wte": {"weight": matrix(11, 8)}}, ("io", True)),
    ({"embed": {"weight": matrix(6, 8), "bias": matrix(6)}}, ("oi", True)),  # a layer: tables have no bias
    ({"embed": {"weight": square(), "bias": matrix(8)}}, ("oi", False)),
    ({"embed": {"embedding": matrix(8, 8), "bias": matrix(8)}}, ("io", True)),
  ],
)
def test_what_a_matrix_tells_of_itself(params, expected):
  wide = lambda path, leaf: leaf.ndim > 1
  assert roles(jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, targets=wide), KEY)) == [expected]


@pytest.mark.parametrize(
  ("name", "module", "beside", "shape", "expected"),
  [
    ("weight", "q", "up", (6, 8), ("oi", False)),
    ("weight", "q", "up", (8, 6), ("io", False)),  # its neighbours are (in, out): more than a habit
    ("other", "q", "up", (6, 8), ("oi", False)),
    ("kernel", "q", "up", (8, 6), ("io", False)),
    ("kernel", "q", "up", (6, 8), ("io", False)),  # divided: no evidence
    ("kernel", "c_proj", "c_proj", (6, 8), ("oi", False)),
    ("weight", "c_proj", "c_proj", (8, 6), ("io", False)),
  ],
)
def test_what_the_matrices_beside_it_tell(name, module, beside, shape, expected):
  params = {"attn": {module: {name: square()}}, "mlp": {beside: {name: matrix(*shape), "bias": matrix(6)}}}
  config = jaxlora.LoraConfig(rank=2, targets=f"attn/.*/{name}")
  assert roles(jaxlora.adapt(params, config, KEY)) == [expected]


def test_the_types_of_equinoxs_modules_tell():
  keys = iter(jax.random.split(KEY, 20))
  stack = eqx.filter_vmap(lambda key: eqx.nn.Linear(8, 8, key=key))(jax.random.split(KEY, 3))
  model = {
    "linear": eqx.nn.Linear(8, 8, use_bias=False, key=next(keys)),
    "stack": stack,
    "conv": eqx.nn.Conv2d(3, 3, 3, key=next(keys)),
    "cell": eqx.nn.GRUCell(8, 8, key=next(keys)),
    "attention": eqx.nn.MultiheadAttention(2, 8, key=next(keys)),
    "table": eqx.nn.Embedding(11, 8, key=next(keys)),
    "norm": eqx.nn.LayerNorm((4, 8)),
  }
  tree = jaxlora.adapt(model, jaxlora.LoraConfig(rank=2), KEY)
  assert tree["linear"].weight.roles == "oi"
  assert tree["stack"].weight.roles == "soi"
  assert tree["conv"].weight.roles == "oiii"
  assert tree["cell"].weight_ih.roles == tree["cell"].weight_hh.roles == "oi"
  assert tree["attention"].query_proj.weight.roles == "oi"
  assert not isinstance(tree["table"].weight, jaxlora.LoraWeight)
  assert not isinstance(tree["norm"].weight, jaxlora.LoraWeight)
  assert all(sure for _, sure in roles(tree))
  table = jaxlora.adapt(model, jaxlora.LoraConfig(rank=2, targets="table/weight"), KEY)["table"].weight
  assert (table.roles, table.a.shape) == ("io", (2, 11))


@pytest.mark.parametrize("variant", ["lora_fa", "dora"])
def test_equinox_and_a_probe_agree(variant):
  """The frozen side, and where the magnitude lies."""
  model = {"q": eqx.nn.Linear(8, 8, key=KEY)}
  config = jaxlora.LoraConfig(rank=2, variant=variant)
  probe = lambda p: jax.vmap(p["q"])(X)
  plain, probed = (jaxlora.adapt(model, config, KEY, probe=probe) for probe in (None, probe))
  assert jax.tree.structure(plain) == jax.tree.structure(probed)
  jax.tree.map(np.testing.assert_array_equal, plain, probed)


USES = {
  "right": lambda w, x: x @ w.T,
  "scanned": lambda w, x: lax.scan(lambda c, _: (jnp.tanh(c @ w.T), None), x, None, 2)[0],
  "jitted": jax.jit(lambda w, x: x @ w.T),
  "branches": lambda w, x: lax.cond(x.sum() > 0, lambda: x @ w.T, lambda: x @ w.T),
  "checkpointed": jax.checkpoint(lambda w, x: x @ w.T),
  "gathered": lambda w, x: w[:, jnp.array([1, 2])],
}


@pytest.mark.parametrize("use", USES)
def test_a_product_that_contradicts_uncertain_roles_is_an_error_and_its_remedies_work(use):
  params, fn = {"other": square()}, lambda p, x: USES[use](p["other"], x)
  tree = adapted(params, targets="other")
  with pytest.raises(ValueError, match=r"other: roles 'io' of shape \(8, 8\) were taken without certain evidence"):
    jaxlora.wrap(fn)(tree, X)
  with pytest.raises(ValueError, match="contracts the axes that they call free"):
    jax.jit(jaxlora.wrap(fn))(tree, X)
  remedies = ({"axes": {"other": "oi"}}, {"axes": {"other": "io"}}, {"probe": lambda p: fn(p, X)})
  for remedy in remedies:
    tree = adapted(params, targets="other", **remedy)
    np.testing.assert_allclose(jaxlora.wrap(fn)(tree, X), fn(jaxlora.merge(tree), X), rtol=1e-5, atol=1e-5)
  assert adapted(params, targets="other", probe=lambda p: fn(p, X))["other"].roles == "oi"


@pytest.mark.parametrize(("use", "shape"), [("right", (6, 8)), ("scanned", (8, 8)), ("gathered", (8, 8))])
def test_a_kernel_that_is_used_the_other_way_round_is_an_error(use, shape):
  """Its name says (in, out), and the function may contradict a name."""
  params, fn = {"q": {"kernel": matrix(*shape)}}, lambda p, x: USES[use](p["q"]["kernel"], x)
  with pytest.raises(ValueError, match=r"q/kernel: roles 'io' of shape .* contracts the axes that they call free"):
    jaxlora.wrap(fn)(adapted(params, targets="q/kernel"), X)
  for remedy in ({"axes": {"q/kernel": "oi"}}, {"axes": {"q/kernel": "io"}}, {"probe": lambda p: fn(p, X)}):
    tree = adapted(params, targets="q/kernel", **remedy)
    np.testing.assert_allclose(jaxlora.wrap(fn)(tree, X), fn(jaxlora.merge(tree), X), rtol=1e-5, atol=1e-5)


def test_an_uncertain_convolution_is_checked_too():
  x = array(3, (2, 6, 6, 5), jnp.float32)
  fn = lambda p: lax.conv_general_dilated(
    x, p["w"][None, None], (1, 1), "SAME", dimension_numbers=("NHWC", "HWOI", "NHWC")
  )
  tree = adapted({"w": matrix(5, 5)}, targets="w")
  with pytest.raises(ValueError, match="w: roles 'io' of shape"):
    jaxlora.wrap(fn)(tree)


TIED = {
  "looked up, then decoded": lambda w, x: w[jnp.array([1, 2])] @ w.T,
  "an autoencoder": lambda w, x: jnp.tanh(x @ w) @ w.T,
  "as its roles say": lambda w, x: x @ w,
  "not at all": lambda w, x: x,
  "whole": lambda w, x: x @ jnp.tanh(w).T,
}


@pytest.mark.parametrize("use", TIED)
@pytest.mark.filterwarnings("ignore::jaxlora.MaterializeWarning")
def test_uses_that_contradict_nothing(use):
  fn = lambda p, x: TIED[use](p["w"], x)
  tree = adapted({"w": square()}, targets="w")
  assert not tree["w"].sure
  np.testing.assert_allclose(jaxlora.wrap(fn)(tree, X), fn(jaxlora.merge(tree), X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("leaf", ["embed/embedding", "embed_tokens/weight", "wte/weight"])
def test_a_table_may_be_used_as_the_head_alone(leaf):
  module, name = leaf.split("/")
  fn = lambda p, x: x @ p[module][name].T
  tree = adapted({module: {name: matrix(11, 8)}}, targets=leaf)
  np.testing.assert_allclose(jaxlora.wrap(fn)(tree, X), fn(jaxlora.merge(tree), X), rtol=1e-5, atol=1e-5)


def test_what_is_made_of_an_uncertain_weight_is_no_surer():
  tree = adapted({"other": square()}, targets="other")
  made = [
    jaxlora.arithmetic.combine([tree, tree], [1, 1]),
    jaxlora.serving.pad(tree, 4),
    jaxlora.svd.compress(tree, rank=1),
    jaxlora.svd.extract({"other": square()}, {"other": square(2)}, rank=2),
    jaxlora.join(*jaxlora.split(tree)),
    jaxlora.stack({"one": tree, "two": tree}).take("one"),
    jaxlora.init_from_data(
      adapted({"other": square()}, targets="other", seed=None), lambda p, x: x @ p["other"], [X], KEY
    ),
  ]
  assert [node["other"].sure for node in made] == [False] * len(made)


def grouped_by_columns(p, x):
  """The columns of a weight in groups: no product of a weight's."""
  numbers = lax.RaggedDotDimensionNumbers((((1,), (0,)), ((), ())), [1], [])
  return lax.ragged_dot_general(jnp.tanh(x @ p["w"]), p["wo"], jnp.array([2, 4]), numbers).sum(0) * p["scale"]


def test_all_linear_says_which_weights_it_leaves_out_and_why():
  params = {"w": matrix(8, 6), "wo": matrix(6, 8), "scale": matrix(1, 8)}
  probe = lambda p: grouped_by_columns(p, X)
  adapt = lambda **fields: jaxlora.adapt(params, jaxlora.LoraConfig(rank=2, **fields), KEY, probe=probe)
  with pytest.warns(UserWarning, match="all-linear") as warned:
    tree = adapt()
  (warning,) = warned
  assert "'all-linear' leaves out wo (in `ragged_dot" in str(warning.message)
  assert "scale" not in str(warning.message)
  assert warning.filename == __file__
  assert roles(tree) == [("io", True)]
  assert roles(adapt(targets=["w", "wo"], axes={"wo": "io"})) == [("io", True), ("io", True)]
  assert roles(adapt(exclude=["wo"])) == [("io", True)]
