"""Models in orbax checkpoints, as Gemma's, MaxText's and Tunix' are: leaf by leaf."""

from collections.abc import Mapping
import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.files import code_of, dtype_of, nbytes_of
from jaxlora._base.text import listed
from jaxlora._files.tensors import TensorFileError

_METADATA = "_METADATA"


@dataclasses.dataclass(frozen=True)
class OrbaxTensor:
  """A leaf of a checkpoint that has not been read.

  Attributes:
    file: the checkpoint's folder.
    code: its dtype as safetensors writes it.
    shape: its shape.
    keys: its place in the tree.
    tree: the tree's metadata.
  """

  file: Path
  code: str
  shape: tuple[int, ...]
  keys: tuple[Any, ...]
  tree: Any = dataclasses.field(repr=False, compare=False)

  @property
  def dtype(self) -> np.dtype | None:
    return dtype_of(self.code)

  @property
  def nbytes(self) -> int:
    return nbytes_of(self.code, self.shape)

  def read(self) -> np.ndarray:
    """Its values, in memory; those of other leaves are not read."""
    import orbax.checkpoint as ocp

    chosen = lambda keys, this, other: this if keys == self.keys else other
    wanted = jax.ShapeDtypeStruct(self.shape, self.dtype)
    item = jax.tree_util.tree_map_with_path(lambda keys, _: chosen(keys, wanted, ocp.PLACEHOLDER), self.tree)
    how = jax.tree_util.tree_map_with_path(
      lambda keys, _: ocp.RestoreArgs(restore_type=np.ndarray) if keys == self.keys else ocp.RestoreArgs(), self.tree
    )
    restored = ocp.PyTreeCheckpointer().restore(self.file, args=ocp.args.PyTreeRestore(item=item, restore_args=how))
    leaves, _ = jax.tree_util.tree_flatten_with_path(restored)
    return np.asarray(next(leaf for keys, leaf in leaves if keys == self.keys))


def checkpoint_folder(folder: Path) -> Path | None:
  """The folder of one tree in a checkpoint: itself, the item of a step, or that of a manager's last step.

  Raises:
    TensorFileError: where several items may be meant.
  """
  if (folder / _METADATA).is_file():
    return folder
  steps = sorted(
    (inner for inner in folder.iterdir() if inner.is_dir() and inner.name.isdigit()), key=lambda s: int(s.name)
  )
  if steps:
    return checkpoint_folder(steps[-1])
  items = sorted(inner for inner in folder.iterdir() if (inner / _METADATA).is_file())
  if len(items) > 1:
    raise TensorFileError(f"{folder}: holds {listed([item.name for item in items])}; pass the one with the parameters.")
  return items[0] if items else None


def orbax_tensors(folder: Path) -> dict[str, Any]:
  """The arrays of a checkpoint by path. Of a training state (with `params` beside others) they are the parameters.

  Raises:
    TensorFileError: where it cannot be read.
  """
  try:
    import orbax.checkpoint as ocp

    metadata = ocp.PyTreeCheckpointer().metadata(folder)
    tree = getattr(metadata, "item_metadata", metadata)
    tree = getattr(tree, "tree", tree)
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  except ImportError:
    raise
  except Exception as error:  # orbax raises what its parts raise
    raise TensorFileError(f"{folder}: cannot be read by orbax: {type(error).__name__}: {error}") from error
  name = lambda keys: jax.tree_util.keystr(keys, simple=True, separator="/")
  found = {
    name(keys): OrbaxTensor(folder, code_of(jnp.dtype(leaf.dtype)), tuple(leaf.shape), keys, tree)
    for keys, leaf in leaves
    if getattr(leaf, "shape", None) is not None and getattr(leaf, "dtype", None) is not None
  }
  params = {path: tensor for path, tensor in found.items() if path.startswith("params/")}
  return params or found


def write_tree(tensors: Mapping[str, Any], values: Mapping[str, np.ndarray], target: Path) -> None:
  """Writes a checkpoint of one tree with new values; leaves that are no arrays of the model are left out.

  The whole model is in memory, as orbax takes it.
  """
  import orbax.checkpoint as ocp

  tree: dict[Any, Any] = {}
  for path, tensor in tensors.items():
    *modules, leaf = (key.idx if hasattr(key, "idx") else str(getattr(key, "key", key)) for key in tensor.keys)
    node = tree
    for module in modules:
      node = node.setdefault(module, {})
    node[leaf] = values[path]
  with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(target, args=ocp.args.PyTreeSave(_with_lists(tree)))


def _with_lists(node: Any) -> Any:
  """A tree of dictionaries with lists for those whose keys are positions; what is left out there is `None`."""
  if not isinstance(node, dict):
    return node
  inner = {key: _with_lists(value) for key, value in node.items()}
  return [inner.get(k) for k in range(1 + max(inner))] if all(isinstance(key, int) for key in inner) else inner
