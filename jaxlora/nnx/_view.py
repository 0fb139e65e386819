"""An adapted weight as the attribute of its module: reads as the merged weight, and cannot be written."""

import functools
from typing import Any, NoReturn

from flax import nnx
import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.coded import is_coded
from jaxlora._weight.weight import FullWeight
from jaxlora.nnx._variables import node_of


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
