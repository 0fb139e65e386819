"""Variants with trained vectors: VeRA and AdaLoRA."""

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._weight.lora import lora_shapes
from jaxlora._weight.start import Start, along_rank, over_outputs, stack_sizes
from jaxlora._weight.variant import Parts, Shapes, Variant


def _vera_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  return {
    **lora_shapes(shape, roles, rank),
    "lambda_d": (*stack_sizes(shape, roles), rank),
    "lambda_b": over_outputs(shape, roles),
  }


_VERA_D = 0.1  # the paper's initial value of d, table 7


def _vera_start(start: Start) -> dict[str, jax.Array]:
  """A and B drawn from the tree's key, once for all leaves of a shape.

  Each leaf has a copy of its own: a loop that donates its state may hold no buffer twice, and what one step returns
  shares none either.
  """
  shape = jnp.shape(start.base)
  alike = (start.a_shape, start.b_shape, start.dtype, start.init)
  if alike not in start.drawn:
    a_key, b_key = jax.random.split(start.shared)
    b = start.init(b_key, start.b_shape, start.dtype, start.rank, start.rank)
    start.drawn[alike] = start.first(a_key, start.a_shape), b
  a, b = start.drawn[alike]
  return {
    "a": jnp.array(a, copy=True),
    "b": jnp.array(b, copy=True),
    "lambda_d": start.full((*stack_sizes(shape, start.roles), start.rank), _VERA_D),
    "lambda_b": start.zeros(over_outputs(shape, start.roles)),
  }


def _vera_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  return parts["a"] * along_rank(parts["lambda_d"], parts["a"], roles.count("s")), parts["b"] * parts["lambda_b"]


# Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454), eq. 2: W' = W + L_b B L_d A.
VERA = Variant({"lambda_d": "magnitude", "lambda_b": "magnitude"}, _vera_shapes, _vera_start, _vera_factors)


def _adalora_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  vector = (*stack_sizes(shape, roles), rank)
  return {**lora_shapes(shape, roles, rank), "e": vector, "keep": vector}


_ADALORA_WIDTH = 0.02


def _adalora_start(start: Start) -> dict[str, jax.Array]:
  a_key, b_key = jax.random.split(start.key)
  vector = (*stack_sizes(jnp.shape(start.base), start.roles), start.rank)
  return {
    "a": _ADALORA_WIDTH * jax.random.normal(a_key, start.a_shape, start.dtype),
    "b": _ADALORA_WIDTH * jax.random.normal(b_key, start.b_shape, start.dtype),
    "e": start.zeros(vector),
    "keep": start.full(vector, 1),
  }


def _adalora_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  kept = parts["e"] * lax.stop_gradient(parts["keep"])
  return parts["a"], parts["b"] * along_rank(kept, parts["b"], roles.count("s"))


# Zhang et al., "AdaLoRA" (arXiv:2303.10512), eq. 3: W' = W + P L Q. What is pruned is masked, so that shapes stay.
ADALORA = Variant({"a": "a", "b": "b", "e": "magnitude"}, _adalora_shapes, _adalora_start, _adalora_factors)
