"""A function that is lowered in another form for some platforms: one trace serves them all."""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core
from jax.sharding import AxisType

try:
  from jax.extend.core import Primitive
  from jax.interpreters import ad, batching, mlir

  _ = ad.primitive_jvps, batching.primitive_batchers, mlir.register_lowering, mlir.lower_fun
except (ImportError, AttributeError):  # a JAX that moved them: every platform is given the default form
  Primitive = None  # type: ignore[assignment,misc]


try:
  from jax._src.sharding_impls import GSPMDSharding

  GSPMDSharding.get_replicated  # noqa: B018
except (ImportError, AttributeError):  # a JAX that moved it: nothing is said of devices, and compilers choose
  GSPMDSharding = None  # type: ignore[assignment,misc]


class Form(NamedTuple):
  """Another way to compute the same, for one platform.

  Attributes:
    fn: of the same arguments, with results of the same types.
    single_device: whether it is only for programs that run on one device.
    shared: numbers of the flat operands that `jax.vmap` may not map: where it does, the default form is used.
    exported: whether `jax.export` can write it down.
    split: what is taken for one that is for one device alone, in programs that a compiler splits between several. It
      may call `whole`. Without one they have the default form.
  """

  fn: Callable[..., Any]
  single_device: bool = False
  shared: tuple[int, ...] = ()
  exported: bool = True
  split: Callable[..., Any] | None = None

  def mapped(self, change: Callable[[Callable[..., Any]], Callable[..., Any]]) -> "Form":
    """The form whose functions are changed."""
    return self._replace(fn=change(self.fn), split=self.split and change(self.split))


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
  flat = tuple((name, form.mapped(lambda fn: _Flat(fn, treedef))) for name, form in forms.items())
  out = _by_platform_p(tuple(forms)).bind(*leaves, default=traced, forms=flat)
  return jax.tree.unflatten(jax.tree.structure(like), out)


def whole(x: jax.Array) -> jax.Array:
  """`x`, of which each device has all: for forms that are for programs which a compiler splits.

  It says so of any devices. Which ones a program is for is not known where its forms are lowered.
  """
  return jax.lax.with_sharding_constraint(x, GSPMDSharding.get_replicated(tuple(jax.devices())))


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


def _is_split(ctx: Any) -> bool:
  """Whether a compiler splits a program that is being lowered between several devices, as it sees fit.

  Of a mesh with explicit axes types say how arrays lie, and under a `shard_map` over some axes other rules hold.
  """
  several = (getattr(getattr(ctx.module_context, "axis_context", None), "num_devices", None) or 1) > 1
  meshes = [getattr(getattr(aval, "sharding", None), "mesh", None) for aval in ctx.avals_in]
  free = not any(AxisType.Explicit in (getattr(mesh, "axis_types", None) or ()) for mesh in meshes)
  return GSPMDSharding is not None and several and free


def _is_export(ctx: Any) -> bool:
  """Whether a program is being lowered to be written down."""
  return bool(getattr(getattr(ctx.module_context, "lowering_parameters", None), "for_export", False))


def _written(form: Form, ctx: Any) -> Callable[..., Any] | None:
  """The function that a program is given of a form; `None` where the form is not for such a program."""
  if not form.exported and _is_export(ctx):
    return None
  if not form.single_device or _devices(ctx) == 1:
    return form.fn
  return form.split if _is_split(ctx) else None


def _lower(platform: str | None, ctx: Any, *args: Any, default: Any, forms: Sequence[Any]) -> Any:
  written = (_written(form, ctx) for name, form in forms if name in (platform, EVERYWHERE))
  form = next(filter(None, written), None) or jex_core.jaxpr_as_fun(default)
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
      (name, form.mapped(lambda fn: _Mapped(fn, axes)))
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
