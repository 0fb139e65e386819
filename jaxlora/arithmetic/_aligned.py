"""The leaves of several adapters, aligned by path and checked to be of one base."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.checks import check_finite, is_known
from jaxlora._base.paths import flatten
from jaxlora._base.text import listed
from jaxlora._weight.checks import check_weight
from jaxlora._weight.tree import check_adapted
from jaxlora._weight.weight import LoraWeight, is_adapted, is_leaf_node, parts
from jaxlora.arithmetic._sums import base_leaf


def aligned(trees: Sequence[Any], names: Sequence[str], what: str) -> tuple[dict[str, list[Any]], Any]:
  """The nodes of all trees by path; raises unless they are adapters of one base."""
  for tree, name in zip(trees, names, strict=True):
    check_adapted(tree, f"{what}: {name}")
  flat = [flatten(tree, is_leaf=is_leaf_node) for tree in trees]
  first, treedef = flat[0]
  nodes = {path: [node] for path, node in first}
  for (other, other_def), name in zip(flat[1:], names[1:], strict=True):
    if other_def != treedef:
      ours, theirs = set(nodes), {path for path, _ in other}
      raise ValueError(
        f"{what}: {names[0]} and {name} are of different trees. Only in {names[0]}: "
        f"{listed(sorted(ours - theirs)) or 'nothing'}; only in {name}: {listed(sorted(theirs - ours)) or 'nothing'}."
        " Expected adapters of the same parameters."
      )
    for path, node in other:
      _check_same_leaf(path, nodes[path][0], node, (names[0], name), what)
      nodes[path].append(node)
  for path, group in nodes.items():
    for node, name in zip(group, names, strict=True):
      if is_adapted(node):
        check_weight(node, f"{what}: {name}: {path}")
  check_finite(
    [
      (f"{path} ({part}) of {name}", x)
      for path, group in nodes.items()
      for node, name in zip(group, names, strict=True)
      for part, x in _update_parts(node).items()
    ],
    what,
  )
  return nodes, treedef


def _update_parts(node: Any) -> dict[str, Any]:
  """The arrays of a node's update."""
  return {name: x for name, x in parts(node).items() if name != "base"} if is_adapted(node) else {}


def _check_same_leaf(path: str, ours: Any, theirs: Any, names: tuple[str, str], what: str) -> None:
  """Raises unless two nodes have the same base."""
  if isinstance(ours, LoraWeight) and isinstance(theirs, LoraWeight) and ours.roles != theirs.roles:
    raise ValueError(
      f"{what}: {path} has roles {ours.roles!r} in {names[0]} and {theirs.roles!r} in {names[1]}; expected the same."
    )
  left, right = base_leaf(ours), base_leaf(theirs)
  if left is right:
    return
  kinds = [(jnp.shape(x), jnp.result_type(x)) for x in (left, right)]
  if kinds[0] != kinds[1]:
    raise ValueError(
      f"{what}: the base of {path} has shape {kinds[0][0]}, dtype {kinds[0][1]} in {names[0]} and shape {kinds[1][0]},"
      f" dtype {kinds[1][1]} in {names[1]}; expected adapters of one base."
    )
  if is_known(left, right) and not _equal(left, right):
    raise ValueError(
      f"{what}: {path} has other values in the base of {names[1]} than in that of {names[0]}; an update means something"
      " beside its own base alone. To put it on the first base all the same: jaxlora.join(jaxlora.split(first)[0],"
      " jaxlora.split(other)[1])."
    )


def _equal(left: Any, right: Any) -> bool:
  """Whether two arrays are alike; NaN is like NaN, and random keys are compared by their data."""
  if jnp.issubdtype(jnp.result_type(left), jax.dtypes.prng_key):
    left, right = jax.random.key_data(left), jax.random.key_data(right)
  ours, theirs = np.asarray(left), np.asarray(right)
  return bool(((ours == theirs) | ((ours != ours) & (theirs != theirs))).all())
