"""The pure middle: a tree as torch's modules and back, with no file and no safetensors in reach."""

import builtins
import contextlib
import io
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import peft
from jaxlora._weight.variant import VARIANTS
from jaxlora.peft._read import read
from jaxlora.peft._state import adapter_of, state_of
from jaxlora.peft._write import write
from tests.peft.folders import AXES, FIELDS, RANDOM, adapted, assert_equal, normal, params


@contextlib.contextmanager
def no_disk():
  """Every way to a file's content or to safetensors is an error."""

  def refused(*arguments, **_):
    raise AssertionError(f"a pure function reached for the disk: {arguments}")

  with pytest.MonkeyPatch.context() as patch:
    for module, names in ((builtins, ["open"]), (io, ["open"]), (os, ["open", "mkdir", "replace"])):
      for name in names:
        patch.setattr(module, name, refused)
    for name in {"safetensors", *(name for name in sys.modules if name.startswith("safetensors."))}:
      patch.setitem(sys.modules, name, None)  # an import of it is an ImportError now
    yield


def there_and_back(tree, base, names=None, **options):
  """A tree through modules and back, without the disk."""
  with no_disk():
    return peft.from_modules(peft.to_modules(tree, names=names), base, names=names, **options)


def assert_same_adapter(found, expected):
  """All of it, dtypes and the order of JSON aside."""
  assert found.config == expected.config
  assert found.modules.keys() == expected.modules.keys()
  tensors = state_of(expected)
  assert state_of(found).keys() == tensors.keys()
  for key, tensor in state_of(found).items():
    assert tensor.dtype == tensors[key].dtype
    np.testing.assert_array_equal(tensor, tensors[key])
  for name, module in found.modules.items():
    other = expected.modules[name]
    assert (module.kind, module.scaling, module.rank) == (other.kind, other.scaling, other.rank)
    assert module.scale == pytest.approx(other.scale, rel=1e-15)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_modules_make_the_tree_again(fields):
  base = params()
  tree = adapted(base, **fields)
  assert_equal(there_and_back(tree, base, axes=AXES), tree)


@pytest.mark.parametrize("fields", FIELDS, ids=str)
def test_modules_are_what_a_folder_holds(fields, tmp_path):
  tree = adapted(params(), **fields)
  adapter = peft.to_modules(tree)
  peft.save(tmp_path / "saved", tree)
  assert_same_adapter(read(tmp_path / "saved"), adapter)
  write(tmp_path / "written", adapter)
  for name in ("adapter_config.json", "adapter_model.safetensors"):
    assert (tmp_path / "written" / name).read_bytes() == (tmp_path / "saved" / name).read_bytes()


def test_dora_and_scanned_layers_make_the_tree_again():
  base = {"layers": {"q": {"kernel": normal(3, 8, 6)}}, "conv": {"kernel": normal(3, 2, 4, 5)}}
  tree = adapted(base, axes={"layers/.*": "sio", "conv/.*": "iiio"}, variant="dora", rank=3, alpha=5)
  again = there_and_back(tree, base)
  assert jax.tree.structure(again) == jax.tree.structure(tree)
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), again, tree)


@pytest.mark.parametrize("fields", [{"variant": "loha"}, {"init": "pissa"}], ids=str)
def test_other_variants_are_modules_of_their_effective_factors(fields):
  base = {"layers_0": {"q": {"kernel": normal(8, 6)}}}
  tree = adapted(base, **fields)
  again = there_and_back(tree, base)["layers_0"]["q"]["kernel"]
  node = tree["layers_0"]["q"]["kernel"]
  assert again.variant == "lora"
  assert again.rank > node.rank
  np.testing.assert_allclose(again.delta(), node.delta(), rtol=1e-5, atol=1e-6)


def test_names_and_axes_are_taken_both_ways():
  base = {"tower": {"w": {"kernel": normal(2, 3, 8, 6)}}, "square": {"kernel": normal(8, 8)}}
  names, axes = {"tower/w": "deep.{0}.expert.{1}.w"}, {"square/kernel": "oi", "tower/.*": "ssio"}
  tree = adapted(base, axes=axes)
  modules = peft.to_modules(tree, names=names).modules
  assert modules.keys() == {f"deep.{k}.expert.{n}.w" for k in range(2) for n in range(3)} | {"square"}
  assert_equal(there_and_back(tree, base, names=names, axes={"square/kernel": "oi"}), tree)
  apply = lambda p: (p["square"]["kernel"] @ jnp.ones(8), jnp.ones(8) @ p["tower"]["w"]["kernel"][0, 0])
  assert_equal(there_and_back(tree, base, names=names, probe=apply)["square"], tree["square"])


def test_modules_are_merged_one_by_one():
  tree = adapted(targets="(head|conv)/kernel|embed/embedding", train="head/bias", axes=AXES)
  adapter, whole = peft.to_modules(tree), jaxlora.merge(tree)
  head, conv = (np.asarray(tree[name]["kernel"].base) for name in ("head", "conv"))
  base = {"head.weight": head.T, "conv.weight": conv.transpose(3, 2, 0, 1), "head.bias": np.zeros(7, np.float32)}
  with no_disk():
    merged = {name: adapter.merged(name, tensor) for name, tensor in base.items()}
  close = lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6)
  close(merged["head.weight"], whole["head"]["kernel"].T)
  close(merged["conv.weight"], whole["conv"]["kernel"].transpose(3, 2, 0, 1))
  close(merged["head.bias"], whole["head"]["bias"])


def test_a_module_knows_the_shape_of_its_weight():
  tree = adapted(targets=r".*/(kernel|embedding)")
  for module in peft.to_modules(tree).modules.values():
    assert module.shape == module.delta().shape


def test_keys_make_the_adapter_again():
  """Base weights beside adapted modules, too, which PEFT writes with resized embeddings."""
  adapter = peft.to_modules(adapted(targets="embed/embedding", train="head/.*"))
  adapter.bases["embed.weight"] = RANDOM.normal(size=(11, 8)).astype("float32")
  problems = []
  again = adapter_of(state_of(adapter), adapter.config, problems)
  assert not problems
  assert "base_model.model.embed.base_layer.weight" in state_of(adapter)
  assert_same_adapter(again, adapter)
  assert again.bases.keys() == adapter.bases.keys()


def aligned_ones(*shape):
  """Ones at an address that JAX, where it may, takes over without a copy."""
  size = 4 * int(np.prod(shape))
  buffer = np.empty(size + 128, np.uint8)
  start = -buffer.ctypes.data % 128
  array = buffer[start : start + size].view(np.float32).reshape(shape)
  array[:] = 1
  return array


def test_an_adapter_of_ones_own_is_copied():
  a, b = aligned_ones(2, 8), aligned_ones(7, 2)
  adapter = peft.Adapter({"head": peft.Module("head", "linear", a, b, alpha=1.0)}, {"head.bias": np.ones(7)}, {}, {})
  tree = peft.from_modules(adapter, params())
  a[:], b[:], adapter.whole["head.bias"][:] = 5, 5, 5
  assert (tree["head"]["kernel"].a == 1).all()
  assert (tree["head"]["kernel"].b == 1).all()
  assert (tree["head"]["bias"].value == 1).all()


def test_errors_name_the_function():
  with pytest.raises(ValueError, match=r"^to_modules: the tree has no adapted leaf"):
    peft.to_modules(params())
  with pytest.raises(ValueError, match=r"^to_modules: head/kernel: a, b missing"):
    peft.to_modules(jaxlora.split(adapted(targets="head/kernel"))[0])
  with pytest.raises(ValueError, match=r"^from_modules: head/kernel is adapted already"):
    peft.from_modules(peft.to_modules(adapted(targets="head/kernel")), adapted(targets="head/kernel"))
  tree = jax.tree.map(lambda x: x * jnp.nan, adapted(targets="head/kernel"))
  with pytest.raises(peft.PeftError, match=r"^to_modules: 2 problem.*\n.*head.lora_A.weight: holds NaN"):
    peft.to_modules(tree)
  adapter = peft.to_modules(adapted(targets="head/kernel"))
  with pytest.raises(peft.PeftError, match=r"^from_modules: 1 problem.*\n.*head.weight: no leaf of the tree"):
    peft.from_modules(adapter, {"other": params()["head"]["bias"]})


def test_layers_of_which_some_are_dora_are_refused():
  tree = adapted({"layers": {"q": {"kernel": normal(2, 8, 6)}}}, axes={".*": "sio"}, variant="dora")
  adapter = peft.to_modules(tree)
  name = "model.layers.1.q"
  module = adapter.modules[name]
  adapter.modules[name] = peft.Module(name, "linear", module.a, module.b, module.alpha)
  with pytest.raises(peft.PeftError, match="some of its layers have a magnitude"):
    peft.from_modules(adapter, jaxlora.strip(tree))


def test_a_gain_that_peft_does_not_have_is_refused(monkeypatch):
  """DoRA's own is the one gain of PEFT's: any other would be left out without a word."""
  tree = adapted(targets="head/kernel", variant="dora")
  monkeypatch.setitem(VARIANTS, "other", VARIANTS["dora"])
  node = tree["head"]["kernel"]
  tree["head"]["kernel"] = jaxlora.LoraWeight(
    node.base, node.a, node.b, rank=node.rank, alpha=node.alpha, variant="other", extra=node.extra
  )
  with pytest.raises(peft.PeftError, match="head/kernel: PEFT has no variant 'other'"):
    peft.to_modules(tree)
