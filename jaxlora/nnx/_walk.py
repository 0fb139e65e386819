"""Walks over the objects of NNX modules."""

from collections.abc import Callable, Iterator
from typing import Any

from flax import nnx
import jax

FACTORS = "jaxlora"  # the attribute in which a module holds the factors of its own weights


def attributes(node: Any) -> dict[str, Any]:
  """The attributes of a module, or another object of NNX, but those of NNX's bookkeeping."""
  return {name: value for name, value in vars(node).items() if not name.startswith("_pytree__")}


def is_object(value: Any) -> bool:
  return isinstance(value, (nnx.Pytree, nnx.Variable))


def objects_in(value: Any) -> list[tuple[str, Any]]:
  """The NNX objects that an attribute's value is or holds, with their paths in it; none below another one."""
  found = jax.tree_util.tree_flatten_with_path(value, is_leaf=is_object)[0]
  return [("/".join(map(_key, path)), leaf) for path, leaf in found if is_object(leaf)]


def _key(entry: Any) -> str:
  return str(next((getattr(entry, name) for name in ("key", "idx", "name") if hasattr(entry, name)), entry))


def children(node: Any) -> Iterator[tuple[str, Any]]:
  """The NNX objects that a module holds itself, with their paths in it."""
  for name, value in attributes(node).items():
    for inner, child in objects_in(value):
      yield "/".join(filter(None, (name, inner))), child


def is_container(node: Any) -> bool:
  """Whether a module is but a place for others, which has no calls of its own."""
  return isinstance(node, (nnx.List, nnx.Dict))


def every_object(node: Any) -> dict[int, Any]:
  """All NNX objects of a module, each once, by identity; itself first."""
  found: dict[int, Any] = {}

  def visit(child: Any) -> None:
    if id(child) not in found:
      found[id(child)] = child
      if not isinstance(child, nnx.Variable):
        for _, inner in children(child):
          visit(inner)

  visit(node)
  return found


def owned_variables(module: Any) -> Iterator[tuple[Any, str, nnx.Variable]]:
  """Every Variable with the module that it belongs to and its path there: the nearest one that is no container."""
  for owner in every_object(module).values():
    if isinstance(owner, nnx.Variable) or (is_container(owner) and owner is not module):
      continue
    yield from ((owner, path, variable) for path, variable in _own(owner))


def _own(node: Any, prefix: str = "") -> Iterator[tuple[str, nnx.Variable]]:
  for path, child in children(node):
    if isinstance(child, nnx.Variable):
      yield prefix + path, child
    elif is_container(child):
      yield from _own(child, f"{prefix}{path}/")


def mark(module: Any, is_marked: Callable[[Any], bool]) -> list[Any]:
  """The modules that are marked themselves, or hold a marked one, containers left out; each once."""
  known: dict[int, bool] = {}
  order: list[Any] = []

  def visit(node: Any) -> bool:
    if id(node) not in known:
      known[id(node)] = False  # where it holds itself
      inner = [visit(child) for _, child in children(node) if not isinstance(child, nnx.Variable)]
      known[id(node)] = is_marked(node) or any(inner)
      if known[id(node)] and not is_container(node):
        order.append(node)
    return known[id(node)]

  visit(module)
  return order


def paths_of(module: Any) -> dict[int, str]:
  """The path of every NNX object of a module, by identity: the first that is met."""
  found = {id(module): ""}

  def visit(node: Any, prefix: str) -> None:
    for path, child in children(node):
      if id(child) not in found:
        found[id(child)] = prefix + path
        if not isinstance(child, nnx.Variable):
          visit(child, f"{prefix}{path}/")

  visit(module, "")
  return found


PLAIN = "_jaxlora_plain"  # the attribute of an adapted class that is the class it stands for


def plain_class(node: Any) -> Any:
  """The class that a module had before it was adapted; `None` where it was not."""
  return getattr(type(node), PLAIN, None)


def factors_of(module: Any) -> Iterator[tuple[Any, str, nnx.Variable, Any]]:
  """Every adapted weight of a module: its owner, its path there, the Variable of its base, and its factors."""
  for owner in list(every_object(module).values()):
    held = vars(owner).get(FACTORS) if plain_class(owner) is not None else None
    if held is not None:
      own = dict(_own(owner))
      parts = {path: factors for path, factors in attributes(held).items() if isinstance(factors, nnx.Module)}
      yield from ((owner, path, own[path], factors) for path, factors in parts.items())
