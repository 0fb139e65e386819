"""Families of models in miniature: their configurations in transformers, and the trees that JAX's libraries have."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from tests.hub.decoder import Kind

LAYERS, WIDTH, HEADS, KV_HEADS, SIZE, INNER, VOCABULARY, WINDOW = 2, 32, 4, 2, 8, 48, 40, 4
SMALL = {
  "hidden_size": WIDTH,
  "intermediate_size": INNER,
  "num_hidden_layers": LAYERS,
  "num_attention_heads": HEADS,
  "num_key_value_heads": KV_HEADS,
  "vocab_size": VOCABULARY,
  "max_position_embeddings": 32,
}
GEMMA = SMALL | {
  "head_dim": SIZE,
  "query_pre_attn_scalar": 16,
  "sliding_window": WINDOW,
  "layer_types": ["sliding_attention", "full_attention"],
}


@dataclasses.dataclass(frozen=True)
class Family:
  """A family.

  Attributes:
    library: whose tree it is.
    config: the class of its configuration in transformers, and what that is made with.
    kind: what its decoder does.
    norms: has norms of queries and keys.
    biases: of queries, keys and values.
    gate: the axes of Gemma's gate behind the first.
    scanned: has its layers stacked, along axis 1 as MaxText does.
  """

  library: str
  config: tuple[str, dict[str, Any]]
  kind: Kind
  norms: bool = False
  biases: bool = False
  gate: tuple[int, int] = (INNER, WIDTH)
  scanned: bool = False


_ALL = (None,) * LAYERS
_GEMMA = {
  "scale": 16**-0.5,
  "plus": 1.0,
  "act": lambda x: jax.nn.gelu(x, approximate=True),
  "embedding": WIDTH**0.5,
  "window": (WINDOW, None),
}
_MAXTEXT = Kind((10_000.0,) * 2, _ALL, 1.0, neighbours=True)  # its queries are scaled in their kernel
FAMILIES = {
  "Llama": Family("maxtext", ("LlamaConfig", SMALL), _MAXTEXT, scanned=True),
  "Mistral": Family("maxtext", ("MistralConfig", SMALL | {"sliding_window": None}), _MAXTEXT),
  "Qwen2": Family("tunix", ("Qwen2Config", SMALL), Kind((10_000.0,) * 2, _ALL, SIZE**-0.5), biases=True),
  "Qwen3": Family(
    "tunix", ("Qwen3Config", SMALL | {"head_dim": SIZE}), Kind((10_000.0,) * 2, _ALL, SIZE**-0.5), norms=True
  ),
  "Gemma2": Family(
    "gemma",
    ("Gemma2Config", GEMMA | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}),
    Kind((10_000.0,) * 2, cap=50.0, final_cap=30.0, **_GEMMA),
    gate=(WIDTH, INNER),
  ),
  "Gemma3": Family(
    "gemma",
    ("Gemma3TextConfig", GEMMA | {"rope_theta": 1e6, "rope_local_base_freq": 1e4}),
    Kind((1e4, 1e6), **_GEMMA),
    norms=True,
  ),
}


def _shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def like_of(name):
  """The tree of a family: paths and shapes."""
  family = FAMILIES[name]
  return {"tunix": _like_tunix, "gemma": _like_gemma, "maxtext": _like_maxtext}[family.library](family)


def _like_tunix(family):
  attention = {
    "q_proj": {"w": _shape(WIDTH, HEADS, SIZE)},
    "k_proj": {"w": _shape(WIDTH, KV_HEADS, SIZE)},
    "v_proj": {"w": _shape(WIDTH, KV_HEADS, SIZE)},
    "o_proj": {"w": _shape(HEADS, SIZE, WIDTH)},
  }
  if family.norms:
    attention |= {"q_norm": {"w": _shape(SIZE)}, "k_norm": {"w": _shape(SIZE)}}
  if family.biases:
    attention |= {f"{name}_bias": _shape(n * SIZE) for name, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS))}
  layer = {
    "attn": attention,
    "mlp": {
      "gate_proj": {"kernel": _shape(WIDTH, INNER)},
      "up_proj": {"kernel": _shape(WIDTH, INNER)},
      "down_proj": {"kernel": _shape(INNER, WIDTH)},
    },
    "input_layernorm": {"w": _shape(WIDTH)},
    "post_attention_layernorm": {"w": _shape(WIDTH)},
  }
  return {
    "embedder": {"input_embedding": _shape(VOCABULARY, WIDTH)},
    "layers": {str(k): layer for k in range(LAYERS)},
    "final_norm": {"w": _shape(WIDTH)},
    "lm_head": {"w": _shape(WIDTH, VOCABULARY)},
  }


def _like_gemma(family):
  attention = {
    "q_einsum": {"w": _shape(HEADS, WIDTH, SIZE)},
    "kv_einsum": {"w": _shape(2, KV_HEADS, WIDTH, SIZE)},
    "attn_vec_einsum": {"w": _shape(HEADS, SIZE, WIDTH)},
  }
  if family.norms:
    attention |= {"_query_norm": {"scale": _shape(SIZE)}, "_key_norm": {"scale": _shape(SIZE)}}
  norms = ("pre_attention_norm", "post_attention_norm", "pre_ffw_norm", "post_ffw_norm")
  layer = {"attn": attention, "mlp": {"gating_einsum": _shape(2, *family.gate), "linear": _shape(INNER, WIDTH)}}
  layer |= {norm: {"scale": _shape(WIDTH)} for norm in norms}
  return {
    "embedder": {"input_embedding": _shape(VOCABULARY, WIDTH)},
    "final_norm": {"scale": _shape(WIDTH)},
  } | {f"layer_{k}": layer for k in range(LAYERS)}


def _like_maxtext(family):
  layer = {
    "self_attention": {
      "query": {"kernel": _shape(WIDTH, HEADS, SIZE)},
      "key": {"kernel": _shape(WIDTH, KV_HEADS, SIZE)},
      "value": {"kernel": _shape(WIDTH, KV_HEADS, SIZE)},
      "out": {"kernel": _shape(HEADS, SIZE, WIDTH)},
    },
    "mlp": {
      "wi_0": {"kernel": _shape(WIDTH, INNER)},
      "wi_1": {"kernel": _shape(WIDTH, INNER)},
      "wo": {"kernel": _shape(INNER, WIDTH)},
    },
    "pre_self_attention_layer_norm": {"scale": _shape(WIDTH)},
    "post_self_attention_layer_norm": {"scale": _shape(WIDTH)},
  }
  layers = {f"layers_{k}": layer for k in range(LAYERS)}
  if family.scanned:
    layers = {"layers": jax.tree.map(lambda one: _shape(one.shape[0], LAYERS, *one.shape[1:]), layer)}
  decoder = layers | {
    "decoder_norm": {"scale": _shape(WIDTH)},
    "logits_dense": {"kernel": _shape(WIDTH, VOCABULARY)},
  }
  return {"params": {"token_embedder": {"embedding": _shape(VOCABULARY, WIDTH)}, "decoder": decoder}}


def layers_of(name, params):
  """The arguments of `decoder.logits` in the tree of a family."""
  if FAMILIES[name].library == "maxtext":
    params = params["params"]
    decoder = params["decoder"]
    if FAMILIES[name].scanned:
      layers = [jax.tree.map(lambda leaf, k=k: leaf[:, k], decoder["layers"]) for k in range(LAYERS)]
    else:
      layers = [decoder[f"layers_{k}"] for k in range(LAYERS)]
    final, head = decoder["decoder_norm"]["scale"], decoder["logits_dense"]["kernel"]
    return params["token_embedder"]["embedding"], [*map(_layer_of_maxtext, layers)], final, head
  if FAMILIES[name].library == "tunix":
    layers = [_layer_of_tunix(params["layers"][str(k)]) for k in range(LAYERS)]
    return params["embedder"]["input_embedding"], layers, params["final_norm"]["w"], params["lm_head"]["w"]
  layers = [_layer_of_gemma(params[f"layer_{k}"], FAMILIES[name].gate) for k in range(LAYERS)]
  return params["embedder"]["input_embedding"], layers, params["final_norm"]["scale"], None


def _layer_of_maxtext(layer):
  attention, mlp = layer["self_attention"], layer["mlp"]
  found = {
    short: attention[name]["kernel"] for short, name in zip("qkvo", ("query", "key", "value", "out"), strict=True)
  }
  found |= {short: mlp[name]["kernel"] for short, name in (("gate", "wi_0"), ("up", "wi_1"), ("down", "wo"))}
  norms = {"pre": "pre_self_attention_layer_norm", "pre_mlp": "post_self_attention_layer_norm"}
  return found | {short: layer[name]["scale"] for short, name in norms.items()}


def _layer_of_tunix(layer):
  attention, mlp = layer["attn"], layer["mlp"]
  found = {name: attention[f"{name}_proj"]["w"] for name in "qkvo"}
  found |= {f"{name}_norm": attention[f"{name}_norm"]["w"] for name in "qk" if f"{name}_norm" in attention}
  found |= {
    f"{name}_bias": attention[f"{name}_bias"].reshape(-1, SIZE) for name in "qkv" if f"{name}_bias" in attention
  }
  found |= {name: mlp[f"{name}_proj"]["kernel"] for name in ("gate", "up", "down")}
  return found | {"pre": layer["input_layernorm"]["w"], "pre_mlp": layer["post_attention_layernorm"]["w"]}


def _layer_of_gemma(layer, gate):
  attention, mlp = layer["attn"], layer["mlp"]
  k, v = attention["kv_einsum"]["w"]
  found = {"q": attention["q_einsum"]["w"], "k": k, "v": v}
  found = {name: value.transpose(1, 0, 2) for name, value in found.items()} | {"o": attention["attn_vec_einsum"]["w"]}
  found |= {f"{short}_norm": attention[f"_{name}_norm"]["scale"] for short, name in (("q", "query"), ("k", "key"))
            if f"_{name}_norm" in attention}  # fmt: skip
  sides = mlp["gating_einsum"] if gate == (WIDTH, INNER) else mlp["gating_einsum"].transpose(0, 2, 1)
  norms = {"pre": "pre_attention_norm", "post": "post_attention_norm", "pre_mlp": "pre_ffw_norm"}
  norms |= {"post_mlp": "post_ffw_norm"}
  found |= {short: layer[name]["scale"] for short, name in norms.items()}
  return found | {"gate": sides[0], "up": sides[1], "down": mlp["linear"]}


def tensors_of(name):
  """Tensors with the names and shapes that the Hub's files of a family have."""
  family, generator = FAMILIES[name], np.random.default_rng(0)
  normal = lambda *shape: generator.normal(size=shape).astype(np.float32)
  found = {"model.embed_tokens.weight": normal(VOCABULARY, WIDTH), "model.norm.weight": normal(WIDTH)}
  norms = ["input_layernorm", "post_attention_layernorm"]
  if family.library == "gemma":
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
  else:
    found["lm_head.weight"] = normal(VOCABULARY, WIDTH)
  for k in range(LAYERS):
    stem = f"model.layers.{k}."
    for part, n in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
      found[f"{stem}self_attn.{part}_proj.weight"] = normal(n * SIZE, WIDTH)
      if family.biases:
        found[f"{stem}self_attn.{part}_proj.bias"] = normal(n * SIZE)
      if family.norms and part != "v":
        found[f"{stem}self_attn.{part}_norm.weight"] = normal(SIZE)
    found[f"{stem}self_attn.o_proj.weight"] = normal(WIDTH, HEADS * SIZE)
    found |= {f"{stem}{norm}.weight": normal(WIDTH) for norm in norms}
    found |= {f"{stem}mlp.{side}_proj.weight": normal(INNER, WIDTH) for side in ("gate", "up")}
    found[f"{stem}mlp.down_proj.weight"] = normal(WIDTH, INNER)
  return found
