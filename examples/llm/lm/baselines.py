"""Summaries without a model: sentences of the abstract."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import scores
from .papers import QUESTIONS, Pair, first_sentence, last_sentence, sentence_at

POSITIONS = np.linspace(0, 1, 11)


def best_positions(pairs: Sequence[Pair]) -> dict[str, float]:
  """Of each aspect, the relative position of the sentence with the highest ROUGE-L on training pairs."""
  found = {}
  for aspect in QUESTIONS:
    own = [pair for pair in pairs if pair.aspect == aspect]
    means = [np.mean(scores.rouge(own, [sentence_at(pair, at) for pair in own])["rougeL"]) for at in POSITIONS]
    found[aspect] = float(POSITIONS[int(np.argmax(means))])
  return found


def results(train: Sequence[Pair], pairs: Sequence[Pair], split: str) -> list[dict[str, Any]]:
  """Rows of the table; `train` says where each aspect's sentence is."""
  best = best_positions(train)
  written = {
    "first sentence": [first_sentence(pair) for pair in pairs],
    "last sentence": [last_sentence(pair) for pair in pairs],
    "sentence by aspect": [sentence_at(pair, best[pair.aspect]) for pair in pairs],
  }
  settings = {"split": split, "method": {"name": "base"}}
  found = []
  for label, texts in written.items():
    each = scores.rouge(pairs, texts)
    means = {kind: float(np.mean(values)) for kind, values in each.items()}
    own = {"label": label, "settings": settings, "loss": None, **means, "each": each, "written": texts}
    found.append(own | {"aspects": [pair.aspect for pair in pairs]})
  return found
