"""What the nodes of a tree have in common: named arrays, and an error where one is used as an array.

Also Flax's state dicts of them, whenever flax is imported, and without importing it where the user has not.

`flax.serialization` looks the type of every node up in a registry, and takes a type that it does not find for a leaf:
saving then fails, and restoring gives a plain dict back. Flax may be imported after a tree is made, and a tree may be
unpickled where nothing of this library was ever called. So registration waits for the look-up itself: a look-up in a
dict asks the type for its hash, and our types register themselves when they are asked and flax is there.
"""

from collections.abc import Mapping
import functools
import sys
import threading
from typing import Any, ClassVar, NoReturn


class KnownToFlax(type):
  """The metaclass of nodes that `flax.serialization` saves and restores by their methods `parts` and `with_parts`.

  A state dict holds the arrays of a node by name; what is static comes from the target that it is restored into.
  """

  _lock: ClassVar = threading.RLock()  # reentrant: registration looks the type up in the same registry
  _nodes: ClassVar[list[Any]] = []
  _flax: ClassVar[Any] = None  # the module that all of `_nodes` are registered with; another one after a reload

  def __init__(cls, *args: Any, **kwargs: Any):
    super().__init__(*args, **kwargs)
    KnownToFlax._nodes.append(cls)
    KnownToFlax._flax = None

  def __hash__(cls) -> int:
    if sys.modules.get("flax.serialization") is not KnownToFlax._flax:
      _register()
    return type.__hash__(cls)


def _register() -> None:
  with KnownToFlax._lock:
    flax = sys.modules.get("flax.serialization")
    register = getattr(flax, "register_serialization_state", None)
    if register is None or flax is KnownToFlax._flax:  # in the middle of its own import, or done by another thread
      return
    KnownToFlax._flax = flax
    for node in KnownToFlax._nodes:
      register(node, functools.partial(_state, flax), functools.partial(_restored, flax), override=True)


def _state(flax: Any, node: Any) -> dict[str, Any]:
  return {name: flax.to_state_dict(part) for name, part in node.parts().items()}  # of a quantised base, by its parts


def _restored(flax: Any, target: Any, state: Mapping[str, Any]) -> Any:
  held = target.parts()
  if sorted(state) != sorted(held):
    raise ValueError(f"{type(target).__name__}: found {sorted(state)} in the state, expected {sorted(held)}.")
  return target.with_parts({name: flax.from_state_dict(part, state[name], name=name) for name, part in held.items()})


class Node(metaclass=KnownToFlax):
  """A node that holds named arrays. It is no array; using it as one is an error that says what to do."""

  _plainly: ClassVar[str] = "jaxlora.merge(tree)"  # what turns a tree into plain arrays

  def parts(self) -> dict[str, Any]:
    """The arrays that the node holds, by name."""
    raise NotImplementedError

  def with_parts(self, changes: Mapping[str, Any]) -> Any:
    """The node with some of its parts replaced."""
    raise NotImplementedError

  def __array__(self, *_: Any, **__: Any) -> NoReturn:  # NumPy would make an array of one object
    self.__jax_array__()

  def __getitem__(self, _: Any) -> NoReturn:  # as a Variable of flax.nnx does
    self.__jax_array__()

  def __jax_array__(self) -> NoReturn:
    raise TypeError(
      f"a {type(self).__name__} was used as an array. Call the function through jaxlora.wrap(fn), the tree an argument"
      f" of fn or fn itself, not closed over; or turn the tree into plain parameters first with {self._plainly}."
    )
