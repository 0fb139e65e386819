"""The leaf nodes: `LoraWeight`, a frozen base beside its trainable factors, and `FullWeight`, a leaf trained whole."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import math
from typing import Any, NoReturn

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.dtypes import wider_dtype
from jaxlora._weight.roles import low_rank_delta, times_gain
from jaxlora._weight.variant import VARIANTS, Variant

SCALINGS: dict[str, Callable[[float, int], float]] = {
  "standard": lambda alpha, rank: alpha / rank,
  "rslora": lambda alpha, rank: alpha / math.sqrt(rank),
}


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
    3. All of roles, rank, alpha, scaling, dropout and variant are static: trees that differ in them have different
       structures.
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

  @property
  def kind(self) -> Variant:
    """The functions of its variant."""
    return VARIANTS[self.variant]

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

  def factors(self) -> tuple[jax.Array, jax.Array]:
    """The effective factors: `base + sum_r a b` is the adapted weight, but for a variant's gain.

    Their rank is the update's own for LoRA, and larger for variants whose update is a sum of more terms.
    """
    a, b = self.kind.factors(parts(self), self.roles)
    if "a0" in self.extra:
      axis = self.roles.count("s")
      a0, b0 = lax.stop_gradient((self.extra["a0"], self.extra["b0"]))
      a, b = lax.concatenate([a, a0], axis), lax.concatenate([b, -b0], axis)
    return a, b if self.scale == 1 else b * jnp.asarray(self.scale, b.dtype)

  def gain(self, a: jax.Array, b: jax.Array) -> jax.Array | None:
    """What a variant multiplies outputs with, laid out as a factor of rank 1; `None` for none. Takes `factors()`."""
    return None if self.kind.gain is None else self.kind.gain(parts(self), self.roles, a, b)

  def delta(self) -> jax.Array:
    """The update `scale * A B` as an array of W's shape, in the factors' dtype: what is added before any gain."""
    return low_rank_delta(*self.factors(), self.roles)

  def materialize(self) -> jax.Array:
    """The adapted weight as one array, formed in the widest dtype of its parts and returned in the base's."""
    wide = functools.reduce(wider_dtype, [part.dtype for part in parts(self).values()])
    a, b = with_parts(self, {name: part.astype(wide) for name, part in parts(self).items()}).factors()
    whole = self.base.astype(wide) + low_rank_delta(a, b, self.roles)
    return times_gain(whole, self.gain(a, b), self.roles).astype(self.base.dtype)


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
  """What a node holds, by name."""
  if isinstance(node, FullWeight):
    return {"base": node.base, "value": node.value}
  return {"base": node.base, "a": node.a, "b": node.b, **node.extra}


def with_parts(node: Any, changes: Mapping[str, Any]) -> Any:
  """The node with some of its parts replaced."""
  own = {name: part for name, part in changes.items() if not (isinstance(node, LoraWeight) and name in node.extra)}
  more = {name: part for name, part in changes.items() if name not in own}
  return dataclasses.replace(node, **own, **({"extra": {**node.extra, **more}} if more else {}))


def trained_parts(node: Adapted) -> Mapping[str, str]:
  """The parts of a node that train, each with its label."""
  return {"value": "full"} if isinstance(node, FullWeight) else node.kind.trains


def started(weight: LoraWeight, a: jax.Array, b: jax.Array, cancels: bool = False) -> LoraWeight:
  """The weight with factors, (stack, rank, in) and (stack, rank, out), whose update is taken off again.

  Where their product is zero but for rounding nothing is taken off, unless the dtype rounds to more than that.
  """
  a, b = a.reshape(weight.a.shape).astype(weight.a.dtype), b.reshape(weight.b.shape).astype(weight.b.dtype)
  weight = dataclasses.replace(weight, a=a, b=b)
  if cancels and a.dtype.itemsize >= 4:
    return weight
  start = {"a0": jnp.array(a, copy=True), "b0": jnp.array(b, copy=True)}  # training may donate the factors
  return dataclasses.replace(weight, extra={**weight.extra, **start})
