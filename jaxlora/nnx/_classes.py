"""The classes of adapted modules: those of the user, with calls that go through `wrap`."""

from collections.abc import Callable
import functools
import inspect
import types
from typing import Any

from flax import nnx

from jaxlora.nnx._view import read
from jaxlora.nnx._walk import FACTORS, PLAIN

Call = Callable[[str, Any, tuple[Any, ...], dict[str, Any]], Any]  # of a method: name, module, args, kwargs
_CALL = "_jaxlora_call"


@functools.cache
def adapted_class(plain: Any, call: Call) -> Any:
  """The class of an adapted module: a subclass of the module's own, by the same name.

  Its methods are called on the plain module, through `wrap`; what stands in its way is neither copied nor changed.
  Attributes that are adapted weights read as the merged ones do.
  """
  members: dict[str, Any] = {name: _method(name, plain, call) for name in _methods(plain)}
  members |= {
    "__module__": plain.__module__,
    "__qualname__": plain.__qualname__,
    "__doc__": plain.__doc__,
    "__reduce_ex__": _reduced,
    "__getattribute__": _attribute,
    "_graph_node_set_key": _set_key,
    PLAIN: plain,
    _CALL: staticmethod(call),
  }
  return type(plain)(plain.__name__, (plain,), members, pytree=plain._pytree__is_pytree)


def _methods(plain: Any) -> set[str]:
  """The names of the methods that the user's class and its bases below `nnx.Module` define."""
  own = [base for base in plain.__mro__ if base not in nnx.Module.__mro__]
  return {name for base in own for name, value in vars(base).items() if _is_method(name, value)}


def _is_method(name: str, value: Any) -> bool:
  """Whether an attribute of a class is a method that may use weights. Generators give what they hold, one by one."""
  if name != "__call__" and (name.startswith("__") or name.startswith(("_pytree_", "_graph_node_", "_object_"))):
    return False
  if isinstance(value, (staticmethod, classmethod, property, type)) or not hasattr(type(value), "__get__"):
    return False
  inside = inspect.unwrap(value) if callable(value) else value
  lazy = inspect.isgeneratorfunction(inside) or inspect.iscoroutinefunction(inside)
  return callable(value) and not lazy


def _method(name: str, plain: Any, call: Call) -> Callable[..., Any]:
  original = getattr(plain, name)

  def method(self: Any, *args: Any, **kwargs: Any) -> Any:
    return call(name, self, args, kwargs)

  named = functools.wraps(original) if isinstance(original, types.FunctionType) else functools.wraps(method)
  return named(method)


def _attribute(self: Any, name: str) -> Any:
  """An attribute; of an adapted weight, a Variable that reads as the merged weight, and that cannot be written."""
  held = vars(self) if not name.startswith("__") else {}
  if FACTORS in held and name in held:
    shown = read(held[name], vars(held[FACTORS]), name)
    if shown is not held[name]:
      return shown
  plain = getattr(type(self), PLAIN)
  return plain.__getattribute__(self, name)


def _set_key(self: Any, key: Any, value: Any) -> None:
  """As NNX does it, on the Variable itself."""
  here = vars(self).get(key)
  if isinstance(here, nnx.Variable) and isinstance(value, nnx.Variable):
    here.update_from_state(value)
  else:
    getattr(type(self), PLAIN)._graph_node_set_key(self, key, value)


def _reduced(self: Any, _: Any) -> Any:
  """For pickling, which does not find a class that is made at run time."""
  return _rebuilt, (getattr(type(self), PLAIN), getattr(type(self), _CALL)), vars(self).copy()


def _rebuilt(plain: Any, call: Call) -> Any:
  return object.__new__(adapted_class(plain, call))
