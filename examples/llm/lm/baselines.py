"""Summaries without a model: sentences of the abstract."""

from typing import Any

import numpy as np

from . import scores
from .papers import QUESTIONS, Pair, first_sentence, last_sentence, sentence_at
from .runs import Setup

POSITIONS = np.linspace(0, 1, 11)


def best_positions(pairs: list[Pair]) -> dict[str, float]:
  """Of each aspect, the relative position of the sentence with the highest ROUGE-L on training pairs."""
  found = {}
  for aspect in QUESTIONS:
    own = [pair for pair in pairs if pair.aspect == aspect]
    means = [np.mean(scores.rouge(own, [sentence_at(pair, at) for pair in own])["rougeL"]) for at in POSITIONS]
    found[aspect] = float(POSITIONS[int(np.argmax(means))])
  return found


def results(setup: Setup, split: str) -> list[dict[str, Any]]:
  """Rows of the table."""
  pairs, best = setup.pairs[split], best_positions(setup.pairs["train"])
  written = {
    "first sentence": [first_sentence(pair) for pair in pairs],
    "last sentence": [last_sentence(pair) for pair in pairs],
    "sentence by aspect": [sentence_at(pair, best[pair.aspect]) for pair in pairs],
  }
  settings = {"split": split, "method": {"name": "base"}}
  return [
    {"label": label, "settings": settings, "loss": None}
    | {kind: float(np.mean(values)) for kind, values in scores.rouge(pairs, texts).items()}
    for label, texts in written.items()
  ]
