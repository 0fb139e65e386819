"""Several pairs in one row of tokens: little of a batch is padding, and all rows have one length.

A row is documents, a prompt and its answer each, behind each other. The attention of each stays within it and its
positions begin at 0 (`Llama.packed`), so that losses and gradients are those of the pairs in rows of their own.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jaxlora
from jaxlora.losses import Metrics, chunked_cross_entropy

from .model import Llama
from .rows import ANSWER, Example

CHUNK = 128  # tokens whose logits are held at once


class Packed(NamedTuple):
  """Packed rows.

  Attributes:
    tokens: (..., tokens), int32.
    segments: the same: the number of a token's document in its row, from 1 on; 0 is padding.
    columns: (..., answers), int32: where the tokens of the answers are predicted from; 0 behind the last.
    labels: the same: those tokens.
    counts: the same, bool: which of them there are.
  """

  tokens: np.ndarray
  segments: np.ndarray
  columns: np.ndarray
  labels: np.ndarray
  counts: np.ndarray

  @property
  def valid(self) -> np.ndarray:
    """Which tokens are no padding."""
    return self.segments > 0


def check(examples: Sequence[Example], length: int) -> None:
  """Raises ValueError if a pair does not fit into a row."""
  longest = max(len(prompt) + len(answer) for prompt, answer in examples)
  if longest > length:
    raise ValueError(
      f"found a pair of {longest} tokens, expected at most the {length} of a packed row: --pack {longest}"
    )


def assign(sizes: Sequence[int], length: int) -> list[list[int]]:
  """Which documents share a row: each, the longest first, goes into the first row that has room."""
  rows: list[list[int]] = []
  for k in sorted(range(len(sizes)), key=lambda k: -sizes[k]):
    for row in rows:
      if sum(sizes[j] for j in row) + sizes[k] <= length:
        row.append(k)
        break
    else:
      rows.append([k])
  return rows


def pack(examples: Sequence[Example], length: int, pad: int, multiple: int = 1) -> Packed:
  """Pairs in as few rows as the longest-first rule needs.

  Args:
    examples: the pairs.
    length: tokens of a row.
    pad: the token of padding.
    multiple: of rows; the last ones are padding.

  Raises:
    ValueError: if a pair does not fit into a row.
  """
  check(examples, length)
  rows = assign([len(prompt) + len(answer) for prompt, answer in examples], length)
  rows += [[] for _ in range(-len(rows) % multiple)]
  most = ANSWER * len(examples)  # one program, however the pairs fall into rows
  tokens, segments = np.full((len(rows), length), pad, np.int32), np.zeros((len(rows), length), np.int32)
  columns, labels = (np.zeros((len(rows), most), np.int32) for _ in range(2))
  counts = np.zeros((len(rows), most), bool)
  for row, members in enumerate(rows):
    end, answers = 0, 0
    for number, k in enumerate(members, 1):
      prompt, answer = examples[k]
      begin, end = end, end + len(prompt) + len(answer)
      tokens[row, begin:end], segments[row, begin:end] = [*prompt, *answer], number
      own = slice(answers, answers := answers + len(answer))
      columns[row, own] = np.arange(begin + len(prompt) - 1, end - 1)
      labels[row, own], counts[row, own] = answer, True
  return Packed(tokens, segments, columns, labels, counts)


def losses(model: Llama, rows: Packed) -> tuple[jax.Array, jax.Array]:
  """The sum of -log p over all answers' tokens, in nats, and how many they are; the head reads their columns alone."""
  hidden = model.packed(rows.tokens, rows.segments)
  hidden = jnp.take_along_axis(hidden, rows.columns[..., None], 1)
  return head_losses(model, hidden, rows.labels, rows.counts).total, rows.counts.sum()


def head_losses(model: Llama, hidden: jax.Array, labels: jax.Array, counts: jax.Array) -> Metrics:
  """The losses of a tied head, whose logits are never held all at once."""
  head = model.embed_tokens.embedding[...].astype(hidden.dtype).T
  return chunked_cross_entropy(hidden, head, labels, chunk=CHUNK, weights=counts)[1]


# Of a tree with adapters, on a quantised base or not: every product stays factored, or this is an error.
adapted_losses = jaxlora.wrap(losses, on_materialize="error")
