"""LoRA, and LoRA with A frozen."""

import jax

from jaxlora._weight.roles import factor_shape
from jaxlora._weight.start import Start
from jaxlora._weight.variant import Shapes, Variant, own_factors


def lora_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  return {"a": factor_shape(shape, roles, "i", rank), "b": factor_shape(shape, roles, "o", rank)}


def lora_start(start: Start) -> dict[str, jax.Array]:
  """A drawn and B zero, or both as they are given."""
  if start.given is not None:
    return dict(start.given)
  return {"a": start.first(start.key, start.a_shape), "b": start.zeros(start.b_shape)}


LORA = Variant({"a": "a", "b": "b"}, lora_shapes, lora_start, own_factors)


# Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation" (arXiv:2308.03303), eq. 3: A stays as it was drawn, so
# that the backward pass needs h = x A alone, and never x.
LORA_FA = LORA._replace(trains={"b": "b"})
