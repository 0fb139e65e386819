"""A quantised weight without an adapter, as the transform carries it."""

import dataclasses
from typing import Any, ClassVar

import jax

from jaxlora._transform.coded import Coded
from jaxlora._transform.factored import QUANTISED, TracedWeight

CODES = "codes"  # the way of its products, for `explain`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FrozenWeight(TracedWeight):
  """A frozen weight that is codes. Its roles say nothing: all axes have the letter `o`."""

  base: Coded
  roles: str = dataclasses.field(metadata={"static": True})
  path: str = dataclasses.field(metadata={"static": True})
  key: Any = None

  formed: ClassVar[str] = QUANTISED

  @classmethod
  def of(cls, base: Coded, path: str) -> "FrozenWeight":
    return cls(base, "o" * base.ndim, path)

  def on(self, base: Coded) -> "FrozenWeight":
    """The same with another base."""
    return FrozenWeight.of(base, self.path)

  def mapped(self, by: Any, **changes: Any) -> "FrozenWeight":
    del by  # it has no factors
    return self.replace(**changes)

  def array(self) -> jax.Array:
    return self.base.dequantize()

  def together(self) -> "FrozenWeight":
    return self

  def along_first(self) -> tuple[dict[str, Any], Any]:
    return {"base": self.base.along_first()}, lambda here: self.on(here["base"].in_one_step())


def stand_in(value: Any) -> Any:
  """What the function is traced on in the place of a value."""
  base = value.base if isinstance(value, TracedWeight) else value
  return base.like if isinstance(base, Coded) else base
