"""What the nodes of a tree have in common: named arrays, and an error where one is used as an array."""

from collections.abc import Mapping
from typing import Any, ClassVar, NoReturn

from jaxlora._weight.flax import KnownToFlax


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
