"""The variants of LoRA, each a record of pure functions of the parts that it adds beside the base.

A variant says which parts a weight has, which of them train, how they start, and what they come to: a pair of effective
factors, so that whatever the transform does with LoRA it does with all of them; and for DoRA a gain over the outputs:

    W' = gain * (base + scale * sum_r A[..., r, in] B[..., r, out]),    (A, B) = factors(parts)

Here and in every part the rank leads, behind stacked axes: `(*stack, rank, *in)`.
"""

from collections.abc import Callable, Mapping, Sequence
import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._axes import RANK, factor_axes, factor_shape

Parts = Mapping[str, Any]
Shapes = dict[str, tuple[int, ...]]


class Start(NamedTuple):
  """What a variant's parts are made from.

  Attributes:
    base: the weight.
    roles: one letter per axis.
    rank: number of terms of the update.
    dtype: of the parts.
    key: of this leaf.
    shared: of the whole tree, for what all leaves of one shape have in common.
    drawn: what was drawn from it so far: leaves of one shape share the very buffers.
    init: makes the factor A, `(key, shape, dtype, fan_in, rank) -> array`.
  """

  base: Any
  roles: str
  rank: int
  dtype: Any
  key: jax.Array
  shared: jax.Array
  drawn: dict[Any, Any]
  init: Callable[..., jax.Array]

  @property
  def a_shape(self) -> tuple[int, ...]:
    return factor_shape(jnp.shape(self.base), self.roles, "i", self.rank)

  @property
  def b_shape(self) -> tuple[int, ...]:
    return factor_shape(jnp.shape(self.base), self.roles, "o", self.rank)

  def first(self, key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A factor over the contracted axes, by the initialiser that the user chose."""
    return self.init(key, shape, self.dtype, fan(jnp.shape(self.base), self.roles, "i"), self.rank)

  def zeros(self, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, self.dtype)

  def full(self, shape: tuple[int, ...], value: float) -> jax.Array:
    return jnp.full(shape, value, self.dtype)


class Variant(NamedTuple):
  """One member of the family.

  Attributes:
    trains: part -> its label, for those that train. All other parts are frozen.
    shapes: `(shape, roles, rank)` -> the shape of every part but the base.
    start: the parts at first. Their update is zero, so that the adapted model is the base.
    factors: the effective factors, without the scale, in the layout `(*stack, rank, *own)`; their rank may be another.
    gain: `(parts, roles, a, b) -> array (*stack, 1, *out)` with b scaled, in front of base and update; `None` for none.
  """

  trains: Mapping[str, str]
  shapes: Callable[[tuple[int, ...], str, int], Shapes]
  start: Callable[[Start], dict[str, jax.Array]]
  factors: Callable[[Parts, str], tuple[jax.Array, jax.Array]]
  gain: Callable[[Parts, str, jax.Array, jax.Array], jax.Array] | None = None


def fan(shape: Sequence[int], roles: str, own: str) -> int:
  """The number of elements along the axes of one role."""
  return math.prod(size for size, role in zip(shape, roles, strict=True) if role == own)


def _stack(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  return tuple(size for size, role in zip(shape, roles, strict=True) if role == "s")


def _along(vector: jax.Array, like: jax.Array, rank_axis: int) -> jax.Array:
  """A vector over the rank, `(*stack, rank)`, beside a factor."""
  return lax.expand_dims(vector, range(rank_axis + 1, like.ndim))


# ----------------------------------------------------------------------------------------------------------------------
# LoRA, and LoRA with A frozen.


def _lora_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  return {"a": factor_shape(shape, roles, "i", rank), "b": factor_shape(shape, roles, "o", rank)}


def _lora_start(start: Start) -> dict[str, jax.Array]:
  return {"a": start.first(start.key, start.a_shape), "b": start.zeros(start.b_shape)}


def _lora_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  del roles
  return parts["a"], parts["b"]


LORA = Variant({"a": "a", "b": "b"}, _lora_shapes, _lora_start, _lora_factors)

# Zhang et al., "LoRA-FA: Memory-efficient Low-rank Adaptation" (arXiv:2308.03303), eq. 3: A stays as it was drawn, so
# that the backward pass needs h = x A alone, and never x.
LORA_FA = LORA._replace(trains={"b": "b"})


# ----------------------------------------------------------------------------------------------------------------------
# DoRA.


def _over_outputs(shape: Sequence[int], roles: str) -> tuple[int, ...]:
  """The shape of what has one number per output: a factor over the free axes, of rank 1."""
  return factor_shape(tuple(shape), roles, "o", 1)


def _dora_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  outputs = _over_outputs(shape, roles)
  return {**_lora_shapes(shape, roles, rank), "magnitude": outputs, "norm": outputs}


def _precise(x: jax.Array) -> jax.Array:
  """Sums of squares are taken in at least 32 bits."""
  return x if x.dtype.itemsize >= 4 else x.astype(jnp.float32)


def squared_norms(base: jax.Array, roles: str) -> jax.Array:
  """`sum_in base^2` for every output, `(*stack, 1, *out)`."""
  wide = _precise(base)
  summed = jnp.sum(wide * wide, axis=[d for d, role in enumerate(roles) if role == "i"], keepdims=True)
  order = [d for d, role in enumerate(roles) if role != "i"]
  return lax.reshape(_ordered(summed, roles, order), _over_outputs(jnp.shape(base), roles))


def _ordered(x: jax.Array, roles: str, order: Sequence[int]) -> jax.Array:
  """Stacked axes first, then the free ones, then those that were summed."""
  stack = [d for d in order if roles[d] == "s"]
  free = [d for d in order if roles[d] == "o"]
  return lax.transpose(x, (*stack, *free, *(d for d in range(x.ndim) if d not in order)))


def _dora_start(start: Start) -> dict[str, jax.Array]:
  norm = jnp.sqrt(squared_norms(start.base, start.roles))
  return {**_lora_start(start), "magnitude": norm, "norm": norm.copy()}


def change_of_squares(base: jax.Array, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`sum_in (base + A B)^2 - base^2` for every output, without ever forming the sum.

      ||w + A b||^2 - ||w||^2 = 2 b . (A w) + b . (A A^T) b       for each column w of the base, b of B

  That is rank x in x out multiplications where forming the sum takes as many and an array of the base's size.
  """
  dtype = jnp.promote_types(_precise(a).dtype, _precise(base).dtype)
  a, b, base = a.astype(dtype), b.astype(dtype), base.astype(dtype)
  rank, other = len(roles), len(roles) + 1  # labels of the rank's axis, and of a second one
  a_axes, b_axes = ([rank if d == RANK else d for d in factor_axes(roles, own)] for own in "io")
  stack = [d for d, role in enumerate(roles) if role == "s"]

  def second(axes: Sequence[int]) -> list[int]:
    return [other if d == rank else d for d in axes]

  crossed = jnp.einsum(a, a_axes, base, list(range(len(roles))), b_axes, precision="highest")
  gram = jnp.einsum(a, a_axes, a, second(a_axes), [*stack, rank, other], precision="highest")
  folded = jnp.einsum(gram, [*stack, rank, other], b, second(b_axes), b_axes, precision="highest")
  return jnp.sum(b * (2 * crossed + folded), axis=len(stack), keepdims=True)


def _dora_norm(parts: Parts, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`||base + A B||` for every output: the base's own norm, to the bit, where the update is zero.

  So the gain is exactly one at first, however the compiler rounds roots. A column of zeros has the norm one.
  """
  change, norm = change_of_squares(parts["base"], roles, a, b), parts["norm"]
  squares, none = norm * norm, norm == 0
  relative = jnp.maximum(1 + change / jnp.where(none, 1, squares), 0)
  grown = jnp.where(none, jnp.where(change > 0, change, 1), jnp.where(relative > 0, relative, 1))
  return jnp.where(none, 1, norm) * jnp.sqrt(grown)


def _dora_gain(parts: Parts, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """`m / ||W + s A B||`, the norm a constant for the gradient (section 4.3 of the paper)."""
  return parts["magnitude"] / _dora_norm(parts, roles, *lax.stop_gradient((a, b)))


def _exact_dora_gain(parts: Parts, roles: str, a: jax.Array, b: jax.Array) -> jax.Array:
  return parts["magnitude"] / _dora_norm(parts, roles, a, b)


# Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5: W' = m (W + B A) / ||W + B A||_c.
DORA = Variant(
  {"a": "a", "b": "b", "magnitude": "magnitude"}, _dora_shapes, _dora_start, _lora_factors, gain=_dora_gain
)
DORA_EXACT = DORA._replace(gain=_exact_dora_gain)


# ----------------------------------------------------------------------------------------------------------------------
# Vectors: VeRA and AdaLoRA.


def _vera_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  return {
    **_lora_shapes(shape, roles, rank),
    "lambda_d": (*_stack(shape, roles), rank),
    "lambda_b": _over_outputs(shape, roles),
  }


_VERA_D = 0.1  # the paper's initial value of d, table 7


def _vera_start(start: Start) -> dict[str, jax.Array]:
  """A and B drawn from the tree's key, once for all leaves of a shape."""
  shape = jnp.shape(start.base)
  alike = (start.a_shape, start.b_shape, start.dtype, start.init)
  if alike not in start.drawn:
    a_key, b_key = jax.random.split(start.shared)
    b = start.init(b_key, start.b_shape, start.dtype, start.rank, start.rank)
    start.drawn[alike] = start.first(a_key, start.a_shape), b
  a, b = start.drawn[alike]
  return {
    "a": a,
    "b": b,
    "lambda_d": start.full((*_stack(shape, start.roles), start.rank), _VERA_D),
    "lambda_b": start.zeros(_over_outputs(shape, start.roles)),
  }


def _vera_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  return parts["a"] * _along(parts["lambda_d"], parts["a"], roles.count("s")), parts["b"] * parts["lambda_b"]


# Kopiczko et al., "VeRA: Vector-based Random Matrix Adaptation" (arXiv:2310.11454), eq. 2: W' = W + L_b B L_d A.
VERA = Variant({"lambda_d": "magnitude", "lambda_b": "magnitude"}, _vera_shapes, _vera_start, _vera_factors)


def _adalora_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  vector = (*_stack(shape, roles), rank)
  return {**_lora_shapes(shape, roles, rank), "e": vector, "keep": vector}


_ADALORA_WIDTH = 0.02


def _adalora_start(start: Start) -> dict[str, jax.Array]:
  a_key, b_key = jax.random.split(start.key)
  vector = (*_stack(jnp.shape(start.base), start.roles), start.rank)
  return {
    "a": _ADALORA_WIDTH * jax.random.normal(a_key, start.a_shape, start.dtype),
    "b": _ADALORA_WIDTH * jax.random.normal(b_key, start.b_shape, start.dtype),
    "e": start.zeros(vector),
    "keep": start.full(vector, 1),
  }


def _adalora_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  kept = parts["e"] * lax.stop_gradient(parts["keep"])
  return parts["a"], parts["b"] * _along(kept, parts["b"], roles.count("s"))


# Zhang et al., "AdaLoRA" (arXiv:2303.10512), eq. 3: W' = W + P L Q. What is pruned is masked, so that shapes stay.
ADALORA = Variant({"a": "a", "b": "b", "e": "magnitude"}, _adalora_shapes, _adalora_start, _adalora_factors)


# ----------------------------------------------------------------------------------------------------------------------
# Products of products: LoHa and LoKr.


def _loha_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  first = _lora_shapes(shape, roles, rank)
  return {**first, "a2": first["a"], "b2": first["b"]}


def _loha_start(start: Start) -> dict[str, jax.Array]:
  keys = jax.random.split(start.key, 3)
  return {
    "a": start.first(keys[0], start.a_shape),
    "b": start.init(keys[1], start.b_shape, start.dtype, start.rank, start.rank),
    "a2": start.init(keys[2], start.a_shape, start.dtype, start.rank, start.rank),
    "b2": start.zeros(start.b_shape),
  }


def _pairs(x: jax.Array, y: jax.Array, rank_axis: int) -> jax.Array:
  """Every row of `x` times every row of `y`, elementwise: `(*stack, rank^2, *own)`."""
  rows = lax.expand_dims(x, (rank_axis + 1,)) * lax.expand_dims(y, (rank_axis,))
  return lax.collapse(rows, rank_axis, rank_axis + 2)


def _loha_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  """`(A B) o (A2 B2) = sum_{r, q} (A_r o A2_q) (B_r o B2_q)`: a product of rank^2 terms."""
  stack = roles.count("s")
  return _pairs(parts["a"], parts["a2"], stack), _pairs(parts["b"], parts["b2"], stack)


# Hyeon-Woo et al., "FedPara" (arXiv:2108.06098), prop. 1; LoHa in LyCORIS (arXiv:2309.14859), eq. 8.
LOHA = Variant({"a": "a", "b": "b", "a2": "a", "b2": "b"}, _loha_shapes, _loha_start, _loha_factors)

_LOKR_BLOCK = 8  # the effective rank is rank x the output blocks


def _blocks(size: int) -> int:
  """The largest divisor that is at most the square root, and at most 8."""
  return max(k for k in range(1, min(_LOKR_BLOCK, math.isqrt(size)) + 1) if size % k == 0)


def _lokr_shapes(shape: tuple[int, ...], roles: str, rank: int) -> Shapes:
  stack, fan_in, fan_out = _stack(shape, roles), fan(shape, roles, "i"), fan(shape, roles, "o")
  rows, columns = _blocks(fan_in), _blocks(fan_out)
  return {
    "a": (*stack, rank, fan_in // rows),
    "b": (*stack, rank, fan_out // columns),
    "c": (*stack, rows, columns),
  }


def _lokr_start(start: Start) -> dict[str, jax.Array]:
  shapes = _lokr_shapes(jnp.shape(start.base), start.roles, start.rank)
  a_key, c_key = jax.random.split(start.key)
  return {
    "a": start.first(a_key, shapes["a"]),
    "b": start.zeros(shapes["b"]),
    "c": jax.random.normal(c_key, shapes["c"], start.dtype),
  }


def _lokr_factors(parts: Parts, roles: str) -> tuple[jax.Array, jax.Array]:
  """`C (x) (A B) = sum_{r, q} (C_q (x) A_r) (e_q (x) B_r)`, q over the columns of C: rank x columns terms."""
  shape, stack = jnp.shape(parts["base"]), _stack(jnp.shape(parts["base"]), roles)
  a, b, c = parts["a"], parts["b"], parts["c"]
  columns = c.shape[-1]
  one = jnp.eye(columns, dtype=b.dtype)
  first = jnp.einsum("...pq,...ri->...rqpi", c, a)
  second = jnp.einsum("pq,...ri->...rqpi", one, b)
  wide = columns * a.shape[-2]
  sizes = [tuple(size for size, role in zip(shape, roles, strict=True) if role == own) for own in "io"]
  return lax.reshape(first, (*stack, wide, *sizes[0])), lax.reshape(second, (*stack, wide, *sizes[1]))


# LyCORIS (arXiv:2309.14859), eq. 9, the second Kronecker factor a low-rank product.
LOKR = Variant({"a": "a", "b": "b", "c": "magnitude"}, _lokr_shapes, _lokr_start, _lokr_factors)

VARIANTS: dict[str, Variant] = {
  "lora": LORA,
  "lora_fa": LORA_FA,
  "dora": DORA,
  "dora_exact": DORA_EXACT,
  "vera": VERA,
  "adalora": ADALORA,
  "loha": LOHA,
  "lokr": LOKR,
}
