"""A function that is lowered in another form for some platforms: one trace serves them all."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core

try:
  from jax.extend.core import Primitive
  from jax.interpreters import ad, batching, mlir

  _ = ad.primitive_jvps, batching.primitive_batchers, mlir.register_lowering, mlir.lower_fun
except (ImportError, AttributeError):  # a JAX that moved them: every platform is given the default form
  Primitive = None  # type: ignore[assignment,misc]


class Form(NamedTuple):
  """Another way to compute the same, for one platform.

  Attributes:
    fn: of the same arguments, with results of the same types.
    single_device: whether it is only for programs that run on one device.
    shared: numbers of the flat operands that `jax.vmap` may not map: where it does, the default form is used.
    exported: whether `jax.export` can write it down.
  """

  fn: Callable[..., Any]
  single_device: bool = False
  shared: tuple[int, ...] = ()
  exported: bool = True


EVERYWHERE = "everywhere"  # in a platform's place: a form for all platforms that have none of their own


def by_platform(default: Callable[..., Any], forms: Mapping[str, Form], *args: Any) -> Any:
  """`default(*args)`, which compilers of the platforms in `forms` are given in their own form.

  All forms compute the same. Tangents are those of `default`; batching maps every form. Outside of `jax.jit` it is
  `default`, or the form that is for `EVERYWHERE` and for any number of devices.

  Args:
    default: a function of pytrees of arrays.
    forms: platform, as JAX names it, or `EVERYWHERE` -> its form.
    *args: pytrees of arrays.
  """
  if Primitive is None:
    return default(*args)
  leaves, treedef = jax.tree.flatten(args)
  traced, like = jax.make_jaxpr(lambda *leaves: default(*jax.tree.unflatten(treedef, leaves)), return_shape=True)(
    *leaves
  )
  flat = tuple((name, form._replace(fn=_Flat(form.fn, treedef))) for name, form in forms.items())
  out = _by_platform_p(tuple(forms)).bind(*leaves, default=traced, forms=flat)
  return jax.tree.unflatten(jax.tree.structure(like), out)


@dataclasses.dataclass(frozen=True)
class _Flat:
  """A form as a function of flat arrays. It is traced where it is lowered, and only for its platform."""

  fn: Callable[..., Any]
  treedef: Any

  def __call__(self, *leaves: Any) -> list[Any]:
    return jax.tree.leaves(self.fn(*jax.tree.unflatten(self.treedef, leaves)))


@dataclasses.dataclass(frozen=True)
class _Mapped:
  """A form under `jax.vmap`."""

  fn: Callable[..., Any]
  axes: tuple[int | None, ...]

  def __call__(self, *leaves: Any) -> list[Any]:
    return jax.vmap(self.fn, in_axes=self.axes)(*leaves)


def _devices(ctx: Any) -> int | None:
  """How many devices a program that is being lowered runs on; `None` if it does not say.

  What is under a `shard_map` over all axes of its mesh is each device's own, and no compiler splits it: that is one.
  """
  context = getattr(ctx.module_context, "axis_context", None)
  mesh = getattr(context, "mesh", None)
  if mesh is not None and getattr(context, "manual_axes", frozenset()) == {*mesh.axis_names}:
    return 1
  return getattr(context, "num_devices", None) if mesh is None else mesh.size


def _is_export(ctx: Any) -> bool:
  """Whether a program is being lowered to be written down."""
  return bool(getattr(getattr(ctx.module_context, "lowering_parameters", None), "for_export", False))


def _fits(form: Form, ctx: Any) -> bool:
  return (not form.single_device or _devices(ctx) == 1) and (form.exported or not _is_export(ctx))


def _lower(platform: str | None, ctx: Any, *args: Any, default: Any, forms: Sequence[Any]) -> Any:
  fitting = (form.fn for name, form in forms if name in (platform, EVERYWHERE) and _fits(form, ctx))
  form = next(fitting, None) or jex_core.jaxpr_as_fun(default)
  wide = any(getattr(getattr(aval, "dtype", None), "itemsize", 0) == 8 for aval in ctx.avals_in)
  with jax.enable_x64(wide or jax.config.read("jax_enable_x64")):  # as it was traced, wherever it is lowered
    return mlir.lower_fun(form, multiple_results=True)(ctx, *args)


@functools.cache
def _by_platform_p(platforms: tuple[str, ...]) -> Any:
  """The primitive for forms of these platforms."""
  primitive = Primitive("jaxlora_by_platform")
  primitive.multiple_results = True

  def impl(*args, default, forms):
    form = dict(forms).get(EVERYWHERE)
    return jex_core.jaxpr_as_fun(default)(*args) if form is None or form.single_device else form.fn(*args)

  def abstract_eval(*args, default, forms):
    del args, forms
    return default.out_avals

  def jvp(primals, tangents, *, default, forms):
    moved = [k for k, tangent in enumerate(tangents) if type(tangent) is not ad.Zero]

    def of_moved(*values):
      full = list(primals)
      for k, value in zip(moved, values, strict=True):
        full[k] = value
      return jex_core.jaxpr_as_fun(default)(*full)

    _, out_tangents = jax.jvp(of_moved, [primals[k] for k in moved], [tangents[k] for k in moved])
    return primitive.bind(*primals, default=default, forms=forms), out_tangents

  def batch(args, dims, *, default, forms):
    axes = tuple(dims)
    mapped = jax.make_jaxpr(jax.vmap(jex_core.jaxpr_as_fun(default), in_axes=axes))(*args)
    others = tuple(
      (name, form._replace(fn=_Mapped(form.fn, axes)))
      for name, form in forms
      if all(axes[k] is None for k in form.shared)
    )
    out = primitive.bind(*args, default=mapped, forms=others)
    return out, [0] * len(out)

  primitive.def_impl(impl)
  primitive.def_abstract_eval(abstract_eval)
  ad.primitive_jvps[primitive] = jvp
  batching.primitive_batchers[primitive] = batch
  mlir.register_lowering(primitive, functools.partial(_lower, None))
  for platform in {*platforms} - {EVERYWHERE}:
    mlir.register_lowering(primitive, functools.partial(_lower, platform), platform=platform)
  return primitive
