"""Registered products: functions of a user's own that multiply an input by a weight, and their thin products.

    fn(x, W + A B) = fn(x, W) + fn(fn(x, A), B)

Reading order: how operands meet -> one call -> its thin products.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._base.labelled import Labelled
from jaxlora._weight.roles import RANK, factor_axes

# ----------------------------------------------------------------------------------------------------------------------
# How operands meet.


@dataclasses.dataclass(frozen=True)
class Meeting:
  """How a weight meets its input, by the letters of their axes.

  Attributes:
    x, w, out: the letters of the input, of the weight and of the result.
    place: of the weight among the operands, 0 or 1.
  """

  x: str
  w: str
  out: str
  place: int

  @property
  def contracted(self) -> list[int]:
    """The axes of the weight that are summed with the input's."""
    return [d for d, letter in enumerate(self.w) if letter in self.x and letter not in self.out]

  @property
  def free(self) -> list[int]:
    """Those that go to the result alone."""
    return [d for d, letter in enumerate(self.w) if letter not in self.x and letter in self.out]

  @property
  def shared(self) -> list[int]:
    """Those of batches, and of the stacks that further operands pick from."""
    return [d for d in range(len(self.w)) if d not in (*self.contracted, *self.free)]

  @property
  def roles(self) -> str:
    """The roles of a weight that meets its input so."""
    return "".join("i" if d in self.contracted else "o" if d in self.free else "s" for d in range(len(self.w)))

  @property
  def has_thin(self) -> bool:
    """Whether an input that is a rank wide fits: each of its axes is summed or in the result."""
    return bool(self.free) and all(letter in self.w or letter in self.out for letter in self.x)

  def in_order(self, x: Any, w: Any) -> tuple[Any, Any]:
    return (w, x) if self.place == 0 else (x, w)


@dataclasses.dataclass(frozen=True)
class Spec:
  """The letters of every operand and of the result."""

  text: str
  operands: tuple[str, ...]
  out: str

  def meeting(self, place: int) -> Meeting:
    """How the operand at this place, the first or the second, meets the other one."""
    return Meeting(self.operands[1 - place], self.operands[place], self.out, place)


# ----------------------------------------------------------------------------------------------------------------------
# One call.


@dataclasses.dataclass(frozen=True, eq=False)
class Registered:
  """One call of a registered function, as the transform finds it.

  Attributes:
    name: of the function.
    spec: see there.
    thin: the function for the thin products, of the same operands.
  """

  name: str
  spec: Spec
  thin: Callable[..., jax.Array]


# ----------------------------------------------------------------------------------------------------------------------
# Its thin products.


@dataclasses.dataclass(frozen=True, eq=False)
class ThinProducts:
  """`fn(x, A)` and `fn(h, B)`: each factor in the weight's place, the rank in the place of the side that it lacks."""

  registered: Registered
  meeting: Meeting

  def shrink(self, x: jax.Array, a: jax.Array, *rest: jax.Array) -> Labelled:
    """`h`, its axes labelled with the letters of the result, and the rank."""
    meeting = self.meeting
    first, *others = (meeting.w[d] for d in meeting.free)
    h = self.registered.thin(*meeting.in_order(x, self._as_weight(a, "i")), *rest)
    h = jnp.squeeze(h, [meeting.out.index(letter) for letter in others])
    return Labelled(h, tuple(RANK if letter == first else letter for letter in meeting.out if letter not in others))

  def expand(self, h: Labelled, b: jax.Array, dtype: Any, *rest: jax.Array) -> jax.Array:
    """The low-rank part of the result; `h` enters in the dtype that the function's inputs have."""
    meeting = self.meeting
    first, *others = (meeting.w[d] for d in meeting.contracted)
    u = h.ordered([RANK if letter == first else letter for letter in meeting.x if letter not in others])
    u = jnp.expand_dims(u, [meeting.x.index(letter) for letter in others]).astype(dtype)
    return self.registered.thin(*meeting.in_order(u, self._as_weight(b, "o")), *rest)

  def _as_weight(self, factor: jax.Array, own: str) -> jax.Array:
    first, *others = self.meeting.free if own == "i" else self.meeting.contracted
    labels = [RANK if d == first else d for d in range(len(self.meeting.w)) if d not in others]
    return jnp.expand_dims(Labelled(factor, factor_axes(self.meeting.roles, own)).ordered(labels), others)
