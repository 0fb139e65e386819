"""Jaxprs and their equations: reading them, binding them again, pruning them.

Everything private is imported under a guard and has a fallback that keeps results right: losing one costs a name in a
profile or a source line in a warning, never an answer.
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

try:
  from jax.interpreters import partial_eval as pe
except ImportError:  # a JAX that moved it: more is kept for the backward pass
  pe = None  # type: ignore[assignment]

Literal = jex_core.Literal


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
  """`(jaxpr, consts)` of a closed or an open jaxpr; newer JAX has one class for both."""
  return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def bind(eqn: Any, args: Sequence[Any], **changes: Any) -> list[Any]:
  """Binds an equation again, with its own parameters but for `changes`, and returns its results as a list."""
  params = eqn.primitive.get_bind_params(dict(eqn.params, **changes))
  subfuns: Sequence[Any] = ()
  if isinstance(params, tuple):  # before 0.10: functions apart from parameters
    subfuns, params = params
  out = eqn.primitive.bind(*subfuns, *args, **params)
  return list(out) if eqn.primitive.multiple_results else [out]


@contextlib.contextmanager
def equation_context(eqn: Any, named: bool = True) -> Iterator[None]:
  """What the equation was traced under: the user's name stack and source line, unless without, mesh, compute type."""
  with contextlib.ExitStack() as stack:
    if named and source_info_util is not None:
      info = eqn.source_info
      names = source_info_util.current_name_stack() + info.name_stack
      stack.enter_context(source_info_util.user_context(info.traceback, name_stack=names))
    if hasattr(eqn, "ctx"):
      stack.enter_context(eqn.ctx.manager)
    yield


def context_key(eqn: Any) -> Any:
  """What `equation_context` sets, without the names, as a value to compare."""
  context = getattr(eqn, "ctx", None)
  fields = [name for name in getattr(type(context), "__slots__", ()) if not name.startswith("__")]
  return tuple(repr(getattr(context, name, None)) for name in fields) if fields else context


def source_line(eqn: Any) -> str:
  """The user's `file:line (function)` behind an equation; empty where it has none of the user's."""
  if source_info_util is None:
    return ""
  return source_info_util.summarize(eqn.source_info)


def varying_axes(value: Any) -> list[str]:
  """The axes of a `shard_map` over which a value differs from shard to shard, as far as its type says so."""
  kind = jax.typeof(value)
  manual = getattr(kind, "mat", None)  # newer JAX keeps more than the names
  return sorted(getattr(kind, "vma", None) or getattr(manual, "varying", None) or ())


def specified_sharding(sharding: Any) -> Any | None:
  """A nested jit's sharding for one operand, or `None` where the user gave none."""
  return sharding if isinstance(sharding, jax.sharding.Sharding) else None


def without_dead_code(jaxpr: Any, needed: int = 0) -> tuple[Any, list[bool]]:
  """A closed jaxpr without the equations and the operands that nothing needs, and which operands it still has.

  The last `needed` operands stay in any case. A JAX without `dce_jaxpr` gives the jaxpr back as it is.
  """
  inner, consts = open_jaxpr(jaxpr)
  count = len(inner.invars)
  try:
    keep = [k >= count - needed for k in range(count)]
    pruned, used = pe.dce_jaxpr(inner, [True] * len(inner.outvars), keep)
    return jex_core.ClosedJaxpr(pruned, consts), list(used)
  except (AttributeError, TypeError, ValueError, AssertionError):
    return jaxpr, [True] * count
