"""What a call changes comes out: statistics, counts, caches, what is sown; under each of NNX's transformations."""

from flax import errors, nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
import jaxlora.nnx
from tests import helpers
from tests.nnx.models import KEY, Net, X, adapted, merged, states_equal

pytestmark = pytest.mark.usefixtures("lenient")


@pytest.mark.nightly  # seconds
def test_the_module_is_the_base_at_first_bit_for_bit_and_the_module_given_stays():
  net = Net(nnx.Rngs(0))
  model = jaxlora.nnx.adapt(net, jaxlora.LoraConfig(rank=2), KEY)
  assert isinstance(model, Net)
  twin = nnx.clone(net)
  np.testing.assert_array_equal(model(X, scale=2.0), twin(X, scale=2.0))
  states_equal(model, twin, nnx.Param)
  states_equal(model, twin, nnx.BatchStat)
  assert net.drop.rngs.count[...] == 0
  assert type(model.up.kernel) is not nnx.Param  # reads as the merged weight
  assert type(nnx.state(model)["up"]["kernel"]) is nnx.Param


def run(transform, model):
  """A call under a transformation, of the module as an argument."""
  return {
    "jit": lambda: nnx.jit(lambda m, x: m(x))(model, X),
    "remat": lambda: nnx.remat(lambda m, x: m(x))(model, X),
    "jit in tree mode": lambda: nnx.jit(lambda m, x: m(x), graph=False)(model, X),
    "grad": lambda: nnx.value_and_grad(
      lambda m: (lambda y: (y.sum(), y))(m(X)), argnums=nnx.DiffState(0, jaxlora.nnx.Trainable), has_aux=True
    )(model)[0][1],
    "submodules": lambda: model.down(model.hidden(X)),
  }[transform]()


@pytest.mark.parametrize(
  "transform",
  [
    "jit",
    *(pytest.param(name, marks=pytest.mark.nightly) for name in ("jit in tree mode", "remat", "grad", "submodules")),
  ],
)
def test_statistics_and_counts_come_out(transform):
  model = adapted()
  plain = merged(model)
  helpers.assert_close(run(transform, model), plain(X), 1e-5)
  states_equal(model, plain, (nnx.BatchStat, nnx.RngState))
  assert model.drop.rngs.count[...] == 1


@pytest.mark.nightly  # seconds
def test_vmap_over_the_data_and_scan_over_steps():
  model = adapted()
  plain = merged(model)
  axes = nnx.StateAxes({nnx.BatchStat: None, nnx.RngState: None, ...: None})
  for module in (model, plain):
    module.norm.use_running_average = True
    module.drop.deterministic = True
  batch = jnp.stack([X, 2 * X])
  mapped = nnx.vmap(lambda m, x: m(x), in_axes=(axes, 0))(model, batch)
  helpers.assert_close(mapped, jnp.stack([plain(X), plain(2 * X)]), 1e-5)
  for module in (model, plain):
    module.train()
  steps = nnx.scan(lambda m, x: (m, m(x)), in_axes=(nnx.Carry, 0), out_axes=(nnx.Carry, 0))
  (_, scanned), expected = steps(model, batch), [plain(x) for x in batch]
  helpers.assert_close(scanned, jnp.stack(expected), 1e-5)
  states_equal(model, plain, (nnx.BatchStat, nnx.RngState))


@pytest.mark.nightly  # seconds
def test_members_of_a_vmap_change_statistics_and_counts_of_their_own():
  model = adapted()
  plain = merged(model)
  for module in (model, plain):
    nnx.update(module, jax.tree.map(lambda x: jnp.stack([x, x]), nnx.state(module, (nnx.BatchStat, nnx.RngState))))
  axes = nnx.StateAxes({nnx.BatchStat: 0, nnx.RngState: 0, ...: None})
  both = nnx.vmap(lambda module, x: module(x), in_axes=(axes, 0))
  batch = jnp.stack([X, 2 * X])
  helpers.assert_close(both(model, batch), both(plain, batch), 1e-5)
  states_equal(model, plain, (nnx.BatchStat, nnx.RngState))
  np.testing.assert_array_equal(model.drop.rngs.count[...], [1, 1])
  assert not np.array_equal(*model.norm.mean[...])


class Block(nnx.Module):
  def __init__(self, rngs):
    self.linear = nnx.Linear(5, 5, rngs=rngs)
    self.seen = nnx.BatchStat(jnp.zeros(5))

  def __call__(self, x):
    self.seen[...] += x.sum(0)
    return jnp.tanh(self.linear(x))


class Stack(nnx.Module):
  """Layers in one array, scanned over in the module's own call."""

  def __init__(self, rngs):
    self.blocks = nnx.vmap(Block)(rngs.fork(split=3))

  def __call__(self, x):
    return nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.blocks)


@pytest.mark.nightly  # seconds
def test_stacked_layers_scanned_inside_of_the_module():
  config = jaxlora.LoraConfig(rank=2)
  model = adapted(Stack(nnx.Rngs(0)), config, probe=lambda m: m(X), on_materialize="error")
  assert jaxlora.nnx.to_tree(model).blocks.linear.kernel.get_value().roles == "sio"
  plain = merged(model)
  helpers.assert_close(nnx.jit(lambda m, x: m(x))(model, X), plain(X), 1e-5)
  states_equal(model, plain, nnx.BatchStat)
  assert bool(jnp.any(model.blocks.seen[...] != 0))


@pytest.mark.nightly  # seconds
def test_caches_that_are_made_and_filled_by_calls():
  attention = nnx.MultiHeadAttention(2, 4, decode=True, rngs=nnx.Rngs(0))
  config = jaxlora.LoraConfig(rank=2, axes={"(query|key|value)/kernel": "ioo", "out/kernel": "iio"})
  model = adapted(attention, config)
  plain = merged(model)
  for module in (model, plain):
    module.init_cache((1, 3, 4))
  x = helpers.normal(5, (1, 1, 4), jnp.float32)
  for _ in range(2):
    helpers.assert_close(model(x), plain(x), 1e-5)
  assert model.cache_index[...] == 2
  states_equal(model, plain, nnx.Cache)


class Sower(nnx.Module):
  def __init__(self, rngs):
    self.linear, self.calls = nnx.Linear(5, 3, rngs=rngs), 0

  def __call__(self, x, rngs=None):
    self.calls += 1
    y = self.linear(x)
    self.sow(nnx.Intermediate, "out", y)
    return y if rngs is None else y + rngs.noise()[..., None].size

  def inner(self):
    return self.linear

  def spoiled(self, x):
    self.linear.kernel[...] = self.linear.kernel[...] * 0
    return x


def test_what_is_sown_static_attributes_and_generators_among_the_arguments():
  model, rngs = adapted(Sower(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2)), nnx.Rngs(noise=0)
  y = model(X, rngs=rngs)
  assert rngs.noise.count[...] == 1
  assert model.calls == 1
  (sown,) = nnx.pop(model, nnx.Intermediate)["out"].get_value()
  helpers.assert_close(sown, y - 1, 1e-5)
  assert model.inner() is vars(model)["linear"]


def test_an_adapted_weight_that_a_method_assigns_is_named():
  model = adapted(Sower(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2))
  with pytest.raises(ValueError, match=r"linear/kernel: spoiled assigns an adapted weight.*exclude="):
    model.spoiled(X)
  with pytest.raises(TypeError, match=r"assigned; expected.*nnx.update\(model, state\)"):
    model.linear.kernel[...] = jnp.zeros((5, 3))
  nnx.update(model, nnx.state(Sower(nnx.Rngs(1)), nnx.Param))
  np.testing.assert_array_equal(
    jaxlora.strip(jaxlora.nnx.to_tree(model)).linear.kernel[...], Sower(nnx.Rngs(1)).linear.kernel[...]
  )
  free = jaxlora.nnx.adapt(Net(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2, exclude="down/kernel"), KEY)
  free.down.kernel[...] = jnp.zeros((6, 3))
  np.testing.assert_array_equal(free.down.kernel[...], 0)


def test_reads_outside_of_methods_are_of_the_merged_weight():
  model = adapted()
  plain = merged(model)
  helpers.assert_close(model.up.kernel[...], plain.up.kernel[...], 1e-6)
  helpers.assert_close(nnx.Linear.__call__(model.up, X), plain.up(X), 1e-5)
  grads = nnx.grad(lambda m: jnp.sum(m.down.kernel[...]), argnums=nnx.DiffState(0, jaxlora.nnx.Trainable))(model)
  assert bool(jnp.any(grads["down"]["jaxlora"]["kernel"]["b"][...] != 0))


class Held(nnx.Module):
  """Weights that are held in lists and dictionaries, and not in modules of them."""

  def __init__(self, rngs):
    weight = lambda: nnx.Param(jax.random.normal(rngs.params(), (5, 5)))
    self.list = nnx.List([weight(), weight()])
    self.dict = nnx.Dict({"one": weight(), "more": nnx.List([weight()])})
    self.plain = nnx.data([{"one": weight()}, weight(), (weight(),)])
    self.last = nnx.Linear(5, 3, rngs=rngs)
    self.seven = 6

  def __call__(self, x):
    for weight in (
      *self.list,
      self.dict["one"],
      self.dict.more[0],
      self.plain[0]["one"],
      self.plain[1],
      *self.plain[2],
    ):
      x = jnp.tanh(x @ weight)
    return self.last(x)

  @property
  def first(self):
    return self.list[0][...]

  def add(self, weight):
    self.list.append(nnx.Param(weight))

  def __getattribute__(self, name):
    return 7 if name == "seven" else super().__getattribute__(name)


def test_weights_in_lists_and_dictionaries_read_as_the_merged_ones_too():
  model = adapted(Held(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2), probe=lambda model: model(X))
  assert len(jaxlora.summary(model).leaves) == 7
  plain = merged(model)
  helpers.assert_close(Held.__call__(model, X), plain(X), 1e-5)  # reads each, without wrap
  helpers.assert_close(model.first, plain.first, 1e-6)
  helpers.assert_close(model.list[-1][...], plain.list[1][...], 1e-6)
  assert model.seven == 7  # what is not adapted is read in the class's own way
  assert (len(model.list), sorted(model.dict), isinstance(model.list, nnx.List)) == (2, ["more", "one"], True)
  wrt = nnx.DiffState(0, jaxlora.nnx.Trainable)
  grads = nnx.grad(lambda m: jnp.sum(m.dict.more[0][...]), argnums=wrt)(model)["jaxlora"]
  assert [path for path, held in grads.items() if jnp.any(held["b"][...] != 0)] == ["dict/more/0"]


@pytest.mark.parametrize(
  "change",
  [
    lambda model: model.list.append(0),
    lambda model: model.list.insert(0, 0),
    lambda model: model.list.reverse(),
    lambda model: model.list.pop(),
    lambda model: model.dict.pop("one"),
    lambda model: setattr(model.dict, "two", 0),
  ],
)
def test_a_list_of_adapted_weights_is_changed_by_methods_alone(change):
  model = adapted(Held(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2), probe=lambda model: model(X))
  before = model(X)
  with pytest.raises(TypeError, match=r"(list|dict) holds adapted weights, and was changed.*in a method of its module"):
    change(model)
  np.testing.assert_array_equal(model(X), before)
  model.add(jnp.eye(5))  # the remedy
  assert len(model.list) == 3
  helpers.assert_close(model(X), merged(model)(X), 1e-5)


def test_a_closure_over_another_level_says_what_to_pass():
  model = adapted()
  with pytest.raises(errors.TraceContextError, match=r"closes over.*constants.*nnx.jit\(lambda model, x: model\(x\)\)"):
    jax.jit(lambda x: model(x))(X)
  with pytest.raises(errors.TraceContextError, match=r"its call changes (norm|drop)/.*Pass the module as an argument"):
    jax.vmap(lambda x: model(x[None]))(X)
  model.eval()
  helpers.assert_close(jax.vmap(lambda x: model(x[None])[0])(X), nnx.jit(lambda model, x: model(x))(model, X), 1e-5)


def test_the_adapters_dropout_draws_anew_and_rests_in_evaluation():
  model = adapted(config=jaxlora.LoraConfig(rank=2, dropout=0.5, targets="up/kernel"))
  model.eval()
  np.testing.assert_array_equal(model.up(X), model.up(X))
  model.train()
  one, two = model.up(X), model.up(X)
  assert not np.array_equal(one, two)
  assert not np.array_equal(nnx.jit(lambda m, x: m(x))(model.up, X), two)
