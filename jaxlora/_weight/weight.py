"""The leaf nodes: `LoraWeight`, a frozen base beside its trainable factors, and `FullWeight`, a leaf trained whole."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.coded import decoded, is_coded
from jaxlora._base.dtypes import wider_dtype
from jaxlora._base.export import serialised_dataclass
from jaxlora._base.memory import moved, on_device, space_of
from jaxlora._weight.aside import Aside
from jaxlora._weight.describe import full_line, is_array, lora_line
from jaxlora._weight.node import Node
from jaxlora._weight.roles import factor_axes, low_rank_delta, times_gain
from jaxlora._weight.variant import Variant, variant_named

SCALINGS: dict[str, Callable[[float, int], float]] = {
  "standard": lambda alpha, rank: alpha / rank,
  "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


UNIT_SCALE: dict[str, Callable[[int], float]] = {"standard": float, "rslora": math.sqrt}  # rank -> alpha of scale 1


@serialised_dataclass
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class LoraWeight(Node):
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
    3. All of roles, rank, alpha, scaling, dropout and variant are static: trees that differ in them have different
       structures. `sure` is static, too, but no part of the structure: a tree that was loaded is that which was saved.
    4. In the halves that `split` makes, what belongs to the other half is `None`.
    5. `extra` holds what the variant adds, by name, and the starting factors `a0` and `b0` of an initialiser whose
       update is not zero at first: the weight stands for `base + scale (A B - A0 B0)` then, and `base` for itself.

  Attributes:
    base: the frozen weight, any float dtype.
    a: factor over the contracted axes.
    b: factor over the free axes; zero at first.
    roles: one letter per axis of W.
    rank: number of terms of the update.
    alpha: numerator of the scale.
    scaling: `"standard"` or `"rslora"`.
    dropout: probability that an element of the adapter's input is dropped, in training.
    variant: which member of the family this is; `"lora"` has no further parts.
    extra: further parts, by name.
    sure: whether something tells the roles for certain: `axes`, a probe, the type of the module, the shape of a bias.
      Where nothing does, `wrap` checks them at the first trace, and `jaxlora.peft.save` wants a name, at least.
  """

  base: Any
  a: Any
  b: Any
  roles: str = dataclasses.field(default="io", metadata={"static": True})
  rank: int = dataclasses.field(default=8, metadata={"static": True})
  alpha: float = dataclasses.field(default=8.0, metadata={"static": True})
  scaling: str = dataclasses.field(default="standard", metadata={"static": True})
  dropout: float = dataclasses.field(default=0.0, metadata={"static": True})
  variant: str = dataclasses.field(default="lora", metadata={"static": True})
  extra: dict[str, Any] = dataclasses.field(default_factory=dict)
  sure: bool = dataclasses.field(default=True, metadata={"static": True})

  def __post_init__(self) -> None:
    object.__setattr__(self, "sure", Aside(self.sure))

  @classmethod
  def from_factors(
    cls,
    base: Any,
    a: Any,
    b: Any,
    roles: str = "io",
    *,
    alpha: float | None = None,
    scaling: str = "standard",
    dropout: float = 0.0,
    variant: str = "lora",
    sure: bool = True,
    **extra: Any,
  ) -> "LoraWeight":
    """A weight of given factors; the rank is theirs.

        W' = base + scale * sum_r a[..., r, in] b[..., r, out]

    Args:
      base: the frozen weight; `None` for the trainable half of a tree.
      a: `(*stack, rank, *in)`.
      b: `(*stack, rank, *out)`.
      roles: one letter per axis of the base.
      alpha: numerator of the scale; `None` for a scale of 1.
      scaling, dropout, variant: as for `LoraConfig`.
      sure: whether something tells the roles for certain.
      **extra: what the variant adds, by name.

    Raises:
      ValueError: if a and b differ in rank.

    Example:
      >>> import jax.numpy as jnp
      >>> LoraWeight.from_factors(jnp.zeros((6, 5)), jnp.ones((2, 6)), jnp.ones((2, 5)))
      LoraWeight(6x5 io, rank 2, f32)
    """
    ranks = {jnp.shape(factor)[roles.count("s")] for factor in (a, b)}
    if len(ranks) > 1:
      raise ValueError(
        f"from_factors: a has shape {jnp.shape(a)} and b {jnp.shape(b)}; expected one rank, behind the stacked axes of"
        f" roles {roles!r}."
      )
    (rank,) = ranks
    alpha = UNIT_SCALE[scaling](rank) if alpha is None else alpha
    return cls(base, a, b, roles, rank, alpha, scaling, dropout, variant, extra, sure)

  @property
  def kind(self) -> Variant:
    """The functions of its variant."""
    return variant_named(self.variant)

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

  def parts(self) -> dict[str, Any]:
    return {"base": self.base, "a": self.a, "b": self.b, **self.extra}

  def with_parts(self, changes: Mapping[str, Any]) -> "LoraWeight":
    own: dict[str, Any] = {name: part for name, part in changes.items() if name not in self.extra}
    more = {name: part for name, part in changes.items() if name in self.extra}
    if more:
      own["extra"] = {**self.extra, **more}
    return dataclasses.replace(self, **own)

  def __repr__(self) -> str:
    return lora_line(self, self._known_sizes())

  def _known_sizes(self) -> list[Any]:
    """The weight's sizes, from its base or, in a half without one, its factors; "?" for an axis that neither has."""
    if is_array(self.base):
      return list(self.base.shape)
    sizes: dict[Any, Any] = {}
    for own, factor in (("i", self.a), ("o", self.b)):
      axes = factor_axes(self.roles, own)
      if is_array(factor) and len(factor.shape) == len(axes):
        sizes |= zip(axes, factor.shape, strict=True)
    return [sizes.get(axis, "?") for axis in range(len(self.roles))]

  def factors(self) -> tuple[jax.Array, jax.Array]:
    """The effective factors: the adapted weight is `base + sum_r a b`, times the gain of variants that have one.

    Their rank is the update's own for LoRA, and larger for variants whose update is a sum of more terms.
    """
    a, b = self.kind.factors(self.parts(), self.roles)
    if "a0" in self.extra:
      axis = self.roles.count("s")
      a0, b0 = lax.stop_gradient((self.extra["a0"], self.extra["b0"]))
      a, b = lax.concatenate([a, a0], axis), lax.concatenate([b, -b0], axis)
    return a, b if self.scale == 1 else b * jnp.asarray(self.scale, b.dtype)

  def gain(self, a: jax.Array, b: jax.Array) -> jax.Array | None:
    """The variant's gain over the outputs, laid out as a factor of rank 1, from `factors()`; `None` without one."""
    return None if self.kind.gain is None else self.kind.gain(self.parts(), self.roles, a, b)

  def delta(self) -> jax.Array:
    """The update `scale * A B`, before any gain, as an array of W's shape in the factors' dtype."""
    return low_rank_delta(*self.factors(), self.roles)

  def materialize(self, dtype: Any = None) -> jax.Array:
    """The adapted weight as one array, formed in the widest dtype of its parts and of `dtype`.

    It is returned in `dtype`, or in the base's, and in the memory of the base.
    """
    held = {name: decoded(on_device(part)) for name, part in self.parts().items()}
    dtype = self.base.dtype if dtype is None else jnp.dtype(dtype)
    wide = functools.reduce(wider_dtype, [part.dtype for part in held.values()], dtype)
    here = self.with_parts(held)
    a, b = here.with_parts({name: part.astype(wide) for name, part in held.items()}).factors()
    whole = held["base"].astype(wide) + low_rank_delta(a, b, self.roles)
    return moved(times_gain(whole, here.gain(a, b), self.roles).astype(dtype), space_of(self.base))


@serialised_dataclass
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class FullWeight(Node):
  """One leaf trained whole (a bias, a norm, a new head): `value` trains, `base` is kept so that `strip` is exact.

  Attributes:
    base: the original leaf, frozen.
    value: the leaf in training, of the same shape and dtype.
  """

  base: Any
  value: Any

  def parts(self) -> dict[str, Any]:
    return {"base": self.base, "value": self.value}

  def with_parts(self, changes: Mapping[str, Any]) -> "FullWeight":
    return dataclasses.replace(self, **changes)

  def __repr__(self) -> str:
    return full_line(self)


Adapted = LoraWeight | FullWeight


def is_adapted(node: Any) -> bool:
  """Whether a node is one of ours: the `is_leaf` of every walk over a combined tree."""
  return isinstance(node, Adapted)


def is_leaf_node(node: Any) -> bool:
  """Whether a node stands for one array, adapted or coded: the `is_leaf` of every walk over leaves."""
  return is_adapted(node) or is_coded(node)


def parts(node: Adapted) -> dict[str, Any]:
  """The arrays that a node holds, by name."""
  return node.parts()


def with_parts(node: Any, changes: Mapping[str, Any]) -> Any:
  """The node with some of its parts replaced."""
  return node.with_parts(changes)


def trained_parts(node: Adapted) -> Mapping[str, str]:
  """The parts of a node that train, each with its label."""
  return {"value": "full"} if isinstance(node, FullWeight) else node.kind.trains


def start_subtracted(weight: LoraWeight, cancels: bool = False) -> LoraWeight:
  """The weight with the update that it starts from subtracted by frozen copies of its factors, `a0` and `b0`.

  Nothing has to be subtracted where the product of the factors is zero but for rounding (`cancels`), unless their dtype
  is so narrow that rounding is no longer small.
  """
  if cancels and weight.a.dtype.itemsize >= 4:
    return weight
  start = {"a0": jnp.array(weight.a, copy=True), "b0": jnp.array(weight.b, copy=True)}  # training may donate factors
  return dataclasses.replace(weight, extra={**weight.extra, **start})
