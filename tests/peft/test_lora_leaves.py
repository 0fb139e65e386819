"""Factors that qwix and flax's NNX left beside the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import peft
from tests.peft.folders import normal

nnx = pytest.importorskip("flax.nnx", reason="the trees are flax's and qwix's")
nn = pytest.importorskip("flax.linen", reason="the trees are flax's and qwix's")

pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]


def moved(tree, seed=0):
  """A tree whose factors are no zeros."""
  random = np.random.default_rng(seed)
  is_factor = lambda path: "lora_b" in str(path[-1])
  return jax.tree_util.tree_map_with_path(
    lambda path, x: jnp.asarray(random.normal(size=x.shape), x.dtype) if is_factor(path) else x, tree
  )


class Heads(nn.Module):
  @nn.compact
  def __call__(self, x):
    x = nn.Dense(8, name="square")(x)
    x = nn.DenseGeneral((2, 3), name="heads")(x)
    return nn.DenseGeneral(7, axis=(-2, -1), name="out")(x)


def test_qwix_on_a_linen_model(tmp_path):
  qwix = pytest.importorskip("qwix", reason="the tree is qwix's")
  x = normal(3, 8)
  model = qwix.apply_lora_to_model(Heads(), qwix.LoraProvider(module_path=".*", rank=2, alpha=4.0))
  params = moved(model.init(jax.random.key(0), x)["params"])
  tree = peft.from_lora_leaves(params, alpha=4.0)
  expected = model.apply({"params": params}, x)
  np.testing.assert_allclose(Heads().apply({"params": jaxlora.merge(tree)}, x), expected, rtol=1e-5, atol=1e-5)
  factored = jaxlora.wrap(Heads().apply, on_materialize="error")({"params": tree}, x)
  np.testing.assert_allclose(factored, expected, rtol=1e-5, atol=1e-5)
  with pytest.raises(peft.PeftError, match=r"do not hold alpha, and its scale is alpha / rank. Say alpha="):
    peft.from_lora_leaves(params)
  peft.save(tmp_path, tree)
  loaded = peft.load(tmp_path, jaxlora.strip(tree))
  jax.tree.map(np.testing.assert_array_equal, jaxlora.merge(loaded), jaxlora.merge(tree))


class Nnx(nnx.Module):
  def __init__(self, rngs, lora):
    self.one = nnx.LoRALinear(8, 6, lora_rank=2, rngs=rngs) if lora else nnx.Linear(8, 6, rngs=rngs)
    inner = nnx.Linear(6, 5, rngs=rngs)
    self.two = nnx.LoRA(6, 2, 5, base_module=inner, rngs=rngs) if lora else inner

  def __call__(self, x):
    return self.two(self.one(x))


def test_nnx_lora_and_lora_linear():
  x, model = normal(3, 8), Nnx(nnx.Rngs(0), lora=True)
  state = moved(nnx.to_pure_dict(nnx.state(model)))
  nnx.update(model, nnx.State(state))
  tree = peft.from_lora_leaves(state)
  assert sorted(tree) == ["one", "two"]
  assert sorted(tree["two"]) == ["bias", "kernel"]
  plain = Nnx(nnx.Rngs(1), lora=False)
  nnx.update(plain, nnx.State(jaxlora.merge(tree)))
  np.testing.assert_allclose(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_einsums_and_stacks_of_qwix():
  w = {"w": normal(4, 6, 3), "w_lora_a": normal(6, 2), "w_lora_b": normal(2, 4, 3)}
  node = peft.from_lora_leaves({"q": w}, alpha=2)["q"]["w"]
  assert node.roles == "oio"
  expected = np.einsum("ir,rnh->nih", w["w_lora_a"], w["w_lora_b"])
  np.testing.assert_allclose(node.materialize() - w["w"], expected, rtol=1e-5, atol=1e-5)
  experts = {"w": normal(3, 4, 5), "w_lora_a": normal(3, 4, 2), "w_lora_b": normal(3, 2, 5)}
  node = peft.from_lora_leaves(experts, alpha=4)["w"]
  assert node.roles == "sio"
  expected = 2 * np.einsum("eir,ero->eio", experts["w_lora_a"], experts["w_lora_b"])
  np.testing.assert_allclose(node.materialize() - experts["w"], expected, rtol=1e-5, atol=1e-5)


def test_factors_alone():
  tree = {"layers": {"0": {"q_proj": {"w_lora_a": normal(8, 2), "w_lora_b": normal(2, 4, 3)}}}}
  node = peft.from_lora_leaves(tree, alpha=2)["layers"]["0"]["q_proj"]["w"]
  assert (node.roles, node.base.shape) == ("ioo", (8, 4, 3))
  module = peft.to_modules({"layers": {"0": {"q_proj": {"w": node}}}}).modules["model.layers.0.q_proj"]
  a, b = tree["layers"]["0"]["q_proj"].values()
  np.testing.assert_allclose(module.delta(), (a @ b.reshape(2, 12)).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("tree", "message"),
  [
    ({"w": (4, 4), "w_lora_a": (4, 2), "w_lora_b": (2, 4)}, r"w: shape \(4, 4\): .* fit it as io, oi; say axes="),
    ({"w": (4, 5), "w_lora_a": (3, 2), "w_lora_b": (2, 5)}, "do not fit it"),
    ({"w": (4, 5), "w_lora_a": (4, 2)}, "found w_lora_a alone; expected both factors"),
    ({"w_lora_a": (3, 4, 2), "w_lora_b": (3, 2, 5)}, "the weight is not there, and nothing tells .*say axes="),
  ],
)
def test_what_does_not_fit(tree, message):
  leaves = {name: normal(*shape) for name, shape in tree.items()}
  with pytest.raises(peft.PeftError, match=message):
    peft.from_lora_leaves(leaves, alpha=2)


@pytest.mark.parametrize(
  ("tree", "roles"),
  [
    ({"w": (4, 4), "w_lora_a": (4, 2), "w_lora_b": (2, 4)}, "oi"),
    ({"w_lora_a": (3, 4, 2), "w_lora_b": (3, 2, 5)}, "sio"),
  ],
)
def test_axes_tell_what_shapes_do_not(tree, roles):
  leaves = {name: normal(*shape) for name, shape in tree.items()}
  assert peft.from_lora_leaves(leaves, alpha=2, axes={"w": roles})["w"].roles == roles
