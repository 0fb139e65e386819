"""Scores of plain parameters: losses, and ROUGE of the summaries that they write."""

import functools
from typing import Any

import jax
import numpy as np
from rouge_score import rouge_scorer

from . import decoding
from .decoder import END, PAD, Decoder, Params
from .steps import summary_loss, text_loss
from .tokens import PREFIX, SUMMARY, Data, Rows

ROUGE = ("rouge1", "rouge2", "rougeL", "rougeLsum")
CHUNK = 100  # rows that are decoded at once


@functools.partial(jax.jit, static_argnums=0)
def pretraining_loss(model: Decoder, params: Params, pieces: jax.Array) -> jax.Array:
  """The loss on running text."""
  return text_loss(model.apply, params, pieces)


@functools.partial(jax.jit, static_argnums=0)
def validation_loss(model: Decoder, params: Params, rows: Rows) -> jax.Array:
  """The loss on summaries."""
  return summary_loss(model.apply, params, rows)


def decode(model: Decoder, data: Data, params: Params, width: int) -> list[str]:
  """The summaries of the test pairs by plain parameters."""
  written = []
  for begin in range(0, len(data.pairs), CHUNK):
    index = np.minimum(np.arange(begin, begin + min(CHUNK, len(data.pairs))), len(data.pairs) - 1)  # one shape for all
    rows = data.test.take(index)
    prefix, valid = rows.tokens[:, :PREFIX], rows.valid[:, :PREFIX]
    tokens = decoding.decode(model, model.apply, params, prefix, valid, SUMMARY, width)
    written += np.asarray(tokens)[: len(data.pairs) - begin].tolist()
  ids = [[token for token in tokens if token not in (END, PAD)] for tokens in written]
  return [" ".join(text.split()) for text in data.tokenizer.decode_batch(ids)]


def rouge(data: Data, summaries: list[str]) -> dict[str, float]:
  """F1 in percent, with stemming, over the test pairs."""
  scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
  scores = [scorer.score(pair.summary, text) for pair, text in zip(data.pairs, summaries, strict=True)]
  return {name: 100 * float(np.mean([score[name].fmeasure for score in scores])) for name in ROUGE}


def lead(data: Data) -> list[str]:
  """The baseline without a model: the first sentence of each body, up to 12 words."""
  return [" ".join(pair.body.replace("\n", " ").split(". ")[0].split()[:12]) for pair in data.pairs]


def evaluate(model: Decoder, data: Data, params: Params, widths: list[int], examples: int = 0) -> dict[str, Any]:
  """Losses, and ROUGE for each beam width; with `examples`, that many summaries as text."""
  result: dict[str, Any] = {
    "validation_loss": float(validation_loss(model, params, data.validation)),
    "pretraining_loss": float(pretraining_loss(model, params, data.held_out)),
  }
  for width in widths:
    summaries = decode(model, data, params, width)
    result |= {name if width == 1 else f"{name}_beam": score for name, score in rouge(data, summaries).items()}
    if width == 1 and examples:
      every = max(1, len(data.pairs) // examples)
      result["examples"] = [
        {**pair._asdict(), "written": text} for pair, text in [*zip(data.pairs, summaries, strict=True)][::every]
      ][:examples]
  return result
