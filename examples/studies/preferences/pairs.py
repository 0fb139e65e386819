"""Pairs of sentences of which people's summaries prefer one, as rows of tokens.

ACLSum has, for each abstract, a sentence by people on its challenge, its approach and its outcome. For each of them the
abstract's own sentences are ranked by ROUGE-L against it: the best is chosen, the worst is rejected.
"""

from collections.abc import Sequence
from pathlib import Path
import sys
from typing import NamedTuple

import numpy as np
from rouge_score import rouge_scorer
from tokenizers import Tokenizer

from studies.summaries import tokens
from studies.summaries.decoder import END, PAD

sys.path.append(str(Path(__file__).resolve().parents[2] / "llm"))
from lm import papers

PROMPT, ANSWER = 80, 48  # tokens of an abstract with its question, and of a sentence with its end


class Rows(NamedTuple):
  """Pairs as tokens, the chosen sentence first.

  Attributes:
    tokens: (pairs, 2, PROMPT + ANSWER): padding, the abstract's end, the question; then a sentence, END, padding.
    valid: of the same shape, False in the padding ahead.
  """

  tokens: np.ndarray
  valid: np.ndarray

  def take(self, index: np.ndarray) -> "Rows":
    """The pairs of an index."""
    return Rows(self.tokens[index], self.valid[index])


class Data(NamedTuple):
  """What the study reads.

  Attributes:
    tokenizer: byte-level BPE, of the training papers alone.
    stream: running text of the training papers, END ahead of each: abstract, question, the sentence by people.
    train, validation: pairs of other papers each.
  """

  tokenizer: Tokenizer
  stream: np.ndarray
  train: Rows
  validation: Rows


def ranked(pair: papers.Pair, scorer: rouge_scorer.RougeScorer) -> tuple[str, str] | None:
  """The best and the worst sentence of an abstract; `None` where they are as good."""
  scores = [scorer.score(pair.summary, sentence)["rougeL"].fmeasure for sentence in pair.sentences]
  best, worst = max(scores), min(scores)
  return None if best == worst else (pair.sentences[scores.index(best)], pair.sentences[scores.index(worst)])


def asked(pair: papers.Pair) -> str:
  """The abstract and what is asked of it."""
  return f"{' '.join(pair.sentences)} {pair.aspect}:"


def as_rows(tokenizer: Tokenizer, pairs: Sequence[papers.Pair]) -> Rows:
  """Pairs as tokens; of prompts that are too long the end is kept, of sentences the beginning."""
  scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
  found = [(pair, both) for pair in pairs if (both := ranked(pair, scorer)) is not None]
  rows = Rows(np.full((len(found), 2, PROMPT + ANSWER), PAD, np.int32), np.ones((len(found), 2, PROMPT + ANSWER), bool))
  prompts = tokens.encode(tokenizer, [asked(pair) for pair, _ in found])
  for k, (prompt, (_, both)) in enumerate(zip(prompts, found, strict=True)):
    prompt = prompt[-PROMPT:]
    rows.valid[k, :, : PROMPT - len(prompt)] = False
    rows.tokens[k, :, PROMPT - len(prompt) : PROMPT] = prompt
    for side, sentence in enumerate(tokens.encode(tokenizer, both)):
      sentence = [*sentence[: ANSWER - 1], END]
      rows.tokens[k, side, PROMPT : PROMPT + len(sentence)] = sentence
  return rows


def load(vocabulary: int, folder: Path | None) -> Data:
  """The data of a folder in ACLSum's form, or of the package.

  Raises:
    ValueError: if there is none, or it is of another form.
  """
  train, validation = papers.load("train", folder), papers.load("val", folder)
  texts = [f"{asked(pair)} {pair.summary}" for pair in train]
  tokenizer = tokens.train_tokenizer(texts, vocabulary)
  rows = (as_rows(tokenizer, pairs) for pairs in (train, validation))
  return Data(tokenizer, tokens.as_stream(tokenizer, texts), *rows)
