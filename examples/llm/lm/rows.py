"""Pairs as padded rows of tokens, in few shapes, and the order in which training meets them.

A row is a prompt, padded on the left to one of a few lengths, and an answer, padded on the right to one length. So all
answers of a batch are in the same columns: the head, whose logits are the largest arrays, is computed there alone, and
decoding starts in the same column for all.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .papers import Pair
from .tokens import Chat

ANSWER = 48  # tokens of an answer, its end among them: the longest of the data has as many
STEP = 64  # prompts are padded to multiples of it: as many programs are compiled as there are lengths
LONGEST = 640  # tokens of a prompt to train on: one abstract in a hundred is five times as long as the others
SHUFFLED = 10  # batches that are put together by length, so that little is padding


class Example(NamedTuple):
  """A pair as tokens."""

  prompt: list[int]
  answer: list[int]


class Rows(NamedTuple):
  """A padded batch.

  Attributes:
    tokens: (..., prompt + ANSWER), int32.
    valid: the same, bool: no padding.
  """

  tokens: np.ndarray
  valid: np.ndarray


def examples(chat: Chat, pairs: Sequence[Pair], context: int) -> list[Example]:
  """The pairs as tokens.

  Raises:
    ValueError: naming the first paper whose prompt or answer is too long.
  """
  found = []
  for pair in pairs:
    example = Example(chat.prompt(pair.question), chat.answer(pair.summary))
    if len(example.answer) > ANSWER:
      raise ValueError(f"{pair.paper}: the {pair.aspect} has {len(example.answer)} tokens, expected at most {ANSWER}")
    if padded(len(example.prompt)) + ANSWER > context:
      raise ValueError(
        f"{pair.paper}: the prompt has {len(example.prompt)} tokens, expected at most {context - ANSWER}: the model's"
        f" context is {context} and the answer needs {ANSWER} of it; leave the paper out"
      )
    found.append(example)
  return found


def padded(length: int) -> int:
  """The length that a prompt is padded to."""
  return -(-length // STEP) * STEP


def batch(examples: Sequence[Example], pad: int, answer: int = ANSWER) -> Rows:
  """One padded batch, with room for answers of so many tokens."""
  width = padded(max(len(example.prompt) for example in examples))
  tokens = np.full((len(examples), width + answer), pad, np.int32)
  valid = np.zeros(tokens.shape, bool)
  for row, (prompt, answer) in enumerate(examples):
    columns = slice(width - len(prompt), width + len(answer))
    tokens[row, columns], valid[row, columns] = [*prompt, *answer], True
  return Rows(tokens, valid)


def training_order(examples: Sequence[Example], size: int, steps: int, seed: int) -> list[np.ndarray]:
  """The indices of each step's batch.

  Every epoch is shuffled; within runs of a few batches, pairs of like length share a batch. It follows from the
  arguments alone, so that a run goes on where it stood.

  Raises:
    ValueError: if there are fewer pairs than a batch has.
  """
  if len(examples) < size:
    raise ValueError(
      f"found {len(examples)} training pairs, expected at least the {size} of a batch: --batch, or more data"
    )
  generator = np.random.default_rng(seed)
  lengths = np.array([len(example.prompt) for example in examples])
  order: list[np.ndarray] = []
  while len(order) < steps:
    shuffled = generator.permutation(len(examples))
    for begin in range(0, len(examples) - size + 1, SHUFFLED * size):
      run = shuffled[begin : begin + SHUFFLED * size]
      run = run[np.argsort(lengths[run], kind="stable")]
      batches = [run[k : k + size] for k in range(0, len(run) - size + 1, size)]
      order += [batches[k] for k in generator.permutation(len(batches))]
  return order[:steps]


def by_length(examples: Sequence[Example], size: int) -> list[np.ndarray]:
  """The indices of all examples in batches of like length; the last batch repeats its last to be of the same size."""
  order = np.argsort([len(example.prompt) for example in examples], kind="stable")
  return [order[np.minimum(np.arange(k, k + size), len(order) - 1)] for k in range(0, len(order), size)]
