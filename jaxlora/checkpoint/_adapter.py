"""`save`, `load` and `contents`: one adapter in one folder."""

import contextlib
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxlora.checkpoint._arrays import Arrays
from jaxlora.checkpoint._errors import one_error
from jaxlora.checkpoint._manifest import manifest_of, node_of
from jaxlora.checkpoint._processes import together
from jaxlora.checkpoint._rebuild import print_of, rebuilt
from jaxlora.checkpoint._store import (
  check_saved,
  clear_unfinished,
  folder_of,
  items,
  orbax_manager,
  own_steps,
  read_step,
)


def save(path: str | os.PathLike[str], tree: Any, *, metadata: dict[str, Any] | None = None) -> None:
  """Saves the adapter of a tree: factors, leaves trained whole, what each leaf is, and a fingerprint of the base.

  The base itself is never written. A checkpoint that is at `path` already is replaced once the new one is complete: a
  process that dies at any moment leaves the one or the other. Factors are copied to the host, wherever they are; the
  base is not, and `fingerprint` says what its digest costs.

  Args:
    path: the folder; missing parents are made.
    tree: what `adapt` returned, trained or not; the whole tree, not a half.
    metadata: a dict of what JSON gives back as it is; `contents(path).metadata` returns it.

  Raises:
    CheckpointError: if the tree has no adapter or is a half, if `metadata` is not JSON, if `path` holds other files or
      the checkpoints of a training run, or if it cannot be written (no space, no permission); an earlier checkpoint
      stands.

  Example:
    >>> import tempfile, jax, jax.numpy as jnp, jaxlora
    >>> params = {"dense": {"kernel": jnp.ones((16, 8))}}
    >>> tree = jaxlora.adapt(params, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   save(folder + "/adapter", tree, metadata={"task": "summaries"})
    ...   back = load(folder + "/adapter", params)
    >>> back["dense"]["kernel"].rank, bool((back["dense"]["kernel"].a == tree["dense"]["kernel"].a).all())
    (2, True)
  """
  save_part(path, tree, metadata=metadata, whole_base=True)


def save_part(path: Any, tree: Any, *, metadata: dict[str, Any] | None, whole_base: bool) -> None:
  """`save` of a tree that may hold only a part of its base: leaves beside that part are then no difference."""
  folder = folder_of(path)
  together(f"save: {folder}")  # ahead of the digests, which all compute together
  arrays: Arrays = {}
  manifest = manifest_of(tree, metadata or {}, arrays) | {"training": None, "whole_base": whole_base}
  with one_error(f"save: {folder}: cannot be written; what was there before stands", lambda: clear_unfinished(folder)):
    steps = own_steps(folder)
    with contextlib.closing(orbax_manager(folder, "save", max_to_keep=1, asynchronous=False)) as manager:
      step = max(steps, default=-1) + 1
      manager.save(step, args=items(manifest, arrays), force=True)
    check_saved(folder, step, "save")


def load(path: str | os.PathLike[str], params: Any, *, step: int | None = None, strict: bool = True) -> Any:
  """Loads an adapted tree from a checkpoint, onto its base.

  The base's leaves are those of `params`, untouched. Factors are sharded as their base is: A along its contracted axes,
  B along its free ones, the rank whole on every device; leaves trained whole go where their base is.

  Args:
    path: the folder that `save` or `Manager` wrote, or one step in it.
    params: the base: the parameters that the adapter was trained on, in any containers. Leaves that are
      `jax.ShapeDtypeStruct`s are checked by shape and dtype alone.
    step: which step of a training run; `None` means the latest.
    strict: whether a base that differs is an error. If not, whatever fits its place is loaded, and a
      `CheckpointWarning` lists the rest: adapted leaves that are missing or have another shape are left out; bases of
      another dtype or with other values are used in spite of it.

  Returns:
    A tree of `params`' nesting, as `adapt` returns it.

  Raises:
    CheckpointError: if there is no checkpoint, if it is damaged, or if the base is another one, naming the leaves; if
      no adapted leaf fits, even where not strict.
  """
  manifest, arrays, _ = read_step(path, step)
  return rebuilt(manifest, arrays, params, strict, f"load: {os.fspath(path)}")


restore = load  # the older name


class Contents(NamedTuple):
  """What a checkpoint holds, read without its base.

  Attributes:
    leaves: path -> `LoraWeight` or `FullWeight` with NumPy arrays, and a `jax.ShapeDtypeStruct` as the base.
    base: path -> `"dtype[shape]:digest"` of every leaf of the base, as `fingerprint` writes it.
    metadata: the user's dict.
    step: the number of the step.
    training: whether it holds the state of a training run, too.
    versions: of the format, jaxlora and jax, by name.
  """

  leaves: dict[str, Any]
  base: dict[str, str]
  metadata: dict[str, Any]
  step: int
  training: bool
  versions: dict[str, Any]


def contents(path: str | os.PathLike[str], *, step: int | None = None) -> Contents:
  """Reads a checkpoint without its base.

  Args:
    path, step: as for `load`.

  Raises:
    CheckpointError: if there is no checkpoint, or it is damaged.
  """
  manifest, arrays, number = read_step(path, step)
  known = {leaf["path"]: leaf for leaf in manifest["base"]}
  leaves = {
    leaf["path"]: node_of(leaf, arrays, _abstract(leaf["shape"], known.get(leaf["path"], {}).get("dtype", "float32")))
    for leaf in manifest["leaves"]
  }
  base = {name: str(print_of(leaf)) for name, leaf in known.items()}
  versions = {name: manifest[name] for name in ("version", "jaxlora", "jax")}
  return Contents(leaves, base, manifest["metadata"], number, manifest["training"] is not None, versions)


def _abstract(shape: Any, dtype: str) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(tuple(shape), jnp.dtype(dtype))
