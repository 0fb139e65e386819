"""The trainable half of a tree, as `optimizer` shows it to a transformation: of parameters, gradients and arguments."""

from collections.abc import Callable, Mapping, Sequence
import functools
import inspect
from typing import Any

import jax
import optax

from jaxlora._base.paths import opened, unboxed
from jaxlora._weight.checks import check_parts
from jaxlora._weight.tree import adapted_leaves, is_half_leaf, map_adapted
from jaxlora._weight.weight import is_adapted, parts, trained_parts, with_parts


def trainable_half(tree: Any) -> Any:
  """The trainable half of a whole tree or of a half; of an `nnx.State` without its Variables.

  `nnx.Optimizer` keeps the state of a transformation in Variables, and takes a node in one of them apart: of bare
  nodes it keeps the arrays one by one.
  """

  def trained(node: Any) -> Any:
    return with_parts(node, {name: None for name in parts(node) if name not in trained_parts(node)})

  return map_adapted(trained, trained, lambda leaf: None, unboxed(tree))


def check_trainable(tree: Any, what: str) -> None:
  """Raises unless the tree has an adapted leaf, and the trained parts of all of them."""
  leaves = adapted_leaves(tree)
  if not leaves and adapted_leaves(opened(tree)):
    raise ValueError(
      f"{what}: found a module of jaxlora.nnx, expected a tree. A module has NNX's own optimizer:"
      " nnx.Optimizer(module, tx, wrt=jaxlora.nnx.Trainable)."
    )
  if not leaves:
    raise ValueError(f"{what}: the tree has no adapted leaf. Make one with jaxlora.adapt(params, config, key).")
  for path, node in leaves:
    check_parts(node, f"{what}: {path}", trained_parts(node))


def is_placeholder(params: Any) -> bool:
  """Whether this is what `optax.tree_utils.tree_map_params` gives to `init`, to see where parameters go."""
  return not isinstance(params, (dict, list, tuple)) and type(params).__module__.startswith(optax.__name__)


def extra_in_halves(extra: Mapping[str, Any], params: Any) -> dict[str, Any]:
  """The extra arguments of `update`: trees by their trainable halves, functions as functions of trainable halves.

  Line searches get a gradient, and a function that they call with other parameters; other transformations get functions
  that return gradients. What those functions take by name reaches them as it is.

  Args:
    extra: the arguments, by name.
    params: the whole tree, whose frozen half the functions' parameters are joined with.
  """
  functions = {name: value for name, value in extra.items() if _is_function(value)}
  theirs = {name for fn in functions.values() for name in _parameters(fn)}

  def one(name: str, value: Any) -> Any:
    if name in functions:
      return _in_halves(value, params)
    return trainable_half(value) if name not in theirs and adapted_leaves(value) else value

  return {name: one(name, value) for name, value in extra.items()}


def _is_function(value: Any) -> bool:
  """Whether an argument is a function; an adapted module is a tree, though it can be called."""
  return callable(value) and (isinstance(value, functools.partial) or not adapted_leaves(value))


def _parameters(fn: Callable[..., Any]) -> Sequence[str]:
  try:
    return list(inspect.signature(fn).parameters)
  except (TypeError, ValueError):  # some callables have none to look at
    return ()


def _in_halves(fn: Callable[..., Any], params: Any) -> Callable[..., Any]:
  @functools.wraps(fn)
  def called(*args: Any, **kwargs: Any) -> Any:
    out = fn(*(_whole(arg, params) for arg in args), **kwargs)
    return trainable_half(out) if adapted_leaves(out) else out

  return called


def _whole(arg: Any, params: Any) -> Any:
  """A trainable half with the frozen half of `params`; any other argument as it is."""
  if not adapted_leaves(arg):
    return arg
  places, treedef = jax.tree_util.tree_flatten(unboxed(params), is_leaf=is_half_leaf)
  halves = jax.tree_util.tree_leaves(arg, is_leaf=is_half_leaf)

  def joined(place: Any, half: Any) -> Any:
    if not is_adapted(place):
      return place
    return with_parts(place, {name: part for name, part in parts(half).items() if part is not None})

  return jax.tree_util.tree_unflatten(treedef, map(joined, places, halves))
