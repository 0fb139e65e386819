"""What a call changes in the objects that it was given."""

from typing import Any, NamedTuple

from flax import errors, nnx
import jax

from jaxlora.nnx._level import level_error
from jaxlora.nnx._walk import attributes, objects_in


class Detached(NamedTuple):
  """The static part of a value that leaves a trace: its structure, and the caller's own objects in it by position."""

  treedef: Any
  size: int
  known: dict[int, Any]


class Pair(NamedTuple):
  """An object inside of the trace, the caller's that it is a copy of, and how it was before the call."""

  inner: Any
  real: Any
  path: str
  before: Any


class Changes:
  """The changes of one call: taken down inside of the trace, and applied to the caller's objects behind it."""

  def __init__(self, real: Any, name: str, adapted: list[str]):
    self._real, self._name = real, name
    self._adapted = {f"0/{path}" for path in adapted}
    self._pairs: list[Pair] = []
    self._static: list[Any] = []

  def begin(self, inner: Any) -> None:
    """Pairs the copies with the caller's objects, and remembers how they are."""
    self._pairs, seen = [], set()

    def pair(copy: Any, real: Any, path: str) -> None:
      if id(copy) in seen:
        return
      seen.add(id(copy))
      self._pairs.append(Pair(copy, real, path, _seen(copy)))
      if not isinstance(copy, nnx.Variable):
        for name, value in attributes(copy).items():
          pair_all(value, vars(real)[name], f"{path}/{name}")

    def pair_all(value: Any, real: Any, path: str) -> None:
      for (inner_path, one), (_, other) in zip(objects_in(value), objects_in(real), strict=True):
        pair(one, other, "/".join(filter(None, (path, inner_path))))

    pair_all(inner, self._real, "")

  def end(self, out: Any) -> Any:
    """The arrays of the result and of all that has changed; the rest is kept for `apply`."""
    self._known = {id(pair.inner): pair.real for pair in self._pairs if pair.path not in self._adapted}
    self._static, arrays = [], []
    for change, value in [(None, out), *self._found()]:
      leaves, detached = self._detach(value)
      self._static.append((change, detached))
      arrays += leaves
    return arrays

  def _found(self) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    for copy, real, path, before in self._pairs:
      after = _seen(copy)
      if isinstance(copy, nnx.Variable):
        if not _same(before.leaves, after.leaves):
          self._check_plain(path)
          found.append(((real, path, None), copy.get_raw_value()))
        continue
      for name in before.keys() - after.keys():
        found.append(((real, path, (name, None)), None))
      for name, now in after.items():
        if name not in before or not _same(before[name], now):
          self._check_plain(f"{path}/{name}")
          found.append(((real, path, (name, copy._pytree__nodes.get(name))), vars(copy)[name]))
    return found

  def _check_plain(self, path: str) -> None:
    if path in self._adapted:
      raise ValueError(
        f"{path.partition('/')[2]}: {self._name} assigns an adapted weight, which is frozen. Leave it out with"
        " LoraConfig(exclude=...), or call the method of the module before it is adapted."
      )

  def _detach(self, value: Any) -> tuple[list[Any], Detached]:
    leaves, treedef = jax.tree_util.tree_flatten(value, is_leaf=lambda x: id(x) in self._known)
    known = {k: self._known[id(leaf)] for k, leaf in enumerate(leaves) if id(leaf) in self._known}
    arrays = [leaf for k, leaf in enumerate(leaves) if k not in known]
    return arrays, Detached(treedef, len(leaves), known)

  def apply(self, arrays: list[Any]) -> Any:
    """Writes the changes to the caller's objects; returns the call's result."""
    left = iter(arrays)
    values: list[tuple[Any, Any]] = []
    for change, detached in self._static:
      leaves = [detached.known[k] if k in detached.known else next(left) for k in range(detached.size)]
      values.append((change, jax.tree_util.tree_unflatten(detached.treedef, leaves)))
    for change, value in values[1:]:
      try:
        _write(change, value)
      except errors.TraceContextError as error:
        path = change[1].partition("/")[2]
        raise level_error(self._real[0], f"its call changes {path}") from error
    return values[0][1]


class _Held(NamedTuple):
  leaves: list[Any]


def _seen(node: Any) -> Any:
  """What a change of an object is told by: the leaves of a Variable, the attributes of a module with their leaves."""
  if isinstance(node, nnx.Variable):
    return _Held(jax.tree.leaves(node.get_raw_value()))
  return {name: _value_seen(value) for name, value in attributes(node).items()}


def _value_seen(value: Any) -> list[Any]:
  is_whole = lambda x: isinstance(x, (nnx.Pytree, nnx.Variable))
  leaves, treedef = jax.tree_util.tree_flatten(value, is_leaf=is_whole)
  return [*leaves, treedef]


def _same(before: list[Any], after: list[Any]) -> bool:
  return len(before) == len(after) and all(map(_is_same, before, after))


def _is_same(one: Any, other: Any) -> bool:
  return one is other or (type(one) is type(other) and isinstance(one, _COMPARED) and one == other)


_COMPARED = (int, float, bool, str, jax.tree_util.PyTreeDef)


def _write(change: Any, value: Any) -> None:
  real, _, attribute = change
  if attribute is None:
    real.set_raw_value(value)
  elif attribute[1] is None and value is None and attribute[0] in vars(real):
    delattr(real, attribute[0])
  else:
    name, is_data = attribute
    real._check_valid_context(lambda: f"Cannot mutate {type(real).__name__} from a different trace level")
    object.__setattr__(real, name, value)
    if is_data is not None and real._pytree__nodes.get(name) != is_data:
      object.__setattr__(real, "_pytree__nodes", real._pytree__nodes.update({name: is_data}))
