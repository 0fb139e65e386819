"""Adapters of flax's own layers and of qwix come in and go out, with equal outputs; what is half of one is named."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
import jaxlora.nnx
import jaxlora.peft
from tests import helpers

pytestmark = [pytest.mark.usefixtures("lenient"), pytest.mark.filterwarnings("default")]
X = helpers.normal(0, (3, 6), jnp.float32)


class Theirs(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs)
    self.rest = nnx.List([nnx.LoRA(4, 2, 5, base_module=nnx.Linear(4, 5, rngs=rngs), rngs=rngs)])

  def __call__(self, x):
    return self.rest[0](nnx.relu(self.one(x)))


def moved(model, kind=nnx.LoRAParam):
  state = nnx.state(model, kind)
  nnx.update(model, jax.tree.map(lambda x: x + helpers.normal(x.size, x.shape, x.dtype), state))
  return model


def test_flaxs_layers_come_in_and_go_out():
  theirs = moved(Theirs(nnx.Rngs(0)))
  expected = theirs(X)
  ours = jaxlora.nnx.from_nnx_lora(theirs)
  helpers.assert_close(ours(X), expected, 1e-5)
  assert [(leaf.path, leaf.rank) for leaf in jaxlora.summary(ours).leaves] == [("one/kernel", 2), ("rest/0/kernel", 2)]
  back = jaxlora.nnx.to_nnx_lora(ours)
  assert type(back.one) is type(back.rest[0]) is nnx.LoRALinear
  np.testing.assert_array_equal(back.one.lora.lora_a[...], theirs.one.lora.lora_a[...])
  helpers.assert_close(back(X), expected, 1e-5)
  helpers.assert_close(theirs(X), expected, 0)
  alone = moved(nnx.LoRALinear(6, 4, lora_rank=2, rngs=nnx.Rngs(0)))
  helpers.assert_close(jaxlora.nnx.from_nnx_lora(alone)(X), alone(X), 1e-5)


def test_a_scale_goes_into_b():
  model = nnx.Linear(6, 4, rngs=nnx.Rngs(0))
  config = jaxlora.LoraConfig(rank=2, alpha=8, train=["bias"])
  model = moved(jaxlora.nnx.adapt(model, config, jax.random.key(0)), jaxlora.nnx.Trainable)
  helpers.assert_close(jaxlora.nnx.to_nnx_lora(model)(X), model(X), 1e-5)
  dora = jaxlora.LoraConfig(rank=2, variant="dora")
  with pytest.raises(ValueError, match=r"to_nnx_lora: kernel: found Linear, variant 'dora'.*jaxlora.merge\(model\)"):
    jaxlora.nnx.to_nnx_lora(jaxlora.nnx.adapt(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), dora, jax.random.key(0)))


class Alone(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs)
    self.lora = nnx.LoRA(6, 2, 4, rngs=rngs)


class Own(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs)
    self.mine = nnx.LoRAParam(jnp.ones((4, 2)))


class Conv(nnx.Module):
  def __init__(self, rngs):
    self.conv = nnx.LoRA(6, 2, 4, base_module=nnx.Conv(6, 4, (1,), rngs=rngs), rngs=rngs)


class Narrow(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.LoRALinear(6, 4, lora_rank=2, rngs=rngs)
    self.one.lora = nnx.LoRA(6, 2, 3, rngs=rngs)


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Alone, "lora: found LoRA, expected nnx.LoRALinear"),
    (Own, "mine: found a LoRAParam outside of flax's layers"),
    (Conv, "conv: found LoRA, expected"),
    (Narrow, r"one/kernel: found factors \(6, 2\) and \(2, 3\)"),
    (lambda rngs: nnx.Linear(6, 4, rngs=rngs), "no layer of LoRA.*jaxlora.nnx.adapt"),
  ],
)
def test_what_is_no_whole_layer_of_flaxs_is_named(module, message):
  with pytest.raises(ValueError, match=message):
    jaxlora.nnx.from_nnx_lora(module(nnx.Rngs(0)))


class Plain(nnx.Module):
  def __init__(self, rngs):
    self.one = nnx.Linear(6, 4, rngs=rngs)
    self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)

  def __call__(self, x):
    return self.heads(nnx.relu(self.one(x)))


def of_qwix(**options):
  qwix = pytest.importorskip("qwix", reason="the modules are qwix's")
  provider = qwix.LoraProvider(module_path=".*", rank=2, alpha=8.0, **options)
  return qwix.apply_lora_to_model(Plain(nnx.Rngs(0)), provider, X, rngs=nnx.Rngs(1))


@pytest.mark.nightly  # seconds
def test_qwixs_modules_come_in_and_go_out():
  theirs = of_qwix()
  blank = nnx.clone(theirs)
  expected = moved(theirs)(X)
  ours = jaxlora.nnx.from_qwix(theirs, alpha=8.0)
  assert type(ours.one) is not nnx.Linear
  assert isinstance(ours, Plain)
  helpers.assert_close(ours(X), expected, 1e-5)
  assert type(jaxlora.merge(ours)) is Plain
  assert not {name for name in vars(jaxlora.merge(ours).one) if "qwix" in name or "lora" in name}
  helpers.assert_close(jaxlora.nnx.to_qwix(ours, blank, alpha=8.0)(X), expected, 1e-5)
  config = jaxlora.LoraConfig(rank=2, alpha=4, targets="(one|heads)/kernel", axes={"heads/kernel": "ioo"})
  native = jaxlora.nnx.adapt(Plain(nnx.Rngs(0)), config, jax.random.key(0))
  moved(native, jaxlora.nnx.Trainable)
  helpers.assert_close(jaxlora.nnx.to_qwix(native, blank, alpha=8.0)(X), native(X), 1e-5)
  halves = nnx.clone(theirs)
  del halves.one.kernel_lora_b
  with pytest.raises(ValueError, match="from_qwix: one/kernel: kernel_lora_b missing"):
    jaxlora.nnx.from_qwix(halves, alpha=8.0)
  with pytest.raises(ValueError, match="found no factors of qwix"):
    jaxlora.nnx.from_qwix(Plain(nnx.Rngs(0)), alpha=8.0)
  one = jaxlora.nnx.adapt(Plain(nnx.Rngs(0)), jaxlora.LoraConfig(rank=2, targets="one/kernel"), jax.random.key(0))
  with pytest.raises(ValueError, match="to_qwix: heads/kernel_lora_a, heads/kernel_lora_b in one of the two"):
    jaxlora.nnx.to_qwix(one, blank, alpha=8.0)


@pytest.mark.nightly  # seconds
@pytest.mark.parametrize("codes", ["int8", "nf4"])
def test_weights_that_qwix_quantised_stay_codes(codes):
  theirs = of_qwix(weight_qtype=codes)
  blank = nnx.clone(theirs)
  expected = moved(theirs)(X)
  ours = jaxlora.nnx.from_qwix(theirs, alpha=8.0)
  helpers.assert_close(ours(X), expected, 1e-5)
  assert isinstance(jaxlora.nnx.to_tree(ours).heads.kernel.get_raw_value().base, jaxlora.QuantizedArray)
  helpers.assert_close(jaxlora.nnx.to_qwix(ours, blank, alpha=8.0)(X), expected, 1e-5)


@pytest.mark.nightly  # seconds
def test_a_tree_in_qwixs_codes_says_how_it_is_taken():
  theirs = moved(of_qwix(weight_qtype="int8"))
  names = ("kernel", "kernel_lora_a", "kernel_lora_b")
  tree = {"one": {name: getattr(theirs.one, name) for name in names}}
  tree["one"] |= {name: tree["one"][name].get_raw_value() for name in names[1:]}
  with pytest.raises(jaxlora.peft.PeftError, match=r"one/kernel: found WithAux.*jaxlora\.quant\.from_qwix\(tree\)"):
    jaxlora.peft.from_lora_leaves(tree, alpha=8.0)
  adapted = jaxlora.peft.from_lora_leaves(jaxlora.quant.from_qwix(tree), alpha=8.0)["one"]["kernel"]
  assert isinstance(adapted.base, jaxlora.QuantizedArray)
  floats = adapted.base.dequantize() + 4 * tree["one"]["kernel_lora_a"] @ tree["one"]["kernel_lora_b"]
  helpers.assert_close(jaxlora.wrap(lambda p, x: x @ p["kernel"])({"kernel": adapted}, X), X @ floats, 1e-5)
