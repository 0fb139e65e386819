"""Adapted products of one input as XLA's GPU backend likes them: side by side, as few products.

    [y_1, y_2, ..] = x [W_1, W_2, ..] + [h_1, h_2, ..] diag(B_1, B_2, ..)
    dx = [dy_1, dy_2, ..] [W_1, W_2, ..]^T,    [g_1, g_2, ..] = [dy_1, dy_2, ..] diag(B_1, B_2, ..)^T

XLA:GPU multiplies an input by several weights at once where that is worth a copy of them. The low-rank parts can then
be added in place, by the product that makes them, only if they lie side by side, too. The zeros of `diag` are terms
along the rank, which is short.

Reading order: when -> side by side -> forward -> transpose.
"""

from collections.abc import Sequence
import dataclasses
import itertools

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled, Result, contract
from jaxlora._jax.sizes import elements
from jaxlora._platform.joint import Matrices, joined
from jaxlora._platform.kept_sum import plain_sum

_TOKENS = 2  # a copy of the weights costs little where there are so many times more tokens than the inputs of one

_ALL = "all free axes"  # the label of the free axes of all weights together


def worth_it(x: jax.Array, inputs: int) -> bool:
  """Whether the products of `x`, each of so many inputs, are so large that a copy of their weights is little."""
  return elements(x.shape) >= _TOKENS * inputs * inputs


@dataclasses.dataclass(frozen=True)
class SideBySide:
  """The weights of one input, and their Bs, each as one matrix."""

  each: Sequence[Matrices]

  @property
  def k(self) -> object:
    return self.each[0].k

  @property
  def r(self) -> object:
    return self.each[0].r

  @property
  def widths(self) -> list[int]:
    return [m.w.array.shape[m.w.labels.index(m.n)] for m in self.each]

  @property
  def ranks(self) -> list[int]:
    return [m.b.array.shape[m.b.labels.index(m.r)] for m in self.each]

  def w(self) -> Labelled:
    """`[W_1, W_2, ..]`."""
    return Labelled(lax.concatenate([m.w.ordered([m.k, m.n]) for m in self.each], 1), (self.k, _ALL))

  def b(self) -> Labelled:
    """`diag(B_1, B_2, ..)`."""
    ends = list(itertools.accumulate(self.ranks))
    blocks = [
      lax.pad(m.b.ordered([m.r, m.n]), jnp.zeros((), m.b.array.dtype), [(end - rank, ends[-1] - end, 0), (0, 0, 0)])
      for m, rank, end in zip(self.each, self.ranks, ends, strict=True)
    ]
    return Labelled(lax.concatenate(blocks, 1), (self.r, _ALL))

  def thin(self, each: Sequence[Labelled]) -> Labelled:
    """`[h_1, h_2, ..]`."""
    return joined(each[0], self.r, each[1:], [self.r] * len(each[1:]))

  def wide(self, each: Sequence[Labelled]) -> Labelled:
    """`[y_1, y_2, ..]`."""
    first, *others = (
      Labelled(y.array, tuple(_ALL if label == m.n else label for label in y.labels))
      for m, y in zip(self.each, each, strict=True)
    )
    return joined(first, _ALL, others, [_ALL] * len(others))

  def apart(self, wide: Labelled) -> list[Labelled]:
    """The parts of `[y_1, y_2, ..]`."""
    parts = lax.split(wide.array, self.widths, wide.labels.index(_ALL))
    own = lambda m: tuple(m.n if label == _ALL else label for label in wide.labels)
    return [Labelled(part, own(m)) for m, part in zip(self.each, parts, strict=True)]


def forward(weights: SideBySide, x: Labelled, thin: Sequence[Labelled], result: Result) -> list[Labelled]:
  """The products of one input."""
  base = contract(x, weights.w(), [weights.k], result)
  delta = contract(weights.thin(thin), weights.b(), [weights.r], result)
  return weights.apart(Labelled(plain_sum(base.array, delta.ordered(base.labels)), base.labels))


def transpose(
  weights: SideBySide, thin: Sequence[Labelled], cotangents: Sequence[Labelled], result: Result
) -> tuple[Labelled, list[Labelled], list[Labelled]]:
  """The cotangents of the input, of the thin products and of every B.

  Args:
    weights: the weights and their Bs.
    thin: `h` of each.
    cotangents: `dy` of each.
    result: what `g` is to be.
  """
  dy, ranks, ends = weights.wide(cotangents), weights.ranks, list(itertools.accumulate(weights.ranks))
  g = contract(dy, weights.b(), [_ALL], result)
  factors = [Labelled(m.a.ordered([m.r, m.k]), (weights.r, weights.k)) for m in weights.each]
  a = joined(factors[0], weights.r, factors[1:], [weights.r] * len(factors[1:]))
  to_input = Result(dy.array.dtype)
  along_base, along_a = contract(dy, weights.w(), [_ALL], to_input), contract(g, a, [weights.r], to_input)
  dx = Labelled(along_base.array + along_a.ordered(along_base.labels), along_base.labels)
  gs = lax.split(g.array, ranks, g.labels.index(weights.r))
  h = weights.thin(thin)
  seconds = contract(h, dy, [label for label in h.labels if label != weights.r], Result(weights.b().array.dtype))
  own = [
    Labelled(lax.slice_in_dim(part.array, end - rank, end, axis=part.labels.index(weights.r)), part.labels)
    for part, rank, end in zip(weights.apart(seconds), ranks, ends, strict=True)
  ]
  return dx, [Labelled(part, g.labels) for part in gs], own
