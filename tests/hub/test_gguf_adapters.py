"""Adapters in llama.cpp's files: names, permuted rows, one alpha; against NumPy, and there and back."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxlora
from jaxlora import checkpoint, hub, peft

gguf = pytest.importorskip("gguf", reason="GGUF files need jaxlora[gguf]")

HEADS, KV_HEADS, WIDTH, LAYERS = 4, 2, 16, 2
NAMES = {"attn_q": WIDTH, "attn_k": WIDTH // 2, "attn_v": WIDTH // 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
  """A file of a model, and its tree with scanned layers."""
  path = tmp_path_factory.mktemp("base") / "model.gguf"
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_uint32("llama.attention.head_count", HEADS)
  writer.add_uint32("llama.attention.head_count_kv", KV_HEADS)
  generator = np.random.default_rng(0)
  for k in range(LAYERS):
    for name, out in NAMES.items():
      writer.add_tensor(f"blk.{k}.{name}.weight", generator.normal(size=(out, WIDTH)).astype(np.float32))
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  shapes = {f"{name}_proj": (LAYERS, WIDTH, NAMES[f"attn_{name}"]) for name in "qkv"}
  like = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
  return path, hub.load(path, {"layers": {"self_attn": like}})


def adapted(params, **fields):
  config = {"rank": 3, "alpha": 6, "axes": {".*": "sio"}, "overrides": {".*/k_proj/.*": {"rank": 2, "alpha": 1}}}
  tree = jaxlora.adapt(params, jaxlora.LoraConfig(**config | fields), jax.random.key(0))
  frozen, trainable = jaxlora.split(tree)
  moved = jax.tree.map(lambda x: x + np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32), trainable)
  return jaxlora.join(frozen, moved)


def tensors_of(path):
  return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def test_merged_by_llama_cpps_rule_it_is_the_merged_model(base, tmp_path):
  """W' = W + alpha / rank * B A of the file's own tensors, which `load` then reads as the base's."""
  path, params = base
  tree = adapted(params, scaling="rslora")
  hub.save_gguf_adapter(tmp_path / "a.gguf", tree, base=path)
  reader = gguf.GGUFReader(tmp_path / "a.gguf")
  about = {name: field.contents() for name, field in reader.fields.items()}
  assert (about["general.type"], about["adapter.type"], about["adapter.lora.alpha"]) == ("adapter", "lora", 6.0)
  factors, weights = tensors_of(tmp_path / "a.gguf"), tensors_of(path)
  assert set(factors) == {f"{name}.lora_{part}" for name in weights for part in "ab"}
  writer = gguf.GGUFWriter(tmp_path / "merged.gguf", "llama")
  writer.add_uint32("llama.attention.head_count", HEADS)
  writer.add_uint32("llama.attention.head_count_kv", KV_HEADS)
  for name, weight in weights.items():
    a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
    writer.add_tensor(name, weight + np.float32(6 / len(a)) * (b @ a))
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  theirs = hub.load(tmp_path / "merged.gguf", params)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), theirs, jaxlora.merge(tree))
  back = hub.load_gguf_adapter(tmp_path / "a.gguf", params, base=path)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jaxlora.merge(back), jaxlora.merge(tree)
  )


def test_the_command_line_goes_all_ways(base, tmp_path, capsys):
  pytest.importorskip("safetensors")
  from jaxlora._cli import main

  path, params = base
  tree = adapted(params)
  peft.save(tmp_path / "peft", tree)
  checkpoint.save(tmp_path / "run", tree)
  convert = lambda *words: (main(["convert", *(str(word) for word in words)]), capsys.readouterr().err)
  at = tmp_path.joinpath
  assert convert(at("peft"), at("a.gguf"), "--gguf", path)[0] == 0
  assert convert(at("run"), at("b.gguf"), "--gguf", path)[0] == 0
  jax.tree.map(np.testing.assert_array_equal, tensors_of(at("a.gguf")), tensors_of(at("b.gguf")))
  assert convert(at("a.gguf"), at("back"), "--gguf", path)[0] == 0
  again = peft.load(at("back"), params)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), jaxlora.merge(again), jaxlora.merge(tree)
  )
  for words, message in (
    ([at("peft"), at("c.gguf")], "Pass it: --gguf MODEL.gguf"),
    ([at("peft"), at("c"), "--gguf", path], "expected a name that ends in .gguf for one of FROM and TO"),
    ([at("peft"), at("c.gguf"), "--gguf", path, "--to", "peft"], "--to: says something of other formats"),
  ):
    code, said = convert(*words)
    assert (code, message in said) == (1, True), said


def test_without_the_package_its_extra_is_named(base, tmp_path, capsys, monkeypatch):
  from jaxlora._cli import main

  monkeypatch.setitem(sys.modules, "gguf", None)
  assert main(["convert", str(base[0]), str(tmp_path / "out"), "--gguf", str(base[0])]) == 2
  assert capsys.readouterr().err == "jaxlora: GGUF files need the package gguf: pip install 'jaxlora[gguf]'\n"


def test_what_the_format_has_no_place_for(base, tmp_path):
  path, params = base
  with pytest.raises(hub.HubError, match=r"self_attn\.q_proj: the format has plain factors of linear layers alone"):
    hub.save_gguf_adapter(tmp_path / "a.gguf", adapted(params, variant="dora"), base=path)
  other = {"layers_0": {"self_attn": {"o_proj": {"kernel": jnp.ones((WIDTH, WIDTH))}}}}
  tree = jaxlora.adapt(other, jaxlora.LoraConfig(rank=2), jax.random.key(0))
  with pytest.raises(
    hub.HubError, match=r"model\.layers\.0\.self_attn\.o_proj: no tensor of .*model\.gguf is called so"
  ):
    hub.save_gguf_adapter(tmp_path / "a.gguf", tree, base=path)
  assert not list(tmp_path.iterdir())
  with pytest.raises(hub.HubError, match=r"found general\.type and adapter\.type .*expected \('adapter', 'lora'\)"):
    hub.load_gguf_adapter(path, params, base=path)
