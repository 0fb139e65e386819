"""`split` and `join`: the frozen and the trainable half of a tree."""

import functools
from typing import Any

import jax

from jaxlora._base.paths import flatten, opened, path_string
from jaxlora._base.text import listed
from jaxlora._weight.checks import check_weight
from jaxlora._weight.tree import adapted_leaves, check_adapted, is_half_leaf, map_adapted
from jaxlora._weight.weight import LoraWeight, is_adapted, parts, trained_parts, with_parts


def split(tree: Any) -> tuple[Any, Any]:
  """Splits a combined tree into its frozen and its trainable half.

  Both halves have the tree's nesting, with `None` in the place of whatever the other half holds, so that the trainable
  half can be differentiated, optimised, donated and saved by itself. `join(*split(tree))` is `tree`.

  Args:
    tree: what `adapt` returned.

  Returns:
    `(frozen, trainable)`.

  Raises:
    ValueError: if the tree has no adapted leaf, or is a half itself.

  Example:
    >>> import optax
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> frozen, trainable = split(tree)
    >>> trainable
    {'bias': None, 'kernel': LoraWeight(6x5 io, rank 2, f32, without base)}
    >>> opt_state = optax.adamw(1e-4).init(trainable)
  """
  tree = opened(tree)
  check_adapted(tree, "split")

  def without(node: Any, trained: bool) -> Any:
    gone = [name for name in parts(node) if (name in trained_parts(node)) == trained]
    return with_parts(node, dict.fromkeys(gone))

  frozen, trainable = (
    map_adapted(lambda w: without(w, trained), lambda w: without(w, trained), plain, tree)
    for trained, plain in ((True, lambda x: x), (False, lambda x: None))
  )
  return frozen, trainable


def join(frozen: Any, trainable: Any) -> Any:
  """Puts the halves of a tree together: the inverse of `split`.

  Args:
    frozen: the half with the bases and the frozen leaves.
    trainable: the half with the factors and the leaves trained whole; any that fits the base, such as another task's.

  Returns:
    The combined tree.

  Raises:
    ValueError: if the halves are of different trees, naming the leaves and how they differ.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((6, 5)), "bias": jnp.zeros(5)}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> frozen, trainable = jaxlora.split(tree)
    >>> join(frozen, jax.tree.map(lambda factor: 2 * factor, trainable))["kernel"]
    LoraWeight(6x5 io, rank 2, f32)
  """
  _check_half(frozen, "frozen", trained=False)
  _check_half(trainable, "trainable", trained=True)
  left, left_def = flatten(frozen, is_leaf=is_half_leaf)
  right, right_def = flatten(trainable, is_leaf=is_half_leaf)
  if _differ(left_def, right_def):
    raise ValueError(f"join: the halves are of different trees. {_difference(frozen, trainable)}. {_SAME_TREE}")
  return jax.tree_util.tree_unflatten(
    left_def, [_joined(path, f, t) for (path, f), (_, t) in zip(left, right, strict=True)]
  )


_SAME_TREE = (
  "Join what one jaxlora.split returned, or the trainable half of a tree that was adapted from the same parameters with"
  " the same targets and train."
)


def _check_half(half: Any, name: str, trained: bool) -> None:
  """Raises if a half has parts of the other one, or lacks some of its own."""
  for path, node in adapted_leaves(half):
    held = parts(node)
    own = [part for part in held if (part in trained_parts(node)) == trained]
    if foreign := [field for field, part in held.items() if part is not None and field not in own]:
      raise ValueError(
        f"join: {path}: expected (frozen, trainable) as split returns them; found {', '.join(foreign)} in the {name}"
        " half. The halves are swapped, or one of them is a whole tree: call join(*split(tree))."
      )
    if missing := [field for field, part in held.items() if part is None and field in own]:
      raise ValueError(
        f"join: {path}: expected (frozen, trainable) as split returns them; {', '.join(missing)} missing in the {name}"
        f" half. {_SAME_TREE}"
      )


def _difference(frozen: Any, trainable: Any) -> str:
  """How two halves of different structure differ: in their leaves, or in the first container that is not the same."""
  ours, theirs = ({path for path, _ in flatten(half, is_half_leaf)[0]} for half in (frozen, trainable))
  if ours != theirs:
    return (
      f"Only in the frozen half: {listed(sorted(ours - theirs)) or 'nothing'};"
      f" only in the trainable half: {listed(sorted(theirs - ours)) or 'nothing'}"
    )
  path, left, right = _first_other_container(frozen, trainable, ())
  kinds = [type(node).__name__ for node in (left, right)]
  if kinds[0] == kinds[1]:
    return f"{path}: the {kinds[0]} in the frozen half has other static fields or keys than the one in the trainable"
  return f"{path}: {kinds[0]} in the frozen half, {kinds[1]} in the trainable half"


def _first_other_container(left: Any, right: Any, place: tuple[Any, ...]) -> tuple[str, Any, Any]:
  """The place where two trees with leaves of the same paths first have different containers, and the two."""

  def children(tree: Any) -> list[tuple[Any, Any]]:
    return jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda node: node is not tree)[0]

  structure = functools.partial(jax.tree_util.tree_structure, is_leaf=is_half_leaf)
  if type(left) is type(right):
    for (key, ours), (_, theirs) in zip(children(left), children(right), strict=False):
      if _differ(structure(ours), structure(theirs)):
        return _first_other_container(ours, theirs, (*place, *key))
  return path_string(place), left, right


def _differ(left: Any, right: Any) -> bool:
  return left != right  # JAX's own types call a tree's structure optional


def _kind(node: Any) -> str:
  if is_adapted(node):
    return type(node).__name__
  return "nothing" if node is None else "a plain leaf"


def _joined(path: str, frozen: Any, trainable: Any) -> Any:
  fits = type(frozen) is type(trainable) if is_adapted(frozen) else trainable is None
  if not fits:
    raise ValueError(
      f"join: {path}: {_kind(frozen)} in the frozen half, {_kind(trainable)} in the trainable half: the halves are of"
      f" different trees, or are not halves as split returns them. {_SAME_TREE}"
    )
  if not is_adapted(frozen):
    return frozen
  if isinstance(frozen, LoraWeight) and frozen.roles != trainable.roles:
    raise ValueError(
      f"join: {path}: roles {frozen.roles!r} in the frozen half, {trainable.roles!r} in the trainable half: the"
      f" halves are of different trees. {_SAME_TREE}"
    )
  if isinstance(frozen, LoraWeight) and parts(frozen).keys() != parts(trainable).keys():
    raise ValueError(
      f"join: {path}: the frozen half has the parts {', '.join(parts(frozen))}, the trainable half"
      f" {', '.join(parts(trainable))}: the halves are of different trees. {_SAME_TREE}"
    )
  whole = with_parts(trainable, {name: part for name, part in parts(frozen).items() if part is not None})
  if all(hasattr(part, "shape") for part in parts(whole).values()):
    check_weight(whole, f"join: {path}")
  return whole
