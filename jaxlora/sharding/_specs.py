"""`specs`: how every part of a tree is partitioned, from its arrays, from Flax's boxes, or from patterns.

Reading order: the face -> one leaf -> names of axes -> checks.
"""

from collections.abc import Mapping, Sequence
import math
import sys
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxlora._base.coded import is_coded
from jaxlora._base.paths import flatten
from jaxlora._base.patterns import first_match, no_match_error
from jaxlora._weight.boxes import axis_names
from jaxlora._weight.partitioned import specs_of_parts
from jaxlora._weight.tree import is_half_leaf
from jaxlora._weight.weight import LoraWeight, is_adapted

NAME_DEVICES = 'Name them: jax.make_mesh((4, 2), ("data", "model")) of eight devices, say.'

Rules = Mapping[str, Any] | Sequence[tuple[str, Any]]


def specs(
  tree: Any,
  mesh: Mesh | None = None,
  *,
  patterns: Mapping[str, Any] | None = None,
  rules: Rules | None = None,
  replicated: bool = False,
) -> Any:
  """How every part of a tree is partitioned: A as the contracted axes of its base, B as the free ones.

  The rank is never split: it is small, and a split rank would need a sum over devices in every product. Stacked axes
  follow the stack. What says how a weight is partitioned is the first of: a pattern, the names that Flax's box around
  it gives to its axes, the arrays themselves.

  Args:
    tree: parameters, adapted or not, or a half of an adapted tree; leaves may be `jax.ShapeDtypeStruct`s.
    mesh: whose axes the specs name; `None` for specs alone, which nothing checks against a mesh.
    patterns: regex over the path of a leaf -> the spec of the whole weight, stacked axes included.
    rules: logical name of an axis -> axis or axes of the mesh, or `None`; those of `flax.linen.logical_axis_rules`
      unless given. Names without a rule that no axis of the mesh has are not split.
    replicated: whether factors are whole on every device, in the place of beside their base.

  Returns:
    A tree of the same nesting: `NamedSharding`s of the mesh, for `jax.device_put` and `out_shardings`; without a mesh,
    `PartitionSpec`s.

  Raises:
    ValueError: naming the leaf, what was found and what to do: a pattern without a match, a spec with more entries than
      the leaf has axes, an axis that the mesh does not have, one that is named twice or does not divide; a mesh
      without devices.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"kernel": jnp.ones((16, 8)), "bias": jnp.zeros(8)}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> found = specs(tree, patterns={"kernel": jax.sharding.PartitionSpec("data", "model")})
    >>> tuple(found["kernel"].a), tuple(found["kernel"].b)
    ((None, 'data'), (None, 'model'))
  """
  if mesh is not None and not mesh.size:
    raise ValueError(f"specs: found a mesh without devices, {mesh}. {NAME_DEVICES}")
  leaves, treedef = flatten(tree, is_leaf=is_half_leaf)
  paths = [path for path, _ in leaves]
  for pattern in patterns or {}:
    if all(first_match({pattern: True}, path) is None for path in paths):
      raise no_match_error("specs: patterns", pattern, paths)
  names = axis_names(tree, dict.fromkeys(paths))
  told = {path: _of_names(found, mesh, rules) for path, found in names.items()}
  told |= {path: found for path in paths if (found := first_match(patterns, path)) is not None}
  out = [_of_leaf(path, node, told.get(path), mesh, replicated) for path, node in leaves]
  found = jax.tree.unflatten(treedef, out)
  return found if mesh is None else jax.tree.map(lambda spec: NamedSharding(mesh, spec), found, is_leaf=_is_spec)


# ----------------------------------------------------------------------------------------------------------------------
# One leaf.


def _of_leaf(path: str, node: Any, spec: Any, mesh: Mesh | None, replicated: bool) -> Any:
  """A leaf with specs in the place of its arrays."""
  if node is None:
    return None
  if spec is not None:
    spec = PartitionSpec(*spec)
    if (shape := _shape_of(node)) is not None:
      check_fits(f"specs: {path}", shape, spec, mesh)
  if not isinstance(node, LoraWeight):
    parts = node.parts() if is_adapted(node) else {"": node}
    new = {name: _of_array(part, spec) for name, part in parts.items() if part is not None}
    return node.with_parts(new) if is_adapted(node) else new[""]
  if spec is None:
    new = {name: _of_array(part, None) for name, part in node.parts().items() if part is not None}
  else:
    new = specs_of_parts(node, spec).parts() | ({} if node.base is None else {"base": _of_array(node.base, spec)})
  factors = [name for name, part in new.items() if name != "base" and part is not None]
  return node.with_parts({**new, **(dict.fromkeys(factors, PartitionSpec()) if replicated else {})})


def _shape_of(node: Any) -> Any:
  """The shape of a weight; `None` of one without its base, in a trainable half."""
  return None if isinstance(node, LoraWeight) and node.base is None else node.shape


def _of_array(array: Any, spec: PartitionSpec | None) -> Any:
  """The spec of an array, or those of the parts of a coded one: given, or its own."""
  if is_coded(array):  # scales have fewer elements along the axes of blocks
    return jax.tree.map(lambda part: _of_array(part, spec and _along_blocks(spec, part.shape)), array)
  if spec is not None:
    return spec
  own = getattr(array, "sharding", None)
  return own.spec if isinstance(own, NamedSharding) else PartitionSpec()


def _along_blocks(spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
  return PartitionSpec(*(None if size == 1 else axis for axis, size in zip(spec, shape, strict=False)))


def _is_spec(node: Any) -> bool:
  return isinstance(node, PartitionSpec)


# ----------------------------------------------------------------------------------------------------------------------
# Names of axes.


def _of_names(names: Sequence[Any], mesh: Mesh | None, rules: Rules | None) -> PartitionSpec:
  """The spec that names of axes stand for."""
  told = dict(_flax_rules() if rules is None else rules)

  def one(name: Any) -> Any:
    if isinstance(name, (tuple, list)):
      return tuple(axis for part in name if (axis := one(part)) is not None) or None
    if name in told:
      return told[name]
    return name if (mesh is None and not told) or (mesh is not None and name in mesh.axis_names) else None

  return PartitionSpec(*map(one, names))


def _flax_rules() -> Rules:
  linen = sys.modules.get("flax.linen")
  return () if linen is None else linen.get_logical_axis_rules()


# ----------------------------------------------------------------------------------------------------------------------
# Checks.


def check_fits(path: str, shape: Sequence[int], spec: PartitionSpec, mesh: Any) -> None:
  """Raises unless a spec fits a leaf and the mesh."""
  if len(spec) > len(shape):
    raise ValueError(
      f"{path}: {spec} has {len(spec)} entries, and shape {tuple(shape)} {len(shape)} axes. Name an axis of the"
      " mesh, or None, for each axis of the weight; those behind the last entry are whole."
    )
  used = [axis for entry in spec for axis in _axes(entry)]
  if twice := {axis for axis in used if used.count(axis) > 1}:
    raise ValueError(f"{path}: {spec} names {sorted(twice)} twice, expected every axis of the mesh once.")
  if mesh is None:
    return
  if unknown := [axis for axis in used if axis not in mesh.axis_names]:
    raise ValueError(
      f"{path}: {spec} names {unknown}, expected axes of the mesh: {list(mesh.axis_names)}. Say what a logical"
      " name stands for with rules={name: axis}."
    )
  for d, entry in enumerate(spec):
    parts = math.prod(mesh.shape[axis] for axis in _axes(entry))
    if shape[d] % parts:
      raise ValueError(
        f"{path}: axis {d} of shape {tuple(shape)} does not divide into {parts} parts ({entry!r} of the mesh"
        f" {dict(mesh.shape)}). Leave that axis whole: None in its place in the spec (specs(tree, mesh,"
        " patterns={...}))."
      )


def _axes(entry: Any) -> tuple[str, ...]:
  if entry is None:
    return ()
  return tuple(entry) if isinstance(entry, (tuple, list)) else (entry,)
