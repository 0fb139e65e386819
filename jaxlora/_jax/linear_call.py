"""A linear call with a say in its transpose.

`jax.custom_derivatives.linear_call` has no rule for batching, and none for tangents of its residuals, which second
derivatives need.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any

import jax
from jax.extend import core as jex_core

from jaxlora._jax.by_platform import EVERYWHERE, Form, by_platform
from jaxlora._jax.jaxpr import without_dead_code
from jaxlora._jax.trace_cache import traced_once

try:
  from jax.extend.core import Primitive
  from jax.interpreters import ad, batching, mlir

  _ = ad.primitive_jvps, ad.primitive_transposes, batching.primitive_batchers, mlir.register_lowering, mlir.lower_fun
except (
  ImportError,
  AttributeError,
):  # a JAX that moved them: a linear call gives way to a plain one, and memory is saved no longer
  Primitive = None  # type: ignore[assignment,misc]

# From residuals, the cotangents of all results and the types of the flat linear operands to their flat cotangents.
Transpose = Callable[[Any, Any, Sequence[Any]], Sequence[Any]]

Transposes = Mapping[str, Form]  # of `Transpose`s, by platform, as JAX names it, or `EVERYWHERE`


def linear_call(
  fn: Callable[[Any, Any], Any],
  before: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]],
  residuals: Any,
  linear: Any,
  transposes: Transposes | None = None,
) -> Any:
  """`fn(residuals, linear)`, where the transpose in `linear` first puts its residuals through `before`.

  Args:
    fn: linear in its second argument.
    before: from flat residuals and flat cotangents to the residuals that the transpose uses, of the same types.
    residuals: pytree of arrays.
    linear: pytree of arrays.
    transposes: those that programs for some platforms are given instead. They read what the default one reads.
      Batching drops them.

  Returns:
    What `fn` returns.
  """
  if Primitive is None:
    return fn(residuals, linear)
  kept, kept_def = jax.tree.flatten(residuals)
  moving, moving_def = jax.tree.flatten(linear)
  out_def: Any = None

  def flat(*leaves):
    nonlocal out_def
    split = len(kept)
    out = fn(jax.tree.unflatten(kept_def, leaves[:split]), jax.tree.unflatten(moving_def, leaves[split:]))
    out, out_def = jax.tree.flatten(out)
    return out

  jaxpr, used = without_dead_code(jax.make_jaxpr(flat)(*kept, *moving), len(moving))
  used, all_kept = used[: len(kept)], kept
  kept = [value for value, use in zip(kept, used, strict=True) if use]
  gone = tuple(None if use else jax.typeof(value) for value, use in zip(all_kept, used, strict=True))
  forms = tuple(
    (name, form.mapped(lambda fn: _Given(fn, kept_def, gone, out_def))) for name, form in (transposes or {}).items()
  )
  out = _linear_call_p().bind(*kept, *moving, jaxpr=jaxpr, before=before, count=len(kept), transposes=forms)
  return jax.tree.unflatten(out_def, out)


@dataclasses.dataclass(frozen=True)
class _Given:
  """A transpose that was given, of flat residuals and cotangents."""

  fn: Transpose
  kept_def: Any
  gone: tuple[Any, ...]  # for each residual that the linear call does not keep its type, else `None`
  out_def: Any

  def __call__(self, residuals: Sequence[Any], cotangents: Sequence[Any], types: Sequence[Any]) -> Sequence[Any]:
    kept = iter(residuals)
    full = [next(kept) if gone is None else ad.zeros_like_aval(gone) for gone in self.gone]  # which nothing reads
    tree = jax.tree.unflatten(self.kept_def, full)
    return self.fn(tree, jax.tree.unflatten(self.out_def, cotangents), types)


@dataclasses.dataclass(frozen=True)
class _Transpose:
  """The transpose of a linear call, as a function of its residuals and of the cotangents that are not zero."""

  jaxpr: Any
  before: Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
  types: tuple[Any, ...]  # of the linear operands
  zeros: tuple[Any, ...]  # for each cotangent that is zero its type, else `None`
  given: tuple[tuple[str, Form], ...]  # of `_Given`s

  def __call__(self, residuals: Sequence[Any], cotangents: Sequence[Any]) -> Sequence[Any]:
    if not self.given:
      return self.default(residuals, cotangents)
    forms = {name: form.mapped(lambda fn: functools.partial(self.by, fn)) for name, form in self.given}
    if EVERYWHERE in forms and not forms[EVERYWHERE].single_device:
      return forms[EVERYWHERE].fn(residuals, cotangents)
    return by_platform(self.default, forms, residuals, cotangents)

  def default(self, residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    kept, fn = self.before(residuals, cotangents), jex_core.jaxpr_as_fun(self.jaxpr)
    transpose = jax.linear_transpose(lambda *linear: fn(*kept, *linear), *self.types)
    return list(transpose(self.full(cotangents)))

  def by(self, given: Any, residuals: Sequence[Any], cotangents: Sequence[Any]) -> list[Any]:
    return list(given(residuals, self.full(cotangents), self.types))

  def full(self, cotangents: Sequence[Any]) -> list[Any]:
    """All cotangents, zeros included."""
    given = iter(cotangents)
    return [next(given) if zero is None else ad.instantiate_zeros(ad.Zero(zero)) for zero in self.zeros]


@functools.cache
def _linear_call_p() -> Any:
  primitive = Primitive("jaxlora_linear_call")
  primitive.multiple_results = True

  def impl(*args, jaxpr, before, count, transposes):
    del before, count, transposes
    return jex_core.jaxpr_as_fun(jaxpr)(*args)

  def abstract_eval(*args, jaxpr, before, count, transposes):
    del args, before, count, transposes
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

  def transpose(cotangents, *args, jaxpr, before, count, transposes):
    moving = [cotangent for cotangent in cotangents if type(cotangent) is not ad.Zero]
    # Not only shapes: under shard_map types say what differs between shards.
    types = tuple(arg.aval for arg in args[count:])
    zeros = tuple(cotangent.aval if type(cotangent) is ad.Zero else None for cotangent in cotangents)
    moved = traced_once(_Transpose(jaxpr, before, types, zeros, transposes), args[:count], moving)
    return [None] * count + list(moved)

  def batch(args, dims, *, jaxpr, before, count, transposes):
    del transposes
    mapped = jax.vmap(jex_core.jaxpr_as_fun(jaxpr), in_axes=tuple(dims))
    out = primitive.bind(*args, jaxpr=jax.make_jaxpr(mapped)(*args), before=before, count=count, transposes=())
    return out, [0] * len(out)

  primitive.def_impl(impl)
  primitive.def_abstract_eval(abstract_eval)
  ad.primitive_jvps[primitive] = jvp
  ad.primitive_transposes[primitive] = transpose
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, mlir.lower_fun(impl, multiple_results=True))
  return primitive
