"""Chosen rows of a table of tokens, as a variant: a frozen list of tokens, and what each one's row has moved by.

    W'[ids] = W[ids] + b,    A = one row per token, 1 at its place:    W' = W + A^T b

So everything that keeps LoRA factored does the same for rows: a look-up adds the rows of the tokens that it meets, a
tied head adds `x b^T` to the logits of those tokens. A is made where it is used, and held nowhere.
"""

import jax
import jax.numpy as jnp

from jaxlora._weight.roles import factor_shape
from jaxlora._weight.start import Start
from jaxlora._weight.variant import Parts, Shapes, Variant

ID_DTYPE = jnp.float32  # a float, as gradients by whole trees want it: whole numbers up to 2^24 are exact


def _shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  return {"a": (rank,), "b": factor_shape(shape, roles, "o", rank)}


def _start(start: Start) -> dict[str, jax.Array]:
  assert start.given is not None  # a config has tokens, and no variant of this name
  return dict(start.given)


def _factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  ids, rows = parts["a"], parts["b"]
  if ids.dtype.itemsize < 4:
    raise ValueError(
      f"rows of tokens: the list of tokens (a) is {ids.dtype}, which rounds their numbers; expected"
      f" {jnp.dtype(ID_DTYPE)}. Cast the rows (b) alone: LoraConfig(dtype=) says theirs."
    )
  places = jnp.arange(parts["base"].shape[roles.index("i")], dtype=ids.dtype)
  return (ids[:, None] == places[None]).astype(rows.dtype), rows


ROWS = Variant({"b": "full"}, _shapes, _start, _factors)
