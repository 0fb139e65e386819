"""The data: pairs and running text as tokens, for training, validation and test."""

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from studies import harness

from .decoder import END, PAD
from .docstrings import Corpus, Pair, read, unseen

SPECIAL = ("<end>", "<pad>")  # their ids are END and PAD
PREFIX, SUMMARY = 72, 24  # tokens of a body and of a summary, each with its END
WINDOW = 128  # tokens of a piece of running text
PIECES = 64  # how many pieces of the held-out text the loss is measured on
HELD_OUT = 0.02  # share of the training pairs, and of the reference's topics, that is not trained on


class Rows(NamedTuple):
  """Pairs as rows of tokens; all summaries begin at position PREFIX.

  Attributes:
    tokens: (count, PREFIX + SUMMARY): padding, body, END; then summary, END, padding.
    valid: of the same shape, False in the padding before the body.
  """

  tokens: np.ndarray
  valid: np.ndarray

  def take(self, index: Any) -> "Rows":
    """The rows of an index."""
    return Rows(self.tokens[index], self.valid[index])


class Data(NamedTuple):
  """Everything that training and evaluation read.

  Attributes:
    tokenizer: byte-level BPE, trained on the training split alone.
    stream: (count,), the pretraining text: bodies and topics of the language reference, END before each.
    held_out: (count, WINDOW + 1), pieces of such text that is not trained on.
    train, validation, test: pairs as tokens.
    pairs: the test pairs as text.
    report: counts, versions and the digest of the data, for the results.
  """

  tokenizer: Tokenizer
  stream: np.ndarray
  held_out: np.ndarray
  train: Rows
  validation: Rows
  test: Rows
  pairs: list[Pair]
  report: dict[str, Any]


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> Tokenizer:
  """Byte-level BPE: encoding and decoding return every text unchanged."""
  tokenizer = Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  alphabet = pre_tokenizers.ByteLevel.alphabet()
  trainer = trainers.BpeTrainer(
    vocab_size=vocabulary, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
  """The tokens of each text."""
  return [one.ids for one in tokenizer.encode_batch(list(texts), add_special_tokens=False)]


def as_rows(tokenizer: Tokenizer, pairs: Sequence[Pair]) -> Rows:
  """Pairs as tokens; bodies and summaries that are too long are truncated at the end."""
  tokens = np.full((len(pairs), PREFIX + SUMMARY), PAD, np.int32)
  valid = np.ones(tokens.shape, bool)
  bodies, summaries = (encode(tokenizer, texts) for texts in zip(*(pair[1:] for pair in pairs), strict=True))
  for k, (body, summary) in enumerate(zip(bodies, summaries, strict=True)):
    body = [*body[: PREFIX - 1], END]
    tokens[k, PREFIX - len(body) : PREFIX] = body
    valid[k, : PREFIX - len(body)] = False
    summary = [*summary[: SUMMARY - 1], END]
    tokens[k, PREFIX : PREFIX + len(summary)] = summary
  return Rows(tokens, valid)


def as_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
  """Texts concatenated, END before each."""
  return np.concatenate([[END, *ids] for ids in encode(tokenizer, texts)]).astype(np.int32)


def sample(pairs: Sequence[Pair], count: int) -> list[Pair]:
  """About `count` pairs, an equal number from each package that has enough; always the same ones."""
  rng = np.random.default_rng(0)
  packages = sorted({pair.package for pair in pairs})
  picked = []
  for package in packages:
    mine = [pair for pair in pairs if pair.package == package]
    picked += [mine[k] for k in rng.permutation(len(mine))[: -(-count // len(packages))]]
  return picked


def hold_out(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
  """The kept and the held-out items of a list; always the same ones."""
  out = set(np.random.default_rng(0).permutation(len(items))[: max(1, round(HELD_OUT * len(items)))].tolist())
  return [item for k, item in enumerate(items) if k not in out], [items[k] for k in sorted(out)]


def as_data(corpus: Corpus, vocabulary: int, validation: int, test: int) -> Data:
  """Holds text out, trains the tokenizer on the rest of the training split, and encodes all splits."""
  train, held_out = hold_out(corpus.train)
  topics, held_out_topics = hold_out(corpus.reference)
  held_out = unseen(held_out, train, Counter())
  texts = [*topics, *(pair.body for pair in train)]
  tokenizer = train_tokenizer([*texts, *(pair.summary for pair in train)], vocabulary)
  order = np.random.default_rng(0).permutation(len(texts))
  held = as_stream(tokenizer, [*held_out_topics, *(pair.body for pair in held_out)])
  pieces = held[: len(held) // (WINDOW + 1) * (WINDOW + 1)].reshape(-1, WINDOW + 1)
  pieces = np.random.default_rng(0).permutation(pieces)[:PIECES]
  pairs = sample(corpus.test, test)
  rows = {"train": train, "validation": sample(corpus.validation, validation), "test": pairs}
  data = Data(
    tokenizer,
    stream=as_stream(tokenizer, [texts[k] for k in order]),
    held_out=pieces,
    **{name: as_rows(tokenizer, some) for name, some in rows.items()},
    pairs=pairs,
    report=corpus.report,
  )
  used = {name: len(some) for name, some in rows.items()}
  tokens = {"vocabulary": tokenizer.get_vocab_size(), "pretraining": len(data.stream), "held_out": int(pieces.size)}
  tokens |= {"prefix": PREFIX, "summary": SUMMARY}
  arrays = [data.stream, data.held_out, *data.train, *data.validation, *data.test]
  report = {**corpus.report, "used": used, "tokens": tokens, "digest": harness.digest(corpus.report["digest"], arrays)}
  return data._replace(report=report)


def load(only: Sequence[str] | None, vocabulary: int, validation: int, test: int, cache: Path | None) -> Data:
  """The data of these packages, or of all.

  Args:
    only: names of packages; None takes all that are installed.
    vocabulary: size of the vocabulary.
    validation, test: how many pairs to use, about.
    cache: where pairs are kept; None keeps nothing.

  Raises:
    ValueError: if a split has no pair.
  """
  return as_data(read(only, cache), vocabulary, validation, test)
