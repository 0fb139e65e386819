"""An adapted module with the rest of this library, and with what flax and orbax make of any module."""

import copy
import pickle

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxlora
from jaxlora import peft
import jaxlora.checkpoint
import jaxlora.nnx
from tests import helpers
from tests.nnx.models import CONFIG, KEY, Net, X, adapted

pytestmark = pytest.mark.usefixtures("lenient")
Trainable = jaxlora.nnx.Trainable


def leaves(module):
  return [np.asarray(x) for x in jax.tree.leaves(nnx.state(module, Trainable))]


def same(left, right):
  jax.tree.map(np.testing.assert_array_equal, leaves(left), leaves(right))


@pytest.mark.nightly  # seconds
def test_merge_strip_split_and_summary_take_it():
  model = adapted()
  model.eval()
  plain = jaxlora.merge(model)
  assert type(plain) is Net
  assert not hasattr(plain.up, "jaxlora")
  helpers.assert_close(plain(X), model(X), 1e-5)
  assert jax.tree.structure(plain) == jax.tree.structure(jaxlora.strip(model))
  jax.tree.map(np.testing.assert_array_equal, nnx.state(jaxlora.strip(model), nnx.Param), nnx.state(model, nnx.Param))
  assert [leaf.path for leaf in jaxlora.summary(model).leaves] == [
    "down/kernel", "layers/0/kernel", "layers/1/kernel", "norm/bias", "up/kernel",
  ]  # fmt: skip
  again = jaxlora.nnx.from_tree(jaxlora.join(*jaxlora.split(model)))
  same(again, model)
  assert jax.tree.structure(nnx.state(again)) == jax.tree.structure(nnx.state(model))
  with pytest.raises(ValueError, match="adapted already"):
    jaxlora.nnx.adapt(model, CONFIG, KEY)
  with pytest.raises(ValueError, match="adapted"):
    jaxlora.adapt(model, CONFIG, KEY)
  assert type(jaxlora.nnx.adapt(jaxlora.merge(model), CONFIG, KEY)) is type(model)


def test_pefts_folders_and_our_checkpoints(tmp_path):
  config = jaxlora.LoraConfig(rank=2, targets=r"(up|down)/kernel")
  model = adapted(config=config)
  model.eval()
  peft.save(tmp_path / "peft", model)
  loaded = jaxlora.nnx.from_tree(peft.load(tmp_path / "peft", jaxlora.strip(model)))
  same(loaded, model)
  helpers.assert_close(loaded(X), model(X), 1e-6)
  with pytest.raises(ValueError, match="adapted already"):
    peft.load(tmp_path / "peft", model)
  jaxlora.checkpoint.save(tmp_path / "ours", model)
  same(jaxlora.nnx.from_tree(jaxlora.checkpoint.load(tmp_path / "ours", jaxlora.strip(model))), model)


def test_orbax_saves_and_restores_the_factors_by_the_filter(tmp_path):
  model, blank = adapted(), jaxlora.nnx.adapt(Net(nnx.Rngs(0)), CONFIG, jax.random.key(7))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "state", nnx.state(model, Trainable))
    checkpointer.wait_until_finished()
    nnx.update(blank, checkpointer.restore(tmp_path / "state", nnx.state(blank, Trainable)))
  same(blank, model)


@pytest.mark.nightly  # seconds
def test_copies_displays_and_abstract_modules(capsys):
  model = adapted()
  model.eval()
  for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), nnx.clone(model)):
    np.testing.assert_array_equal(other(X), model(X))
  nnx.display(model)
  assert "Trainable" in repr(model)
  assert "Trainable" in capsys.readouterr().out
  graph, factors, rest = nnx.split(model, Trainable, ...)
  np.testing.assert_array_equal(nnx.merge(graph, factors, rest)(X), model(X))
  shapes = nnx.eval_shape(lambda: jaxlora.nnx.adapt(Net(nnx.Rngs(0)), CONFIG, KEY))
  assert nnx.state(shapes, Trainable)["up"]["jaxlora"]["kernel"]["a"].shape == (2, 5)


def test_tabulate_counts_factors_in_a_column_of_their_own():
  pytest.importorskip("rich", reason="nnx.tabulate needs rich")
  model = jaxlora.nnx.adapt(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), jaxlora.LoraConfig(rank=2, dropout=0.1), KEY)
  text = nnx.tabulate(model, jnp.ones((3, 4)), console_kwargs={"width": 200})
  assert ("Trainable" in text, "18" in text, "25" in text) == (True, True, True)


def test_the_optimizer_of_trees_names_the_one_of_modules():
  model = jaxlora.nnx.adapt(nnx.Linear(4, 5, rngs=nnx.Rngs(0)), jaxlora.LoraConfig(rank=2), KEY)
  with pytest.raises(ValueError, match=r"nnx\.Optimizer\(module, tx, wrt=jaxlora\.nnx\.Trainable\)"):
    jaxlora.optimizer(optax.adam(1e-3)).init(model)
  optimizer = nnx.Optimizer(model, optax.adam(1e-3), wrt=Trainable)
  before = leaves(model)
  grads = nnx.grad(lambda model: model(jnp.ones((3, 4))).sum(), argnums=nnx.DiffState(0, Trainable))(model)
  optimizer.update(model, grads)
  assert any((old != new).any() for old, new in zip(before, leaves(model), strict=True))


@pytest.mark.parametrize("key", ["out_sharding", "sharding_names"])
def test_metadata_goes_to_the_factors(key):
  with nnx.use_eager_sharding(False):
    linear = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
    linear.kernel = nnx.Param(linear.kernel[...], **{key: ("data", "model")}, tag="mine")
    held = jaxlora.nnx.adapt(linear, jaxlora.LoraConfig(rank=2, train=["bias"]), KEY)
  factors = nnx.state(held, Trainable)["jaxlora"]["kernel"]
  assert factors["a"].get_metadata("out_sharding", None) == (None, "data")
  assert factors["b"].get_metadata("out_sharding", None) == (None, "model")
  assert factors["a"].tag == "mine"
  specs = nnx.get_partition_spec(nnx.state(held))
  assert specs["jaxlora"]["kernel"]["b"].get_value() == jax.sharding.PartitionSpec(None, "model")
  assert nnx.state(held)["kernel"].get_metadata() == linear.kernel.get_metadata()


@pytest.mark.nightly  # seconds
def test_a_weight_that_two_modules_share_has_one_adapter():
  class Tied(nnx.Module):
    def __init__(self, rngs):
      self.one = nnx.Linear(5, 5, rngs=rngs)
      self.two = nnx.Linear(5, 5, rngs=rngs)
      self.two.kernel = self.one.kernel

    def __call__(self, x):
      return self.two(jnp.tanh(self.one(x)))

  model = adapted(Tied(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2))
  assert len(leaves(model)) == 2
  plain = Tied(nnx.Rngs(0))
  plain.one.kernel.set_value(jaxlora.nnx.to_tree(model).one.kernel.get_value().materialize())
  helpers.assert_close(model(X), plain(X), 1e-5)


@pytest.mark.parametrize("module", [3, {"kernel": np.ones((3, 3))}])
def test_what_is_no_module_is_refused(module):
  with pytest.raises(TypeError, match=r"expected a module of flax\.nnx"):
    jaxlora.nnx.adapt(module, CONFIG, KEY)


def test_what_from_tree_cannot_take():
  with pytest.raises(ValueError, match="no Variable of the module holds an adapted weight"):
    jaxlora.nnx.from_tree(Net(nnx.Rngs(0)))
  tree = jaxlora.adapt(nnx.Linear(5, 3, rngs=nnx.Rngs(0)), jaxlora.LoraConfig(rank=2, dropout=0.5), KEY)
  with pytest.raises(ValueError, match=r"kernel has dropout 0.5.*Pass key="):
    jaxlora.nnx.from_tree(tree)
  assert jaxlora.nnx.from_tree(tree, key=KEY)(X).shape == (4, 3)
  with pytest.raises(ValueError, match=r"kernel is one half.*jaxlora.join"):
    jaxlora.nnx.from_tree(jaxlora.split(tree)[1], key=KEY)
  with pytest.raises(ValueError, match="on_materialize is 'never'"):
    jaxlora.nnx.adapt(Net(nnx.Rngs(0)), CONFIG, KEY, on_materialize="never")


@pytest.mark.nightly  # seconds
def test_a_base_of_codes():
  x = helpers.normal(0, (3, 64), jnp.float32)
  base = jaxlora.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), "nf4")
  model = adapted(base, jaxlora.LoraConfig(rank=2))
  tree = jaxlora.nnx.to_tree(model)
  helpers.assert_close(model(x), jaxlora.wrap(tree)(x), 1e-6)
  grads = nnx.grad(lambda m: m(x).sum(), argnums=nnx.DiffState(0, Trainable))(model)
  assert bool(jnp.any(grads["jaxlora"]["kernel"]["b"][...] != 0))
