"""The only file that touches what JAX does not promise.

Everything private is imported under a guard and has a fallback that keeps results right: losing one costs a name in
a profile or a source line in a warning, never an answer. A control-flow equation whose parameters cannot be read
gives `None` here, and the transform then materialises instead of guessing.
"""

from collections.abc import Iterator, Sequence
import contextlib
from typing import Any

import jax
from jax.extend import core as jex_core

try:
  from jax._src import source_info_util
except ImportError:  # a JAX that moved it: profiles lose the user's names, results stay right
  source_info_util = None  # type: ignore[assignment]

Literal = jex_core.Literal


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """`(jaxpr, consts)` of a closed or an open jaxpr; newer JAX has one class for both."""
  return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(eqn: Any, args: Sequence[Any]) -> list[Any]:
  """Binds an equation again, unchanged, and returns its results as a list."""
  params = eqn.primitive.get_bind_params(eqn.params)
  subfuns: Sequence[Any] = ()
  if isinstance(params, tuple):  # before 0.10: functions apart from parameters
    subfuns, params = params
  out = eqn.primitive.bind(*subfuns, *args, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def equation_context(eqn: Any) -> Iterator[None]:
  """What the equation was traced under: the user's name stack and source line, mesh, compute type."""
  with contextlib.ExitStack() as stack:
    if source_info_util is not None:
      info = eqn.source_info
      names = source_info_util.current_name_stack() + info.name_stack
      stack.enter_context(source_info_util.user_context(info.traceback, name_stack=names))
    if hasattr(eqn, "ctx"):
      stack.enter_context(eqn.ctx.manager)
    yield


def source_line(eqn: Any) -> str:
  """The user's `file:line (function)` behind an equation."""
  if source_info_util is None:
    return "unknown source line"
  return source_info_util.summarize(eqn.source_info)


def scan_counts(params: dict[str, Any]) -> tuple[int, int] | None:
  """`(constants, carries)` among a scan's operands; `None` where its parameters have an unknown form."""
  try:
    if "num_consts" in params:  # up to 0.11
      return params["num_consts"], params["num_carry"]
    consts, carry, _ = params["ft_in"].unpack()  # 0.12
    return len(consts), len(carry)
  except (KeyError, AttributeError, TypeError, ValueError):
    return None


def specified_sharding(sharding: Any) -> Any | None:
  """A nested jit's sharding for one operand, or `None` where the user gave none."""
  return sharding if isinstance(sharding, jax.sharding.Sharding) else None
