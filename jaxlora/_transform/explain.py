"""`explain`: which path each adapted or quantised weight takes through a function, and why."""

from collections.abc import Callable, Sequence
import dataclasses
import types
from typing import Any, NamedTuple
import weakref

import jax

from jaxlora._base.coded import is_coded
from jaxlora._base.text import folded, table
from jaxlora._platform.policy import choose_policy
from jaxlora._transform.frozen import CODES
from jaxlora._transform.held import opened
from jaxlora._transform.record import Record, Use
from jaxlora._transform.wrap import argument_leaves, call
from jaxlora._weight.weight import LoraWeight


class Observed(NamedTuple):
  """How `explain` observes a function that is not to be wrapped.

  Attributes:
    paths: from its arguments to the paths of the adapted weights in them.
    record: the record of a call with these values among its arguments.
    call: `(record, args, kwargs) -> results`, noting what happens in the record.
  """

  paths: Callable[..., Sequence[str]]
  record: Callable[[Sequence[Any]], Record]
  call: Callable[[Record, tuple[Any, ...], dict[str, Any]], Any]


# Functions that call wrapped ones themselves, such as those that `route` returns.
_OBSERVED: weakref.WeakKeyDictionary[Callable[..., Any], Observed] = weakref.WeakKeyDictionary()


def observable(fn: Callable[..., Any], observed: Observed) -> None:
  """Lets `explain` observe `fn` by `observed`."""
  _OBSERVED[fn] = observed


@dataclasses.dataclass(frozen=True)
class Explanation:
  """What `explain` found; prints as a table.

  Attributes:
    uses: every product of an adapted weight, and every place where one was materialised, in program order.
    unused: paths of adapted weights that the function never multiplies by.
    policy: the name of the policy by which the program is written.
    chosen_by: what that was chosen by.
  """

  uses: tuple[Use, ...]
  unused: tuple[str, ...]
  policy: str
  chosen_by: str

  @property
  def materialized(self) -> tuple[Use, ...]:
    """The uses that need the weight as one array."""
    return tuple(use for use in self.uses if not use.factored)

  def __str__(self) -> str:
    return self.text()

  def text(self, *, fold: bool = True) -> str:
    """The table.

    Args:
      fold: whether layers that are alike are one row: `layers_{0-29}/...`.
    """
    return f"{table(self.rows(fold=fold))}\n{self.written_by()}"

  def written_by(self) -> str:
    """The line below the table: the policy, and what it was chosen by."""
    return f"policy: {self.policy}, by {self.chosen_by}"

  def rows(self, *, fold: bool = True) -> list[Sequence[str]]:
    """The table's rows, the first of which is the head; `fold` is that of `text`."""
    head = ("leaf", "path taken", "primitive", "source", "why")
    rows: list[tuple[str, ...]] = []
    for use in self.uses:
      taken, product = ("codes", "x W") if use.way == CODES else ("factored", "x W + s (x A) B")
      taken += f", {use.way}" if use.way not in ("", CODES) else ""
      taken = taken if use.factored else "MATERIALISED"
      rows.append((use.path, taken, use.primitive, use.source, use.reason or product))
    rows.extend((path, "unused", "-", "-", "the function never multiplies by it") for path in self.unused)
    return [head, *(folded(rows) if fold else rows)]


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
  """Says which path each adapted weight takes through `fn`, and why, without running it.

  Args:
    fn: the function or module that `wrap` would wrap, unwrapped; or what `route` returned: the report then says how
      the rows of the mixed batch are computed.
    *args, **kwargs: what it would be called with; arrays may be `jax.ShapeDtypeStruct`s.

  Returns:
    An `Explanation`: fields to compute with, a table when printed.

  Raises:
    ValueError: if no argument holds an adapted weight.
  """
  fn, held = opened(fn)
  args = (*held, *args)
  routed = _OBSERVED.get(fn) if isinstance(fn, types.FunctionType) else None
  nodes, treedef = argument_leaves(args, kwargs)
  if routed is not None:
    paths = routed.paths(*args)
  else:
    paths = [path for path, node in nodes if isinstance(node, LoraWeight) or is_coded(node)]
  if not paths:
    raise ValueError(
      "explain: no argument holds an adapted weight or a quantised one. Make one with jaxlora.adapt(params, config,"
      " key)."
    )
  leaves, inner = jax.tree_util.tree_flatten([node for _, node in nodes])
  record = _plain_record(leaves) if routed is None else routed.record(leaves)
  abstract = [k for k, leaf in enumerate(leaves) if hasattr(leaf, "shape") and hasattr(leaf, "dtype")]

  def traced(arrays):
    full = list(leaves)
    for k, array in zip(abstract, arrays, strict=True):
      full[k] = array
    call_args, call_kwargs = jax.tree_util.tree_unflatten(treedef, jax.tree_util.tree_unflatten(inner, full))
    if routed is not None:
      out = routed.call(record, call_args, call_kwargs)
    else:
      out = call(fn, record, None, call_args, call_kwargs)
    return [leaf for leaf in jax.tree_util.tree_leaves(out) if isinstance(leaf, jax.Array)]

  jax.eval_shape(traced, [leaves[k] for k in abstract])
  used = {use.path for use in record.uses}
  unused = tuple(path for path in paths if path not in used)
  return Explanation(tuple(record.uses), unused, record.policy.name, record.policy.reason)


def _plain_record(values: Sequence[Any]) -> Record:
  return Record("ignore", set(), choose_policy("auto", None, True, values))
