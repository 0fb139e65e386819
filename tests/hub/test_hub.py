"""Base weights from files into trees and back: names, layouts, parts, stacks; and everything that does not fit."""

import json
import re
import tracemalloc

from flax import nnx
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import ml_dtypes
import numpy as np
import pytest

import jaxlora
from jaxlora import hub
from jaxlora.peft import Joined, Split

pytest.importorskip("safetensors", reason="models' files need jaxlora[peft]")
from safetensors.numpy import load_file, save_file

LAYERS, WIDTH, OUT, VOCABULARY = 3, 6, 4, 11


def random(*shape, dtype=np.float32):
  return np.random.default_rng(sum(shape)).normal(size=shape).astype(dtype)


def torch_model() -> dict[str, np.ndarray]:
  """A model with torch's names and layouts."""
  tensors = {"model.embed_tokens.weight": random(VOCABULARY, WIDTH), "model.norm.weight": random(WIDTH)}
  for k in range(LAYERS):
    tensors |= {
      f"model.layers.{k}.self_attn.q_proj.weight": random(OUT, WIDTH) + k,
      f"model.layers.{k}.self_attn.q_proj.bias": random(OUT) + k,
      f"model.layers.{k}.input_layernorm.weight": random(WIDTH) + k,
    }
  return tensors


def shape(*sizes, dtype=jnp.float32):
  return jax.ShapeDtypeStruct(sizes, dtype)


SCANNED = {
  "embed_tokens": {"embedding": shape(VOCABULARY, WIDTH)},
  "layers": {
    "self_attn": {"q_proj": {"kernel": shape(LAYERS, WIDTH, OUT), "bias": shape(LAYERS, OUT)}},
    "input_layernorm": {"scale": shape(LAYERS, WIDTH)},
  },
  "norm": {"scale": shape(WIDTH)},
}


def unrolled():
  layer = lambda: {
    "self_attn": {"q_proj": {"kernel": shape(WIDTH, OUT), "bias": shape(OUT)}},
    "input_layernorm": {"scale": shape(WIDTH)},
  }
  return {
    "params": {"model": {f"layers_{k}": layer() for k in range(LAYERS)}}
    | {"embed_tokens": SCANNED["embed_tokens"], "norm": SCANNED["norm"]}
  }


@pytest.fixture
def folder(tmp_path):
  save_file(torch_model(), tmp_path / "model.safetensors")
  return tmp_path


def test_a_scanned_tree_and_an_unrolled_one(folder):
  theirs = torch_model()
  ours = hub.load(folder, SCANNED)
  layers = ours["layers"]["self_attn"]["q_proj"]
  for k in range(LAYERS):
    np.testing.assert_array_equal(layers["kernel"][k], theirs[f"model.layers.{k}.self_attn.q_proj.weight"].T)
    np.testing.assert_array_equal(layers["bias"][k], theirs[f"model.layers.{k}.self_attn.q_proj.bias"])
  np.testing.assert_array_equal(ours["embed_tokens"]["embedding"], theirs["model.embed_tokens.weight"])
  names = {"params/(embed_tokens|norm)": r"model.\1"}
  apart = hub.load(folder / "model.safetensors", unrolled(), names=names)["params"]["model"]
  np.testing.assert_array_equal(apart["layers_1"]["self_attn"]["q_proj"]["kernel"], layers["kernel"][1])
  np.testing.assert_array_equal(
    apart["layers_2"]["input_layernorm"]["scale"], ours["layers"]["input_layernorm"]["scale"][2]
  )


def test_back_in_several_files_with_what_lies_beside(folder):
  (folder / "config.json").write_text(json.dumps({"torch_dtype": "float32", "hidden_size": WIDTH}))
  (folder / "tokenizer.json").write_text("{}")
  (folder / "pytorch_model.bin").write_bytes(b"old")
  params = hub.load(folder, SCANNED)
  files = hub.save(folder / "out", params, beside=folder, shard_bytes=300)
  shards = [name for name in files if name.endswith(".safetensors")]
  assert {*files} - {*shards} == {"config.json", "tokenizer.json", "model.safetensors.index.json"}
  assert len(shards) > 1
  index = json.loads((folder / "out" / "model.safetensors.index.json").read_text())["weight_map"]
  found = {name: load_file(folder / "out" / file)[name] for name, file in index.items()}
  jax.tree.map(np.testing.assert_array_equal, found, torch_model())
  jax.tree.map(np.testing.assert_array_equal, hub.load(folder / "out", SCANNED), params)
  hub.save(
    folder / "half", jaxlora.quantize(params, "int8", axes={".*/kernel": "sio"}), dtype="bfloat16", beside=folder
  )
  assert json.loads((folder / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
  assert load_file(folder / "half" / "model.safetensors")["model.norm.weight"].dtype == ml_dtypes.bfloat16
  with pytest.raises(hub.HubError, match=r"out: is there already\. Name another folder"):
    hub.save(folder / "out", params)
  with pytest.raises(hub.HubError, match=r"is adapted\. Merge it first \(jaxlora\.merge\)"):
    hub.save(folder / "new", jaxlora.adapt(params, jaxlora.LoraConfig(rank=1, axes={".*": "sio"}), jax.random.key(0)))
  with pytest.raises(hub.HubError, match=r"beside=.*is no folder"):
    hub.save(folder / "new", params, beside=folder / "nowhere")
  assert not (folder / "new").exists()


def peak(call):
  """The most bytes of NumPy's and Python's that a second call has at a time."""
  call("warm")
  tracemalloc.start()
  try:
    call("measured")
    return tracemalloc.get_traced_memory()[1]
  finally:
    tracemalloc.stop()


def test_one_layer_is_in_memory_at_a_time(tmp_path):
  """Saved by layers, plain, cast, of codes and cut into parts; and a leaf of parts is read by layers."""
  layers, layer = 24, 64 * 512 * 4
  kernel = jnp.asarray(random(layers, 64, 512))
  names = {"layers/wi": Split(("model.layers.{}.up", "model.layers.{}.gate"), sizes=(1, 1))}
  for case, leaf, dtype in (
    ("plain", kernel, None),
    ("cast", kernel, "bfloat16"),
    ("codes", jaxlora.quantize({"wi": {"kernel": kernel}}, "int8", axes={".*": "sio"})["wi"]["kernel"], None),
  ):
    params = {"layers": {"wi": {"kernel": leaf}}}
    save = lambda name, params=params, dtype=dtype, case=case: hub.save(
      tmp_path / f"{case} {name}", params, names=names, axes={".*": "sio"}, dtype=dtype, shard_bytes=layers * layer // 3
    )
    assert peak(save) < 6 * layer, case
  read = lambda _: hub.load(
    tmp_path / "plain warm", {"layers": {"wi": {"kernel": shape(*kernel.shape)}}}, names=names, axes={".*": "sio"}
  )
  assert peak(read) < (layers + 6) * layer
  np.testing.assert_array_equal(read(0)["layers"]["wi"]["kernel"], kernel)


def test_two_leaves_of_one_name_are_an_error(tmp_path):
  params = {"a": {"kernel": jnp.ones((3, 2))}, "b": {"kernel": jnp.zeros((3, 2))}}
  with pytest.raises(hub.HubError, match=r"one\.weight: several leaves have this name, b/kernel among them"):
    hub.save(tmp_path / "out", params, names={"[ab]": "one"})
  with pytest.raises(hub.HubError, match=r"a/kernel: is a shape without values"):
    hub.save(tmp_path / "out", {"a": {"kernel": shape(3, 2)}})
  assert not list(tmp_path.iterdir())


def test_dtypes_and_shardings(folder):
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
  split = jax.tree.map(lambda leaf: NamedSharding(mesh, PartitionSpec()), SCANNED)
  split["embed_tokens"]["embedding"] = NamedSharding(mesh, PartitionSpec(None, "x"))
  params = hub.load(folder, SCANNED, dtype=jnp.bfloat16, shardings=split)
  table = params["embed_tokens"]["embedding"]
  assert (table.dtype, table.sharding) == (jnp.bfloat16, split["embed_tokens"]["embedding"])
  assert {part.data.shape for part in table.addressable_shards} == {(VOCABULARY, WIDTH // 2)}
  np.testing.assert_array_equal(table, torch_model()["model.embed_tokens.weight"].astype(ml_dtypes.bfloat16))
  with pytest.raises(hub.HubError, match=r"shardings has 1 leaves, and the tree 5; expected one for each"):
    hub.load(folder, SCANNED, shardings={"a": split["norm"]["scale"]})


def test_modules_of_nnx_with_keys_of_their_own(folder):
  class Model(nnx.Module):
    def __init__(self, rngs):
      self.embed_tokens = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
      self.drop = nnx.Dropout(0.1, rngs=rngs)
      self.norm = nnx.RMSNorm(WIDTH, rngs=rngs)

  module = hub.load(folder, Model(nnx.Rngs(0)), ignore=r"model\.layers\..*")
  assert isinstance(module, Model)
  np.testing.assert_array_equal(module.norm.scale[...], torch_model()["model.norm.weight"])
  hub.save(folder / "out", module)
  assert {*load_file(folder / "out" / "model.safetensors")} == {"model.embed_tokens.weight", "model.norm.weight"}


def test_convolutions_tokens_and_parts(tmp_path):
  """A fused projection for three leaves, two projections for one, a convolution, a class token."""
  tensors = {"attn.qkv.weight": random(9, 5), "up.weight": random(4, 5), "gate.weight": random(3, 5)}
  tensors |= {"embeddings.conv.weight": random(7, 2, 3, 5), "embeddings.cls_token": random(1, 1, 6)}
  save_file(tensors, tmp_path / "model.safetensors")
  like = {
    "attn": {name: {"kernel": shape(5, 3)} for name in ("query", "key", "value")},
    "wi": {"kernel": shape(5, 7)},
    "embeddings": {"conv": {"kernel": shape(3, 5, 2, 7)}, "cls_token": shape(1, 1, 6)},
  }
  names = {"attn/.*": Joined("attn.qkv", ("query", "key", "value")), "wi": Split(("up", "gate"), sizes=(4, 3))}
  params = hub.load(tmp_path, like, names=names)
  q, k, v = (np.asarray(params["attn"][name]["kernel"]).T for name in ("query", "key", "value"))
  np.testing.assert_array_equal(np.concatenate([q, k, v]), tensors["attn.qkv.weight"])
  np.testing.assert_array_equal(
    np.asarray(params["wi"]["kernel"]).T, np.concatenate([tensors["up.weight"], tensors["gate.weight"]])
  )
  x = random(1, 8, 8, 2)
  ours = nn.Conv(7, (3, 5), use_bias=False, padding="VALID").apply({"params": params["embeddings"]["conv"]}, x)
  theirs = jax.lax.conv_general_dilated(
    x, tensors["embeddings.conv.weight"], (1, 1), "VALID", dimension_numbers=("NHWC", "OIHW", "NHWC")
  )
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
  hub.save(tmp_path / "out", params, names=names)
  jax.tree.map(np.testing.assert_array_equal, load_file(tmp_path / "out" / "model.safetensors"), tensors)


def test_tied_heads(folder):
  """A head that the file leaves out as it is the embedding; and one that it holds though the tree has none."""
  like = SCANNED | {"lm_head": {"kernel": shape(WIDTH, VOCABULARY)}}
  with pytest.raises(hub.HubError, match="lm_head/kernel: no tensor of the model is called so"):
    hub.load(folder, like)
  (folder / "config.json").write_text(json.dumps({"tie_word_embeddings": True}))
  head = hub.load(folder, like)["lm_head"]["kernel"]
  np.testing.assert_array_equal(head.T, torch_model()["model.embed_tokens.weight"])
  both = torch_model() | {"lm_head.weight": torch_model()["model.embed_tokens.weight"]}
  save_file(both, folder / "model.safetensors")
  hub.load(folder, SCANNED)
  save_file(both | {"lm_head.weight": both["lm_head.weight"] + 1}, folder / "model.safetensors")
  with pytest.raises(hub.HubError, match=r"lm_head\.weight: no leaf of the tree is called so"):
    hub.load(folder, SCANNED)


def test_one_error_lists_all_that_does_not_fit(folder):
  tensors = torch_model()
  tensors["model.norm.weight"] = random(WIDTH + 1)
  tensors["model.layers.0.extra.weight"] = random(2, 2)
  del tensors["model.layers.1.self_attn.q_proj.bias"], tensors["model.embed_tokens.weight"]
  tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = random(3)  # a buffer
  save_file(tensors, folder / "model.safetensors")
  with pytest.raises(hub.HubError) as error:
    hub.load(folder, SCANNED)
  for text in (
    "4 problem(s)",
    "model.layers.0.extra.weight: no leaf of the tree is called so",
    "embed_tokens/embedding: no tensor of the model is called so",
    "layers/self_attn/q_proj/bias: has layers [3], and the model has no tensors for (1,)",
    "norm/scale: model.norm.weight has shape (7,), which does not fit a leaf of shape (6,)",
  ):
    assert text in str(error.value)


@pytest.mark.parametrize(
  ("name", "content", "message"),
  [
    ("pytorch_model.bin", b"", r"found pytorch_model\.bin, expected safetensors: reading a pickle runs what it holds"),
    ("model.gguf", b"GGUF", r"model\.gguf: cannot be read as GGUF"),
    ("model.safetensors", b"\x10", r"model\.safetensors: cannot be read as safetensors"),
    ("config.json", b"{}", r"expected model\.safetensors, model\.safetensors\.index\.json or one"),
  ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
  if name.endswith("gguf"):
    pytest.importorskip("gguf")
  (tmp_path / name).write_bytes(content)
  with pytest.raises(hub.HubError, match=message):
    hub.load(tmp_path, SCANNED)


def test_files_that_end_too_early(tmp_path):
  """A shard cut in its tensors, one that is not there, and a GGUF file cut in its tensors."""
  save_file(torch_model(), tmp_path / "model.safetensors")
  params = hub.load(tmp_path, SCANNED)
  shards = [name for name in hub.save(tmp_path / "cut", params, shard_bytes=300) if name.endswith(".safetensors")]
  last = tmp_path / "cut" / shards[-1]
  last.write_bytes(last.read_bytes()[:-8])
  with pytest.raises(hub.HubError, match=rf"{shards[-1]}: cannot be read as safetensors"):
    hub.load(tmp_path / "cut", SCANNED)
  last.unlink()
  with pytest.raises(hub.HubError, match=re.escape(shards[-1])):
    hub.load(tmp_path / "cut", SCANNED)
  gguf = pytest.importorskip("gguf")
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  writer.add_tensor("output_norm.weight", random(WIDTH))
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  data = (tmp_path / "m.gguf").read_bytes()
  hub.load(tmp_path / "m.gguf", {"norm": SCANNED["norm"]})
  (tmp_path / "m.gguf").write_bytes(data[:-16])
  with pytest.raises(hub.HubError, match=r"m\.gguf: cannot be read as GGUF: .*Download it anew"):
    hub.load(tmp_path / "m.gguf", {"norm": SCANNED["norm"]})


def test_quantised_weights_become_floats_and_unknown_codes_are_refused(tmp_path):
  codes, scale = np.arange(12, dtype=np.int8).reshape(3, 4), random(3, 1)
  save_file({"mlp.weight": codes, "mlp.weight_scale": scale}, tmp_path / "model.safetensors")
  params = hub.load(tmp_path, {"mlp": {"kernel": shape(4, 3)}})
  np.testing.assert_allclose(params["mlp"]["kernel"].T, codes * scale, rtol=1e-6)
  save_file({"mlp.weight": codes}, tmp_path / "model.safetensors")
  with pytest.raises(hub.HubError, match=r"mlp\.weight: quantised, in I8 without known scales"):
    hub.load(tmp_path, {"mlp": {"kernel": shape(4, 3)}})


def test_gguf_files(tmp_path):
  """Against the converter's own permutation, and the values of the file's codes."""
  gguf = pytest.importorskip("gguf")
  heads, width = 2, 32
  rows, codes = random(heads * 8, width), random(VOCABULARY, width)
  writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
  writer.add_uint32("llama.attention.head_count", heads)
  for name in ("attn_q", "attn_k"):
    writer.add_tensor(f"blk.0.{name}.weight", rows.reshape(heads, 2, 4, width).swapaxes(1, 2).reshape(rows.shape))
  writer.add_tensor("blk.0.attn_v.weight", rows)
  packed = gguf.quantize(codes, gguf.GGMLQuantizationType.Q8_0)
  writer.add_tensor("token_embd.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
  for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    write()
  projections = {name: {"kernel": shape(width, heads * 8)} for name in ("q_proj", "k_proj", "v_proj")}
  like = {
    "layers_0": {"self_attn": projections},
    "embed_tokens": {"embedding": shape(VOCABULARY, width)},
    "lm_head": {"kernel": shape(width, VOCABULARY)},
  }
  params = hub.load(tmp_path, like)
  for leaf in jax.tree.leaves(params["layers_0"]):
    np.testing.assert_array_equal(leaf.T, rows)
  np.testing.assert_array_equal(params["lm_head"]["kernel"].T, gguf.dequantize(packed, gguf.GGMLQuantizationType.Q8_0))
  (tmp_path / "m.gguf").rename(tmp_path / "other.gguf")
  data = (tmp_path / "other.gguf").read_bytes().replace(b"llama", b"mamba")
  (tmp_path / "other.gguf").write_bytes(data)
  with pytest.raises(hub.HubError, match=re.escape("found the architecture 'mamba', expected one of 'llama'")):
    hub.load(tmp_path, like)
