"""The record of one traced call: what happened to the adapted weights, and the warnings and errors about it."""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
from typing import Any
import warnings

import jax

from jaxlora._jax.jaxpr import source_line
from jaxlora._platform.policy import Policy
from jaxlora._transform.coded import Coded
from jaxlora._transform.factored import QUANTISED, TracedWeight

ON_MATERIALIZE = ("ignore", "warn", "error")


class MaterializeWarning(UserWarning):
  """An adapted weight was formed as one array, because something needs it whole. Right, but slower and larger."""


class MaterializeError(ValueError):
  """The same where `on_materialize="error"` forbids it."""


@dataclasses.dataclass(frozen=True)
class Use:
  """One thing that happened to an adapted weight.

  Attributes:
    path: the leaf's path among the arguments.
    primitive: the JAX primitive.
    factored: whether the weight stayed factored.
    source: the user's source line.
    reason: why it was materialised; empty where it was not.
    way: by which of several ways, where its kind of weight has more than one; empty else.
    formed: what was formed as one array, where it was materialised.
    met: the role of the axes that met the input, `"i"` or `"o"`; empty where it was materialised, or met by both.
  """

  path: str
  primitive: str
  factored: bool
  source: str
  reason: str = ""
  way: str = ""
  formed: str = ""
  met: str = ""


# Another way to evaluate a primitive that no weight reaches: `(bind, operands) -> results`.
Rewrite = Callable[[Callable[..., list[Any]], Sequence[Any]], list[Any]]


class Record:
  """What one traced call did: the uses of each weight, and what to do when one must be materialised.

  Attributes:
    on_materialize: what to do then.
    seen: the places that were warned about. It outlives the call: each is warned about once per wrapped function,
      however often that is traced.
    policy: how products are written.
    rewrites: other ways to evaluate some primitives, by name.
    looping: whether the body of a loop is being interpreted.
    uses: what happened, in program order.
    products: how many products each weight went through, by path.
    places: the user's lines of the equations that enclose the one at hand: inside the jitted functions of `jax.numpy`
      an equation has no line of the user's own.
    jits: the inner jits rebuilt so far.
  """

  def __init__(
    self,
    on_materialize: str,
    seen: set[tuple[str, str, str]],
    policy: Policy,
    rewrites: Mapping[str, Rewrite] | None = None,
  ):
    self.on_materialize = on_materialize
    self.seen = seen
    self.policy = policy
    self.rewrites = rewrites or {}
    self.looping = False
    self.uses: list[Use] = []
    self.products: collections.Counter[str] = collections.Counter()
    self.places: list[str] = []
    self.jits: dict[Any, Any] = {}

  def of_inner_jit(self) -> "Record":
    """A record for the inside of a jit that is rebuilt once and used for several weights: it warns of nothing."""
    inner = Record("ignore", set(), self.policy, self.rewrites)
    inner.looping = self.looping
    return inner

  def source(self, eqn: Any) -> str:
    """The user's line behind an equation, or behind the nearest one around it that has any."""
    return source_line(eqn) or next(filter(None, reversed(self.places)), "")

  @contextlib.contextmanager
  def in_a_loop(self) -> Iterator[None]:
    """While the body of a loop is interpreted."""
    before, self.looping = self.looping, True
    try:
      yield
    finally:
      self.looping = before

  @contextlib.contextmanager
  def in_a_remat(self) -> Iterator[None]:
    """While the inside of a `jax.checkpoint` is interpreted."""
    before, self.policy = self.policy, self.policy.in_remat()
    try:
      yield
    finally:
      self.policy = before

  @contextlib.contextmanager
  def enclosed_by(self, eqn: Any) -> Iterator[None]:
    """While the inside of a control-flow equation is interpreted."""
    self.places.append(source_line(eqn))
    try:
      yield
    finally:
      self.places.pop()

  def materialize(self, w: TracedWeight, primitive: str, source: str, reason: str) -> jax.Array:
    """Forms the weight, and says so."""
    self.report(Use(w.path, primitive, False, source, reason, formed=w.formed), w.key is not None)
    return w.array()

  def dequantized(self, w: TracedWeight, value: Coded, primitive: str, source: str, reason: str) -> jax.Array:
    """Forms the base of a weight, or what became of it, and says so."""
    self.report(Use(w.path, primitive, False, source, reason, formed=QUANTISED), False)
    return value.dequantize(self.policy)

  def used(self, w: TracedWeight, primitive: str, source: str, way: str, met: str) -> None:
    """Notes a product of a weight that stayed factored."""
    self.products[w.path] += 1
    self.uses.append(Use(w.path, primitive, True, source, way=way, met=met))

  def report(self, use: Use, drops: bool) -> None:
    """Notes a materialised weight, and warns or raises as the user chose."""
    self.uses.append(use)
    message = (
      f"{use.path}: {use.formed} at `{use.primitive}` ({use.source or 'unknown source line'}):"
      f" {use.reason}. The result is right, but this costs a weight's worth of memory and gradient"
    )
    remedy = (
      "Leave the leaf in floats (exclude= of jaxlora.quantize)" if use.formed == QUANTISED else "Exclude the leaf"
    )
    if drops:
      message += ", and the adapter's dropout does not act there"
    if self.on_materialize == "error":
      raise MaterializeError(
        f"{message}. {remedy}, rewrite that line, or allow it with wrap(..., on_materialize='warn')."
      )
    place = (use.path, use.primitive, use.source)
    if self.on_materialize == "warn" and place not in self.seen:
      self.seen.add(place)
      warnings.warn(
        f"{message}. {remedy}, or silence this with wrap(..., on_materialize='ignore').",
        MaterializeWarning,
        stacklevel=2,
      )
