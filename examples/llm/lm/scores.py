"""How good answers are: the loss of the references, and ROUGE of what a model writes."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from rouge_score import rouge_scorer

import jaxlora

from .model import Llama
from .papers import Pair
from .rows import ANSWER, Example, Rows, batch, by_length

ROUGE = ("rouge1", "rouge2", "rougeL")


def answer_losses(model: Llama, rows: Rows) -> tuple[jax.Array, jax.Array]:
  """Of each row, the sum of -log p over the answer's tokens, in nats, and how many they are: (batch,) each.

  Prompts and padding do not count.
  """
  logits, _ = model(rows.tokens[:, :-1], rows.valid[:, :-1], last=ANSWER)
  targets, counts = rows.tokens[:, -ANSWER:], rows.valid[:, -ANSWER:]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return (losses * counts).sum(1), counts.sum(1)


# The same of a tree with adapters, on a quantised base or not: every product stays factored, or this is an error.
adapted_losses = jaxlora.wrap(answer_losses, on_materialize="error")
compiled_losses = jax.jit(adapted_losses)


def losses(
  tree: Any, examples: Sequence[Example], pad: int, size: int, tick: Callable[[int], Any] = lambda count: None
) -> tuple[np.ndarray, np.ndarray]:
  """Of each reference the sum of its tokens' losses, in nats, and their number; `tree` is adapted, or plain."""
  sums, counts = np.zeros(len(examples)), np.zeros(len(examples))
  for index in by_length(examples, size):
    sums[index], counts[index] = map(np.asarray, compiled_losses(tree, batch([examples[k] for k in index], pad)))
    tick(len({*index.tolist()}))
  return sums, counts


def rouge(pairs: Sequence[Pair], written: Sequence[str]) -> dict[str, list[float]]:
  """F1 in percent, with stemming, of each pair."""
  scorer = rouge_scorer.RougeScorer(ROUGE, use_stemmer=True)
  scores = [scorer.score(pair.summary, text) for pair, text in zip(pairs, written, strict=True)]
  return {name: [100 * score[name].fmeasure for score in scores] for name in ROUGE}
