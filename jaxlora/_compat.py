"""The only file that touches what JAX does not promise.

Everything private is imported under a guard and has a fallback that keeps results right: losing one costs a name in
a profile or a source line in a warning, never an answer. A control-flow equation whose parameters cannot be read
gives `None` here, and the transform then materialises instead of guessing.
"""

from collections.abc import Callable, Iterator, Sequence
import contextlib
import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core as jex_core
import jax.numpy as jnp

try:
  from jax._src import source_info_util
except ImportError:  # a JAX that moved it: profiles lose the user's names, results stay right
  source_info_util = None  # type: ignore[assignment]

try:
  from jax._src.core import is_concrete
except ImportError:  # a JAX that moved it: layers that are alike are traced one by one

  def is_concrete(x: Any) -> Any:
    del x
    return True


try:
  from jax.extend.core import Primitive
  from jax.interpreters import ad, batching, mlir
except ImportError:  # a JAX that moved them: `linear_call` gives way to a plain call, and memory is saved no longer
  Primitive = None  # type: ignore[assignment,misc]

try:
  from jax.experimental.xla_metadata import set_xla_metadata
except ImportError:  # a JAX that moved it: XLA's CPU backend keeps more for the backward pass
  set_xla_metadata = None  # type: ignore[assignment]

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


def staged(value: Any) -> bool:
  """Whether an array is only traced, and nothing is computed yet."""
  return isinstance(value, jax.core.Tracer) and not is_concrete(value)


@functools.lru_cache(maxsize=512)
def _once(fn: Callable[..., Any], *where: Any) -> Callable[..., Any]:
  del where

  def call(*args: Any) -> Any:
    return fn(*args)

  call.__name__ = call.__qualname__ = type(fn).__name__.strip("_").lower()  # in profiles
  return jax.jit(call)


def traced_once(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)`, where functions that are equal are traced, differentiated and lowered once for operands of one type.

  Layers that are alike then cost a fraction of what each would alone. Where arrays are there to compute with, as it is
  outside of `jax.jit`, `fn` is called plainly.
  """
  if all(staged(leaf) for leaf in jax.tree.leaves(args)):
    return _once(fn, jax.default_backend(), jax.device_count())(*args)
  return fn(*args)


def apart(fn: Callable[..., Any], *args: Any) -> Any:
  """`fn(*args)` as a function of its own in the compiled program: it is not computed inside of what reads its results.

  XLA inlines every call but those that say otherwise; an `optimization_barrier` its CPU backend drops.
  """
  if set_xla_metadata is None:
    return fn(*args)
  with set_xla_metadata(inlineable="false"):
    return jax.jit(fn)(*args)


def source_line(eqn: Any) -> str:
  """The user's `file:line (function)` behind an equation; empty where it has none of the user's."""
  if source_info_util is None:
    return ""
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


def varying_axes(value: Any) -> list[str]:
  """The axes of a `shard_map` over which a value differs from shard to shard, as far as its type says so."""
  kind = jax.typeof(value)
  manual = getattr(kind, "mat", None)  # newer JAX keeps more than the names
  return sorted(getattr(kind, "vma", None) or getattr(manual, "varying", None) or ())


def specified_sharding(sharding: Any) -> Any | None:
  """A nested jit's sharding for one operand, or `None` where the user gave none."""
  return sharding if isinstance(sharding, jax.sharding.Sharding) else None


# ----------------------------------------------------------------------------------------------------------------------
# A linear call with a say in its transpose. `jax.custom_derivatives.linear_call` has no rule for batching, and none for
# tangents of its residuals, which second derivatives need.


def linear_call(
  fn: Callable[[Any, Any], Any],
  before: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
  residuals: Any,
  linear: Any,
) -> Any:
  """`fn(residuals, linear)`, where the transpose in `linear` first puts its residuals through `before`.

  Args:
    fn: linear in its second argument.
    before: from flat residuals and flat cotangents to the residuals that the transpose uses, of the same types.
    residuals: pytree of arrays.
    linear: pytree of arrays.

  Returns:
    What `fn` returns.
  """
  if Primitive is None:
    return fn(residuals, linear)
  kept, kept_def = jax.tree.flatten(residuals)
  moving, moving_def = jax.tree.flatten(linear)
  out_def = None

  def flat(*leaves):
    nonlocal out_def
    split = len(kept)
    out = fn(jax.tree.unflatten(kept_def, leaves[:split]), jax.tree.unflatten(moving_def, leaves[split:]))
    out, out_def = jax.tree.flatten(out)
    return out

  jaxpr, used = without_dead_code(jax.make_jaxpr(flat)(*kept, *moving), len(moving))
  kept = [value for value, use in zip(kept, used, strict=False) if use]
  assert out_def is not None
  out = _linear_call_p().bind(*kept, *moving, jaxpr=jaxpr, before=before, count=len(kept))
  return jax.tree.unflatten(out_def, out)


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


@dataclasses.dataclass(frozen=True)
class _Transpose:
  """The transpose of a linear call, as a function of its residuals and of the cotangents that are not zero."""

  jaxpr: Any
  before: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
  types: tuple[Any, ...]  # of the linear operands
  zeros: tuple[Any, ...]  # for each cotangent that is zero its type, else `None`

  def __call__(self, residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
    given = iter(cotangents)
    full = [next(given) if zero is None else ad.instantiate_zeros(ad.Zero(zero)) for zero in self.zeros]
    kept, fn = self.before(residuals, cotangents), jex_core.jaxpr_as_fun(self.jaxpr)
    return jax.linear_transpose(lambda *linear: fn(*kept, *linear), *self.types)(full)


@functools.cache
def _linear_call_p() -> Any:
  primitive = Primitive("jaxlora_linear_call")
  primitive.multiple_results = True

  def impl(*args, jaxpr, before, count):
    del before, count
    return jex_core.jaxpr_as_fun(jaxpr)(*args)

  def abstract_eval(*args, jaxpr, before, count):
    del args, before, count
    return jaxpr.out_avals

  def jvp(primals, tangents, **params):
    count, fn = params["count"], jex_core.jaxpr_as_fun(params["jaxpr"])
    out = primitive.bind(*primals, **params)
    total: Any = [ad.Zero(jax.typeof(value).to_tangent_aval()) for value in out]
    moved = [k for k in range(count) if type(tangents[k]) is not ad.Zero]
    if moved:  # plainly: these are derivatives of the second order

      def of_residuals(*values):
        full = list(primals)
        for k, value in zip(moved, values, strict=True):
          full[k] = value
        return fn(*full)

      _, total = jax.jvp(of_residuals, [primals[k] for k in moved], [tangents[k] for k in moved])
    linear = tangents[count:]
    if any(type(tangent) is not ad.Zero for tangent in linear):
      straight = primitive.bind(*primals[:count], *map(ad.instantiate_zeros, linear), **params)
      total = [ad.add_tangents(*pair) for pair in zip(total, straight, strict=True)]
    return out, total

  def transpose(cotangents, *args, jaxpr, before, count):
    moving = [cotangent for cotangent in cotangents if type(cotangent) is not ad.Zero]
    # Not only shapes: under shard_map types say what differs between shards.
    types = tuple(arg.aval for arg in args[count:])
    zeros = tuple(cotangent.aval if type(cotangent) is ad.Zero else None for cotangent in cotangents)
    moved = traced_once(_Transpose(jaxpr, before, types, zeros), args[:count], moving)
    return [None] * count + list(moved)

  def batch(args, dims, *, jaxpr, before, count):
    mapped = jax.vmap(jex_core.jaxpr_as_fun(jaxpr), in_axes=tuple(dims))
    out = primitive.bind(*args, jaxpr=jax.make_jaxpr(mapped)(*args), before=before, count=count)
    return out, [0] * len(out)

  primitive.def_impl(impl)
  primitive.def_abstract_eval(abstract_eval)
  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=True))
  return primitive


# ----------------------------------------------------------------------------------------------------------------------
# A call with a say in its batching. `jax.custom_batching.custom_vmap` has no reverse mode where nothing is batched.


def batched_call(fn: Callable[..., Any], rule: Callable[[Sequence[bool], Sequence[Any]], Any], *args: Any) -> Any:
  """`fn(*args)`, of one array, computed by `rule(batched, args)` where `jax.vmap` adds an axis to some of `args`.

  Every derivative is that of `fn`, or of the rule where the axis has come first.

  Args:
    fn: a function of arrays.
    rule: from which arguments have the new axis, as their first one, to the result, which has it, too. `None` for its
      result is as if there were no rule.
    *args: arrays.
  """
  if Primitive is None:
    return fn(*args)
  (out,) = _batched_call_p().bind(*args, jaxpr=jax.make_jaxpr(fn)(*args), rule=rule)
  return out


@functools.cache
def _batched_call_p() -> Any:
  primitive = Primitive("jaxlora_batched_call")
  primitive.multiple_results = True

  def impl(*args, jaxpr, rule):
    del rule
    return jex_core.jaxpr_as_fun(jaxpr)(*args)

  def abstract_eval(*args, jaxpr, rule):
    del args, rule
    return jaxpr.out_avals

  def jvp(primals, tangents, *, jaxpr, rule):
    del rule
    moved = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_moved(*values):
      full = list(primals)
      for k, value in zip(moved, values, strict=True):
        full[k] = value
      return jex_core.jaxpr_as_fun(jaxpr)(*full)

    return jax.jvp(of_moved, [primals[k] for k in moved], [tangents[k] for k in moved])

  def batch(args, dims, *, jaxpr, rule):
    batched = [isinstance(dim, int) for dim in dims]
    leading = [jnp.moveaxis(arg, dim, 0) if one else arg for arg, dim, one in zip(args, dims, batched, strict=True)]
    out = rule(batched, leading)
    if out is not None:
      return [out], [0]
    axes = [0 if one else None for one in batched]
    return jax.vmap(jex_core.jaxpr_as_fun(jaxpr), in_axes=axes)(*leading), [0]

  primitive.def_impl(impl)
  primitive.def_abstract_eval(abstract_eval)
  ad.primitive_jvps[primitive] = jvp
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=True))
  return primitive
