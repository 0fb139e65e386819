"""What the tests share: cases and the oracle, adapted trees, and what a function compiles to.

Builders and wrappers register themselves; tests cross them and run the legal combinations.
"""

from tests.helpers.adapters import (
  adapted,
  adapted_paths,
  drawn,
  factored,
  lora_weights,
  one_weight,
  square_weights,
  trained,
)
from tests.helpers.arrays import array, normal
from tests.helpers.builders import BUILDERS, FAMILIES, Case
from tests.helpers.compiled import (
  OPTIMISED,
  equations,
  optimised,
  product_flops,
  products,
  temp_bytes,
  traced,
  weight_shaped_products,
)
from tests.helpers.foreign import Eighths
from tests.helpers.meshes import DEVICES, mesh_of, place
from tests.helpers.oracle import TOLERANCE, assert_close, check, frozen_step, loss_of, oracle, sine_step
from tests.helpers.policies import POLICIES, Under, on_devices
from tests.helpers.wrappers import FORWARD_ONLY, NEEDS_FLOAT_DATA, WRAPPERS, legal

__all__ = [
  "BUILDERS",
  "DEVICES",
  "FAMILIES",
  "FORWARD_ONLY",
  "NEEDS_FLOAT_DATA",
  "OPTIMISED",
  "POLICIES",
  "TOLERANCE",
  "WRAPPERS",
  "Case",
  "Eighths",
  "Under",
  "adapted",
  "adapted_paths",
  "array",
  "assert_close",
  "check",
  "drawn",
  "equations",
  "factored",
  "frozen_step",
  "legal",
  "lora_weights",
  "loss_of",
  "mesh_of",
  "normal",
  "on_devices",
  "one_weight",
  "optimised",
  "oracle",
  "place",
  "product_flops",
  "products",
  "sine_step",
  "square_weights",
  "temp_bytes",
  "traced",
  "trained",
  "weight_shaped_products",
]
