"""Callables that hold adapted weights of their own: modules, methods of modules, partial applications."""

from collections.abc import Callable
import functools
import inspect
from typing import Any

from jaxlora._weight.tree import adapted_leaves


def opened(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
  """A callable as a function of what it holds, and that; of nothing where it holds no adapted weight.

  A module is called with its weights in its places, as `wrap(lambda module, x: module(x))(module, x)` would.
  """
  if isinstance(fn, functools.partial):
    held = (fn.args, dict(fn.keywords))
    return (functools.partial(_applied, fn.func), (held,)) if adapted_leaves(held) else (fn, ())
  if inspect.ismethod(fn):
    return (fn.__func__, (fn.__self__,)) if adapted_leaves(fn.__self__) else (fn, ())
  return (_called, (fn,)) if adapted_leaves(fn) else (fn, ())


def _applied(fn: Callable[..., Any], held: Any, *args: Any, **kwargs: Any) -> Any:
  first, names = held
  return fn(*first, *args, **{**names, **kwargs})


def _called(module: Any, *args: Any, **kwargs: Any) -> Any:
  return module(*args, **kwargs)


def described(fn: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
  """Gives a function the name and the signature of a callable; of a module, those of its call."""
  named = fn if hasattr(fn, "__name__") or isinstance(fn, functools.partial) else type(fn).__call__.__get__(fn)
  return functools.wraps(named, updated=())
