"""Tokenizing, and embedding many texts in batches."""

from collections.abc import Callable, Sequence
import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from .bert import Bert, Params, normalize, pool


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
  """BERT's tokenizer by a vocab.txt, which has one word or piece a line."""
  tokenizer = Tokenizer(models.WordPiece.from_file(str(vocabulary), unk_token="[UNK]"))
  tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
  tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
  ends = [(name, tokenizer.token_to_id(name)) for name in ("[SEP]", "[CLS]")]
  if missing := [name for name, number in ends if number is None]:
    raise ValueError(f"{vocabulary} has no {' and no '.join(missing)}")
  tokenizer.post_processor = processors.BertProcessing(*ends)
  return tokenizer


def tokenize(tokenizer: Tokenizer, texts: Sequence[str], length: int) -> Tokens:
  """Texts as rows of exactly `length` tokens, truncated or padded."""
  tokenizer.enable_truncation(length)
  padding = tokenizer.token_to_id("[PAD]")
  tokenizer.enable_padding(length=length, pad_id=0 if padding is None else padding)
  encoded = tokenizer.encode_batch(list(texts))
  return Tokens(*(np.array([getattr(one, field) for one in encoded], np.int32) for field in ("ids", "attention_mask")))


def in_batches(
  fn: Callable[[Params, jax.Array, jax.Array], jax.Array], params: Params, tokens: Tokens, batch_size: int = 64
) -> np.ndarray:
  """`fn(params, ids, mask)` of many rows, in batches of one shape: the last batch is filled up with other rows."""
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
