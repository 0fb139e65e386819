"""An adapted weight as the attribute of its module: reads as the merged weight, and cannot be written.

So does one in a list or a dictionary that is an attribute.
"""

from collections.abc import Mapping
import functools
import types
from typing import Any, NoReturn

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.coded import is_coded
from jaxlora._weight.weight import FullWeight
from jaxlora.nnx._variables import node_of
from jaxlora.nnx._walk import is_container, is_object


def read(value: Any, factors: Mapping[str, Any], path: str) -> Any:
  """What an attribute reads as: itself, but for adapted weights in it.

  Args:
    value: the attribute as it is held.
    factors: of the adapted weights of the attribute's module, by their paths in it.
    path: the attribute's own.
  """
  if isinstance(value, nnx.Variable):
    return view(value, factors[path], path) if path in factors else value
  if not any(name.startswith(f"{path}/") for name in factors):
    return value
  if is_container(value):
    kind: Any = type(value)
    return _container_class(kind)._of(value, factors, path)
  if is_object(value):
    return value  # a module, whose weights are its own
  if isinstance(value, Mapping):
    return types.MappingProxyType({name: read(held, factors, f"{path}/{name}") for name, held in value.items()})
  if isinstance(value, (list, tuple)) and not hasattr(value, "_fields"):
    return tuple(read(held, factors, f"{path}/{k}") for k, held in enumerate(value))
  return value


@functools.cache
def _container_class(kind: Any) -> Any:
  """Lists, or dictionaries, of NNX that read as another one does, with its adapted weights merged; none is changed."""

  def of(container: Any, factors: Mapping[str, Any], path: str) -> Any:
    made = object.__new__(made_class)
    object.__setattr__(made, _OF, (container, factors, path))
    return made

  def get(self: Any, name: str) -> Any:
    container, factors, path = object.__getattribute__(self, _OF)
    if name in vars(container):
      return read(vars(container)[name], factors, f"{path}/{name}")
    return vars(container) if name == "__dict__" else object.__getattribute__(self, name)

  def refused(self: Any, name: str, value: Any = None) -> NoReturn:
    raise TypeError(
      f"{object.__getattribute__(self, _OF)[2]} holds adapted weights, and was changed; expected it as it was adapted."
      " Change it in a method of its module, or in the module before it is adapted."
    )

  members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "_of": staticmethod(of)}
  members |= {"__getattribute__": get, "__setattr__": refused, "__delattr__": refused}
  made_class = type(kind)(kind.__name__, (kind,), members, pytree=kind._pytree__is_pytree)
  return made_class


_OF = "_jaxlora_of"  # the attribute in which the view of a container holds what it is of


def view(variable: nnx.Variable, factors: Any, name: str) -> Any:
  """A Variable of the same type and metadata that holds `W + s A B`, in the base's dtype."""
  raw = variable.get_raw_value()
  if not isinstance(raw, jax.Array) and not is_coded(raw):  # a spec or the like, in the place of the array
    return variable
  node = node_of(factors, frozen_base(raw, name))
  value = node.value if isinstance(node, FullWeight) else node.materialize()
  return _view_class(type(variable))._new(value, variable.get_metadata())


def _refused(self: Any, name: str, value: Any) -> NoReturn:
  raise TypeError(
    "an adapted weight was assigned; expected a Variable that is not adapted. Give the module another base with"
    " nnx.update(model, state), its state as of the module before it was adapted; or adapt a module that has it."
  )


@functools.cache
def _view_class(kind: Any) -> Any:
  members = {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__setattr__": _refused}
  return type(kind)(kind.__name__, (kind,), members)


def frozen_base(base: Any, path: str) -> Any:
  """The base, behind `stop_gradient`; its differentiation is refused, as nothing would come of it."""
  if is_coded(base) or not isinstance(base, jax.core.Tracer) or not jnp.issubdtype(base.dtype, jnp.inexact):
    return base
  return lax.stop_gradient(_refusing(path)(base))


@functools.cache
def _refusing(path: str) -> Any:
  """The identity, with a derivative that says what to differentiate instead."""

  @jax.custom_jvp
  def base(x: jax.Array) -> jax.Array:
    return x

  @base.defjvp
  def derivative(primals: Any, tangents: Any) -> NoReturn:
    raise ValueError(
      f"{path}: the frozen base of an adapted weight is differentiated; expected its factors alone. Take"
      " nnx.value_and_grad(loss, argnums=nnx.DiffState(0, jaxlora.nnx.Trainable)) and nnx.Optimizer(model, tx,"
      " wrt=jaxlora.nnx.Trainable); in tree mode differentiate by the first state of"
      " nnx.split(model, jaxlora.nnx.Trainable, ...)."
    )

  return base
