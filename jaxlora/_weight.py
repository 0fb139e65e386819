"""The leaf nodes: `LoraWeight`, a frozen base beside its trainable factors, and `FullWeight`, a leaf trained whole."""

from collections.abc import Callable, Collection
import dataclasses
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp

ROLES = "ios"  # contracted with the input, free (goes to the output), stacked
RANK = "r"  # label of the rank axis beside the weight's own axes

SCALINGS: dict[str, Callable[[float, int], float]] = {
  "standard": lambda alpha, rank: alpha / rank,
  "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


def factor_axes(roles: str, own: str) -> tuple[Any, ...]:
  """Which of the weight's axes a factor holds, in its own order: `(*stack, rank, *own)`.

  `own` is `"i"` for A and `"o"` for B. The rank leads the factor's own axes (invariant 2 of `LoraWeight`).
  """
  stack = [d for d, role in enumerate(roles) if role == "s"]
  return (*stack, RANK, *(d for d, role in enumerate(roles) if role == own))


def factor_shape(shape: tuple[int, ...], roles: str, own: str, rank: int) -> tuple[int, ...]:
  """The shape of the factor that holds the axes of role `own`."""
  return tuple(rank if d == RANK else shape[d] for d in factor_axes(roles, own))


def low_rank_delta(a: jax.Array, b: jax.Array, roles: str) -> jax.Array:
  """`sum_r a[..., r, in] b[..., r, out]` laid out as the weight: the product that the hot path never forms."""
  number = {RANK: len(roles)}
  a_axes = [number.get(d, d) for d in factor_axes(roles, "i")]
  b_axes = [number.get(d, d) for d in factor_axes(roles, "o")]
  return jnp.einsum(a, a_axes, b, b_axes, list(range(len(roles))), precision="highest")


def wider_dtype(x: Any, y: Any) -> jnp.dtype:
  """The floating dtype that holds the values of both, however strict the user's own promotion is."""
  x, y = sorted((jnp.dtype(x), jnp.dtype(y)), key=lambda dtype: dtype.itemsize)
  if x == y:
    return x
  if x.itemsize == 1:  # JAX promotes no 8-bit floats; every wider one holds their values
    return y if y.itemsize > 1 else jnp.dtype(jnp.float32)
  with jax.numpy_dtype_promotion("standard"):
    return jnp.promote_types(x, y)


class _NotAnArray:
  """Adapted leaves are not arrays; code that takes them for one is told what to do."""

  def __array__(self, *_: Any, **__: Any) -> NoReturn:  # NumPy would make an array of one object
    self.__jax_array__()

  def __jax_array__(self) -> NoReturn:
    raise TypeError(
      f"a {type(self).__name__} was used as an array. Call the function through jaxlora.wrap(fn), or turn the tree"
      " into plain parameters first with jaxlora.merge(tree)."
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoraWeight(_NotAnArray):
  """One adapted weight: a frozen base and the factors of its low-rank update.

      W' = base + scale * sum_r a[..., r, in] b[..., r, out],    scale = alpha / rank   (alpha / sqrt(rank): rsLoRA)

  Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq. 3. There a weight is written
  (out, in) and acts from the left, `W x + B A x`, with A of shape (rank, in) and B of shape (out, rank). So the paper's
  A is our `a`, and the paper's B is our `b` transposed: a 512 x 64 weight (64 inputs, 512 outputs) at rank 8 has an
  8 x 64 A with 512 parameters and a B with 512 x 8 = 4,096 of them, 4,608 together, 86 % fewer than 32,768. A Flax
  kernel stores that weight as (64, 512), roles `"io"`; a (512, 64) array that is multiplied from the left has roles
  `"oi"`. Either way `a` is (8, 64) and `b` is (8, 512).

  Invariants:
    1. `base` has the shape of W. Every axis of W has one role: `i` (contracted with the input), `o` (free, goes to the
       output) or `s` (stacked: shared by W, A and B, such as scanned layers or experts).
    2. `a` has shape `(*stack, rank, *in)` and `b` has shape `(*stack, rank, *out)`, each in the order of W's axes.
    3. All of roles, rank, alpha, scaling and dropout are static: trees that differ in them have different structures.
    4. In the halves that `split` makes, `base` or both factors are `None`.

  Attributes:
    base: the frozen weight, any float dtype.
    a: factor over the contracted axes.
    b: factor over the free axes; zero at first.
    roles: one letter per axis of W.
    rank: number of terms of the update.
    alpha: numerator of the scale.
    scaling: `"standard"` or `"rslora"`.
    dropout: probability that an element of the adapter's input is dropped, in training.
  """

  base: Any
  a: Any
  b: Any
  roles: str = dataclasses.field(default="io", metadata={"static": True})
  rank: int = dataclasses.field(default=8, metadata={"static": True})
  alpha: float = dataclasses.field(default=8.0, metadata={"static": True})
  scaling: str = dataclasses.field(default="standard", metadata={"static": True})
  dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

  @property
  def scale(self) -> float:
    """The factor in front of the low-rank product."""
    return SCALINGS[self.scaling](self.alpha, self.rank)

  @property
  def shape(self) -> tuple[int, ...]:
    return self.base.shape

  @property
  def dtype(self) -> Any:
    return self.base.dtype

  @property
  def ndim(self) -> int:
    return len(self.roles)

  def delta(self) -> jax.Array:
    """The update `scale * A B` as an array of W's shape, in the factors' dtype."""
    return low_rank_delta(self.a, self.b * jnp.asarray(self.scale, self.b.dtype), self.roles)

  def materialize(self) -> jax.Array:
    """`base + scale * A B` as one array, formed in the widest dtype of the three and returned in the base's."""
    wide = wider_dtype(self.base.dtype, wider_dtype(self.a.dtype, self.b.dtype))
    delta = dataclasses.replace(self, a=self.a.astype(wide), b=self.b.astype(wide)).delta()
    return (self.base.astype(wide) + delta).astype(self.base.dtype)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FullWeight(_NotAnArray):
  """One leaf trained whole (a bias, a norm, a new head): `value` trains, `base` is kept so that `strip` is exact.

  Attributes:
    base: the original leaf, frozen.
    value: the leaf in training, of the same shape and dtype.
  """

  base: Any
  value: Any


Adapted = LoraWeight | FullWeight


def is_adapted(node: Any) -> bool:
  """Whether a node is one of ours: the `is_leaf` of every walk over a combined tree."""
  return isinstance(node, Adapted)


def parts(node: Adapted) -> dict[str, Any]:
  """What a node holds by name: its fields that are not static."""
  fields = (field for field in dataclasses.fields(node) if not field.metadata.get("static"))
  return {field.name: getattr(node, field.name) for field in fields}


def check_parts(node: Adapted, path: str, needed: Collection[str] = ("base", "a", "b", "value")) -> None:
  """Raises unless `node` has the parts that are needed, naming the leaf and what is missing."""
  missing = [name for name, part in parts(node).items() if part is None and name in needed]
  if missing:
    raise ValueError(
      f"{path}: {', '.join(missing)} missing: this is one half of a split tree. Put the halves together with"
      " jaxlora.join(frozen, trainable)."
    )


def check_weight(node: Adapted, path: str) -> None:
  """Raises unless the parts of `node` are there and fit together, naming the leaf, what was found and expected."""
  check_parts(node, path)
  shape = jnp.shape(node.base)
  if isinstance(node, FullWeight):
    if jnp.shape(node.value) != shape:
      raise ValueError(f"{path}: value has shape {jnp.shape(node.value)}, expected the base's, {shape}. {_REFIT}")
    return
  if len(node.roles) != len(shape):
    raise ValueError(
      f"{path}: roles {node.roles!r} name {len(node.roles)} axes, the base has shape {shape}. A transformation"
      " may have added or removed an axis; roles have one letter per axis of the base."
    )
  for name, own in (("a", "i"), ("b", "o")):
    found = jnp.shape(getattr(node, name))
    expected = factor_shape(shape, node.roles, own, node.rank)
    if found != expected:
      raise ValueError(
        f"{path}: factor {name} has shape {found}, expected {expected} for a base of shape {shape} with roles"
        f" {node.roles!r} and rank {node.rank}. {_REFIT}"
      )


_REFIT = (
  "It belongs to another base or another rank: join it with the base that it was made for, or adapt this one anew"
  " (jaxlora.adapt)."
)
