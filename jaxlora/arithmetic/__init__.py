"""Arithmetic on the updates of adapters of one base: sums, multiples, differences, norms, angles.

    both = jaxlora.arithmetic.combine([summaries, dialogue], [0.7, 0.3])             # exact; the ranks add up
    less = jaxlora.arithmetic.subtract(both, jaxlora.arithmetic.scale(dialogue, 0.3))
    jaxlora.arithmetic.cosine(summaries, dialogue)                                   # leaf by leaf

A sum is always of updates as a whole, `delta = scale * sum_r a b`, never of A and of B apart: the sum of products is
not the product of sums.
"""

from jaxlora.arithmetic._combine import combine, combine_with_report
from jaxlora.arithmetic._measures import cosine, norms
from jaxlora.arithmetic._scale import interpolate, scale, subtract
from jaxlora.svd._truncation import LeafTruncation, Truncation

__all__ = [
  "LeafTruncation",
  "Truncation",
  "combine",
  "combine_with_report",
  "cosine",
  "interpolate",
  "norms",
  "scale",
  "subtract",
]
