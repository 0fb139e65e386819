"""What a node knows beside its structure: trees that differ in it are still of one structure."""


class Aside(int):
  """A bool among a node's static fields that is no part of the tree's structure: all are equal to each other."""

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Aside) or int(self) == other

  def __ne__(self, other: object) -> bool:
    return not self == other

  def __hash__(self) -> int:
    return 0

  def __repr__(self) -> str:
    return repr(bool(self))
