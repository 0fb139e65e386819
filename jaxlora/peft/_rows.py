"""Rows of weights that hold several: where the outputs of each lie, and in which order.

A row is an output of a weight, that is, a row of B.
"""

from collections.abc import Callable, Sequence
import itertools

import numpy as np

Order = Callable[[int], np.ndarray]  # the number of rows of a torch module -> for each the leaf's row that it is


def pairs_to_halves(head_size: int, rotary: int | None = None) -> Order:
  """The order of a projection's rows where the leaf rotates neighbours, and torch the halves of a head (RoPE).

  Meta's Llama, GPT-J and most papers rotate rows 2 k and 2 k + 1 of each head; Hugging Face's Llama rotates k and
  k + head_size / 2. The two are one function with the rows of the queries and the keys in another order.

      torch's row k = the leaf's row 2 k,    torch's row head_size / 2 + k = the leaf's row 2 k + 1

  Args:
    head_size: rows of one head.
    rotary: how many of them, at its beginning, are rotated; all with `None`.

  Returns:
    A function for `order` in `Split` and `Joined`: the number of rows -> the leaf's row for each row of torch's.

  Raises:
    ValueError: if an odd number of rows is to be rotated.

  Example:
    >>> import jaxlora.peft
    >>> jaxlora.peft.pairs_to_halves(4)(8).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]

  Source: `permute` in transformers' `models/llama/convert_llama_weights_to_hf.py`.
  """
  return _rotated(head_size, rotary, lambda size: np.arange(size).reshape(-1, 2).T.reshape(-1), "pairs_to_halves")


def halves_to_pairs(head_size: int, rotary: int | None = None) -> Order:
  """The inverse of `pairs_to_halves`: the leaf rotates the halves of a head, and torch rotates neighbours.

      torch's row 2 k = the leaf's row k,    torch's row 2 k + 1 = the leaf's row head_size / 2 + k

  Args:
    head_size: rows of one head.
    rotary: how many of them, at its beginning, are rotated; all with `None`.

  Returns:
    A function for `order` in `Split` and `Joined`: the number of rows -> the leaf's row for each row of torch's.

  Raises:
    ValueError: if an odd number of rows is to be rotated.

  Example:
    >>> import jaxlora.peft
    >>> jaxlora.peft.halves_to_pairs(4)(4).tolist()
    [0, 2, 1, 3]

  Source: `permute` in transformers' `models/llama/convert_llama_weights_to_hf.py`, inverted.
  """
  return _rotated(head_size, rotary, lambda size: np.arange(size).reshape(2, -1).T.reshape(-1), "halves_to_pairs")


def _rotated(head_size: int, rotary: int | None, order: Callable[[int], np.ndarray], what: str) -> Order:
  rotary = head_size if rotary is None else rotary
  if rotary % 2 or not 0 < rotary <= head_size:
    raise ValueError(f"{what}: found {rotary} of {head_size} rows, expected an even number of them.")
  of_head = np.concatenate([order(rotary), np.arange(rotary, head_size)])

  def rows(count: int) -> np.ndarray:
    if count % head_size:
      raise ValueError(f"{what}: {count} rows are no whole number of heads of {head_size}")
    return (np.arange(count).reshape(-1, head_size)[:, of_head]).reshape(-1)

  return rows


def positions(sizes: Sequence[int], groups: int) -> list[np.ndarray]:
  """Where the rows of each part lie in a weight that holds all of them.

  With one group the parts are side by side; with several each group holds its share of every part, side by side.

  Raises:
    ValueError: if the groups do not divide the sizes.
  """
  if any(size % groups for size in sizes):
    raise ValueError(f"parts of {', '.join(map(str, sizes))} outputs do not fall into {groups} groups")
  shares = [size // groups for size in sizes]
  starts = [0, *itertools.accumulate(shares)]
  return [
    (np.arange(groups)[:, None] * starts[-1] + np.arange(start, start + share)).reshape(-1)
    for start, share in zip(starts, shares, strict=False)
  ]


def ordered(order: Order | None, count: int) -> np.ndarray:
  """The leaf's row for each of torch's.

  Raises:
    ValueError: if the user's order is no permutation.
  """
  if order is None:
    return np.arange(count)
  rows = np.asarray(order(count))
  if rows.shape != (count,) or not np.array_equal(np.sort(rows), np.arange(count)):
    raise ValueError(f"order: found {rows.tolist()[:8]} ... of shape {rows.shape}, expected a permutation of {count}")
  return rows
