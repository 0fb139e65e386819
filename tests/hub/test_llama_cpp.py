"""A miniature GGUF file and an adapter for it in the real llama.cpp: the log-probabilities of the same model here.

Needs the package xllamacpp, in the run of the interchange: USE_TORCH=1.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

if os.environ.get("USE_TORCH") != "1":
  pytest.skip("needs llama.cpp, in the run of the interchange: USE_TORCH=1", allow_module_level=True)
xllamacpp = pytest.importorskip("xllamacpp", reason="llama.cpp, as the package xllamacpp has it")
gguf = pytest.importorskip("gguf", reason="GGUF files need jaxlora[gguf]")

import jaxlora  # noqa: E402
from jaxlora import hub  # noqa: E402
from tests.hub.decoder import Kind, logits  # noqa: E402

pytestmark = [pytest.mark.filterwarnings("default")]
WIDTH, HEADS, KV_HEADS, INNER, LAYERS, VOCABULARY = 64, 4, 2, 96, 2, 258
SIZE = WIDTH // HEADS
KIND = Kind((10_000.0,) * LAYERS, (None,) * LAYERS, SIZE**-0.5, eps=1e-5)
PROMPT = [72, 101, 40, 12, 200, 33, 7, 91, 150]
SHAPES = {
  "attn_q": (WIDTH, WIDTH),
  "attn_k": (KV_HEADS * SIZE, WIDTH),
  "attn_v": (KV_HEADS * SIZE, WIDTH),
  "attn_output": (WIDTH, WIDTH),
  "ffn_gate": (INNER, WIDTH),
  "ffn_up": (INNER, WIDTH),
  "ffn_down": (WIDTH, INNER),
}
LIKE = {
  "embed_tokens": {"embedding": (VOCABULARY, WIDTH)},
  "layers": {
    "self_attn": {
      "q_proj": {"kernel": (LAYERS, WIDTH, HEADS, SIZE)},
      "k_proj": {"kernel": (LAYERS, WIDTH, KV_HEADS, SIZE)},
      "v_proj": {"kernel": (LAYERS, WIDTH, KV_HEADS, SIZE)},
      "o_proj": {"kernel": (LAYERS, HEADS, SIZE, WIDTH)},
    },
    "mlp": {
      "gate_proj": {"kernel": (LAYERS, WIDTH, INNER)},
      "up_proj": {"kernel": (LAYERS, WIDTH, INNER)},
      "down_proj": {"kernel": (LAYERS, INNER, WIDTH)},
    },
    "input_layernorm": {"scale": (LAYERS, WIDTH)},
    "post_attention_layernorm": {"scale": (LAYERS, WIDTH)},
  },
  "norm": {"scale": (WIDTH,)},
}
AXES = {".*/[qkv]_proj/kernel": "sioo", ".*/o_proj/kernel": "siio", ".*/mlp/.*": "sio"}


def write(path):
  """A Llama whose tokens are letters: of a byte that is no character llama.cpp tells no probabilities."""
  writer = gguf.GGUFWriter(path, "llama")
  writer.add_context_length(64)
  writer.add_embedding_length(WIDTH)
  writer.add_block_count(LAYERS)
  writer.add_feed_forward_length(INNER)
  writer.add_head_count(HEADS)
  writer.add_head_count_kv(KV_HEADS)
  writer.add_layer_norm_rms_eps(KIND.eps)
  writer.add_rope_dimension_count(SIZE)
  writer.add_rope_freq_base(KIND.theta[0])
  writer.add_vocab_size(VOCABULARY)
  letters = "abcdefghijklm"
  pairs = [a + b for a in letters for b in letters][: VOCABULARY - 97]
  writer.add_tokenizer_model("gpt2")
  writer.add_tokenizer_pre("default")
  writer.add_token_list([*map(chr, range(33, 127)), *pairs, "\u010a", "\u0120", "<|end|>"])  # newline, space
  writer.add_token_types([1] * (VOCABULARY - 1) + [3])
  writer.add_token_merges(["a b"])
  writer.add_bos_token_id(VOCABULARY - 1)
  writer.add_eos_token_id(VOCABULARY - 1)
  generator = np.random.default_rng(0)
  normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
  writer.add_tensor("token_embd.weight", normal(VOCABULARY, WIDTH) / 4)
  writer.add_tensor("output_norm.weight", 1 + normal(WIDTH) / 10)
  for k in range(LAYERS):
    for name, shape in SHAPES.items():
      writer.add_tensor(f"blk.{k}.{name}.weight", normal(*shape) / np.float32(shape[1] ** 0.5))
    for name in ("attn_norm", "ffn_norm"):
      writer.add_tensor(f"blk.{k}.{name}.weight", 1 + normal(WIDTH) / 10)
  for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    step()


@jax.jit
def ours(params):
  """The log-probabilities of the next token."""
  layers, names = params["layers"], {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj"}
  of_layer = lambda k: {short: layers["self_attn"][name]["kernel"][k] for short, name in names.items()} | {
    short: layers["mlp"][f"{short}_proj"]["kernel"][k] for short in ("gate", "up", "down")
  } | {
    "pre": layers["input_layernorm"]["scale"][k],
    "pre_mlp": layers["post_attention_layernorm"]["scale"][k],
  }  # fmt: skip
  found = logits(
    params["embed_tokens"]["embedding"],
    [of_layer(k) for k in range(LAYERS)],
    params["norm"]["scale"],
    jnp.array([PROMPT]),
    KIND,
  )
  return jax.nn.log_softmax(found[0, -1])


def theirs(model, adapter=None):
  """llama.cpp's ten most probable next tokens, and their log-probabilities."""
  params = xllamacpp.CommonParams()
  params.model.path, params.n_ctx, params.n_parallel, params.warmup, params.verbosity = str(model), 64, 1, False, 0
  params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
  params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
  params.n_gpu_layers = 0
  params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
  if adapter is not None:
    lora = xllamacpp.CommonAdapterLoraInfo()
    lora.path, lora.scale = str(adapter), 1.0
    params.lora_adapters = [lora]
  server = xllamacpp.Server(params)
  said = server.handle_completions({"prompt": PROMPT, "n_predict": 1, "n_probs": 10, "temperature": 0.0})
  top = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
  return {token["id"]: token["logprob"] for token in top}


def test_llama_cpp_computes_what_we_do(tmp_path):
  write(tmp_path / "model.gguf")
  params = hub.load(tmp_path / "model.gguf", jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), LIKE, is_leaf=lambda node: isinstance(node, tuple)
  ), axes=AXES)  # fmt: skip
  config = jaxlora.LoraConfig(
    rank=4, alpha=8, axes=AXES, targets=".*_proj/kernel", overrides={".*/v_proj/.*": {"rank": 2}}
  )
  frozen, trainable = jaxlora.split(jaxlora.adapt(params, config, jax.random.key(0)))
  moved = jax.tree.map(
    lambda x: x + np.random.default_rng(x.size).normal(size=x.shape).astype(np.float32) / 8, trainable
  )
  tree = jaxlora.join(frozen, moved)
  hub.save_gguf_adapter(tmp_path / "adapter.gguf", tree, base=tmp_path / "model.gguf", axes=AXES)
  base, adapted = map(np.asarray, (ours(params), ours(jaxlora.merge(tree))))
  pairs = [
    (base, theirs(tmp_path / "model.gguf")),
    (adapted, theirs(tmp_path / "model.gguf", tmp_path / "adapter.gguf")),
  ]
  for expected, found in pairs:
    assert len(found) == 10
    assert max(found, key=found.get) == int(expected.argmax())
    assert {*found} == {*np.argsort(-expected)[:10].tolist()}
    np.testing.assert_allclose([*found.values()], expected[[*found]], atol=1e-4)
  assert np.abs(base - adapted).max() > 0.5  # the adapter tells
