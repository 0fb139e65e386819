r"""Names and roles of other libraries' trees: what `load` and `save` need for them, as data.

Sources: Tunix's `tunix/models/*/params.py`; Gemma's `gemma/gm/nn/_modules.py` and `_layers.py`; MaxText's
`checkpoint_conversion/utils/param_mapping.py`.
"""

from collections.abc import Callable, Mapping
import dataclasses
import re
from typing import Any

from jaxlora._base.paths import flatten
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora._weight.weight import is_leaf_node
from jaxlora.hub._records import HubError
from jaxlora.peft._parts import Split
from jaxlora.peft._rows import pairs_to_halves

Shapes = Mapping[str, tuple[int, ...]]  # of a tree's leaves, by path


@dataclasses.dataclass(frozen=True)
class Preset:
  """A library's trees.

  Attributes:
    names: by the tree's shapes, as for `load`; patterns that a tree has no leaf for are left out.
    axes: the roles of a tree's leaves, in the same way.
  """

  names: Callable[[Shapes], Mapping[str, Any]]
  axes: Callable[[Shapes], Mapping[str, str]]


def preset(library: str, like: Any) -> dict[str, Any]:
  r"""The names and roles of a tree of another library: `hub.load(path, like, **hub.preset("gemma", like))`.

  `hub.save` takes them in the same way, and `jaxlora.peft`'s functions the names.

  Args:
    library: `"tunix"` (its Llama 3, Qwen 2 and Qwen 3, in NNX), `"gemma"` (Gemma 1, 2 and 3 of Google DeepMind's
      package, in Linen) or `"maxtext"` (its Llama and Mistral, in Linen, layers scanned along axis 1 or one by one;
      its queries, which attention does not scale, are torch's over the root of a head's size). The files are those of
      the Hugging Face Hub.
    like: the tree: arrays or `jax.ShapeDtypeStruct`s, the dictionary inside of `"params"` or around it.

  Returns:
    The arguments `names` and `axes`.

  Raises:
    HubError: for another library, and for a tree with leaves that the library's have not.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora.hub
    >>> like = {"layer_0": {"attn": {"q_einsum": {"w": jax.ShapeDtypeStruct((4, 16, 8), jnp.float32)}}}}
    >>> jaxlora.hub.preset("gemma", like)["axes"]
    {'(?:params/)?layer_(\\d+)/attn/q_einsum/w': 'oio'}
  """
  if library not in PRESETS:
    raise HubError(f"hub.preset: {library!r}: expected one of {', '.join(map(repr, PRESETS))}. Say names= and axes=.")
  shapes = {path: shape_of_leaf(leaf) for path, leaf in flatten(like, is_leaf=is_leaf_node)[0]}
  found = PRESETS[library]
  matched = lambda pattern: any(re.fullmatch(pattern, path) for path in shapes)
  names = {pattern: value for pattern, value in found.names(shapes).items() if matched(pattern)}
  if unknown := [path for path in shapes if not any(re.fullmatch(pattern, path) for pattern in names)]:
    raise HubError(f"hub.preset: {library}: its trees have no leaf {unknown[0]}. Say names= and axes= for this tree.")
  return {"names": names, "axes": {key: roles for key, roles in found.axes(shapes).items() if matched(key)}}


_TUNIX = r"layers/(\d+)/"
_GEMMA = r"(?:params/)?layer_(\d+)/"
_LAYER = r"model.layers.\1."


def _of_tunix(shapes: Shapes) -> dict[str, str]:
  del shapes
  return {
    _TUNIX + "attn/[qkv]_proj/w": "ioo",
    _TUNIX + "attn/o_proj/w": "iio",
    _TUNIX + "mlp/(gate|up|down)_proj/kernel": "io",
    "lm_head/w": "io",
    "embedder/input_embedding": "oi",
  }


def _of_gemma(shapes: Shapes) -> dict[str, str]:
  """Of the gate Gemma has two layouts, (2, in, hidden) and (2, hidden, in): the width tells which."""
  gates = [shape for path, shape in shapes.items() if path.endswith("mlp/gating_einsum")]
  widths = [shape[-1] for path, shape in shapes.items() if path.endswith("mlp/linear")]
  if gates and (not widths or gates[0].count(widths[0]) != 1):
    raise HubError(f"hub.preset: gemma: mlp/gating_einsum of shape {gates[0]} does not tell its layout. Say axes=.")
  return {
    _GEMMA + "attn/q_einsum/w": "oio",
    _GEMMA + "attn/(?:kv|qkv)_einsum/w": "soio",
    _GEMMA + "attn/attn_vec_einsum/w": "iio",
    _GEMMA + "mlp/gating_einsum": "soi" if gates and gates[0][-1] == widths[0] else "sio",
    _GEMMA + "mlp/linear": "io",
    "(?:params/)?embedder/input_embedding": "oi",
  }


def _split(*modules: str) -> Split:
  return Split(tuple(f"{_LAYER}{module}" for module in modules))


_TUNIX_NAMES = {
  "embedder/input_embedding": "model.embed_tokens.weight",
  _TUNIX + "attn/([qkvo])_proj/w": _LAYER + r"self_attn.\2_proj.weight",
  _TUNIX + "attn/([qkv])_bias": _LAYER + r"self_attn.\2_proj.bias",
  _TUNIX + "attn/([qk])_norm/w": _LAYER + r"self_attn.\2_norm.weight",
  _TUNIX + "mlp/(gate|up|down)_proj/kernel": _LAYER + r"mlp.\2_proj.weight",
  _TUNIX + "(input_layernorm|post_attention_layernorm)/w": _LAYER + r"\2.weight",
  "final_norm/w": "model.norm.weight",
  "lm_head/w": "lm_head.weight",
}

_GEMMA_NAMES = {
  "(?:params/)?embedder/input_embedding": "model.embed_tokens.weight",
  _GEMMA + "attn/q_einsum/w": _LAYER + "self_attn.q_proj.weight",
  _GEMMA + "attn/kv_einsum/w": _split("self_attn.k_proj", "self_attn.v_proj"),
  _GEMMA + "attn/qkv_einsum/w": _split("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
  _GEMMA + "attn/attn_vec_einsum/w": _LAYER + "self_attn.o_proj.weight",
  _GEMMA + "attn/_query_norm/scale": _LAYER + "self_attn.q_norm.weight",
  _GEMMA + "attn/_key_norm/scale": _LAYER + "self_attn.k_norm.weight",
  _GEMMA + "pre_attention_norm/scale": _LAYER + "input_layernorm.weight",
  _GEMMA + "post_attention_norm/scale": _LAYER + "post_attention_layernorm.weight",
  _GEMMA + "pre_ffw_norm/scale": _LAYER + "pre_feedforward_layernorm.weight",
  _GEMMA + "post_ffw_norm/scale": _LAYER + "post_feedforward_layernorm.weight",
  _GEMMA + "mlp/gating_einsum": _split("mlp.gate_proj", "mlp.up_proj"),
  _GEMMA + "mlp/linear": _LAYER + "mlp.down_proj.weight",
  "(?:params/)?final_norm/scale": "model.norm.weight",
}

_MAXTEXT = r"(?:params/)*"
_STACKED, _ALONE = _MAXTEXT + "decoder/layers/", _MAXTEXT + r"decoder/layers_(\d+)/"
_MAXTEXT_LAYER = {
  "mlp/wi_0/kernel": ("mlp.gate_proj.weight", "io"),
  "mlp/wi_1/kernel": ("mlp.up_proj.weight", "io"),
  "mlp/wo/kernel": ("mlp.down_proj.weight", "io"),
  "self_attention/query/kernel": ("self_attn.q_proj", "ioo"),
  "self_attention/key/kernel": ("self_attn.k_proj", "ioo"),
  "self_attention/value/kernel": ("self_attn.v_proj.weight", "ioo"),
  "self_attention/out/kernel": ("self_attn.o_proj.weight", "iio"),
  "pre_self_attention_layer_norm/scale": ("input_layernorm.weight", "o"),
  "post_self_attention_layer_norm/scale": ("post_attention_layernorm.weight", "o"),
}


def _named_by_maxtext(shapes: Shapes) -> dict[str, Any]:
  """Queries and keys rotate neighbours there, and queries come scaled."""
  sizes = {shape[-1] for path, shape in shapes.items() if path.endswith("self_attention/query/kernel")}
  if len(sizes) > 1:
    raise HubError(f"hub.preset: maxtext: heads of several sizes, {sorted(sizes)}. Say names= and axes=.")
  names: dict[str, Any] = {
    _MAXTEXT + "token_embedder/embedding": "model.embed_tokens.weight",
    _MAXTEXT + "decoder/decoder_norm/scale": "model.norm.weight",
    _MAXTEXT + "decoder/logits_dense/kernel": "lm_head.weight",
  }
  for leaf, (name, _) in _MAXTEXT_LAYER.items():
    names |= {_STACKED + leaf: f"model.layers.{{}}.{name}", _ALONE + leaf: f"{_LAYER}{name}"}
  for size in sizes:
    order = pairs_to_halves(size)
    for leaf, scale in (("query", size**-0.5), ("key", None)):
      for stem in (_STACKED, _ALONE):
        pattern = f"{stem}self_attention/{leaf}/kernel"
        names[pattern] = Split((names[pattern],), order=order, scale=scale)
  return names


def _of_maxtext(shapes: Shapes) -> dict[str, str]:
  del shapes
  stacked = {_STACKED + leaf: f"{roles[0]}s{roles[1:]}" for leaf, (_, roles) in _MAXTEXT_LAYER.items()}
  alone = {_ALONE + leaf: roles for leaf, (_, roles) in _MAXTEXT_LAYER.items() if len(roles) > 1}
  heads = {_MAXTEXT + "token_embedder/embedding": "oi", _MAXTEXT + "decoder/logits_dense/kernel": "io"}
  return stacked | alone | heads


PRESETS = {
  "tunix": Preset(lambda _: _TUNIX_NAMES, _of_tunix),
  "gemma": Preset(lambda _: _GEMMA_NAMES, _of_gemma),
  "maxtext": Preset(_named_by_maxtext, _of_maxtext),
}
