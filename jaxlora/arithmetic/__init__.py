"""Arithmetic on the updates of adapters of one base: sums, multiples, differences, norms, angles.

What is added is always the update of a leaf as a whole, `delta = scale * sum_r a b`, never A and B apart: the sum of
products is not the product of sums.
"""

from jaxlora.arithmetic._combine import combine
from jaxlora.arithmetic._measures import cosine, norms
from jaxlora.arithmetic._scale import interpolate, scale, subtract

__all__ = ["combine", "cosine", "interpolate", "norms", "scale", "subtract"]
