"""What the tests share: cases and the oracle, adapted trees, and what a function compiles to.

Builders and wrappers register themselves; tests cross them and run the legal combinations.
"""

from tests.helpers.adapters import trained
from tests.helpers.arrays import array, normal
from tests.helpers.builders import BUILDERS, FAMILIES, Case
from tests.helpers.compiled import equations, weight_shaped_products
from tests.helpers.oracle import TOLERANCE, assert_close, check, loss_of, oracle
from tests.helpers.wrappers import FORWARD_ONLY, NEEDS_FLOAT_DATA, WRAPPERS, legal

__all__ = [
  "BUILDERS",
  "FAMILIES",
  "FORWARD_ONLY",
  "NEEDS_FLOAT_DATA",
  "TOLERANCE",
  "WRAPPERS",
  "Case",
  "array",
  "assert_close",
  "check",
  "equations",
  "legal",
  "loss_of",
  "normal",
  "oracle",
  "trained",
  "weight_shaped_products",
]
