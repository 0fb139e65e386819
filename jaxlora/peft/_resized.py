"""Bases with the vocabulary of an adapter that was trained after tokens were added."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten
from jaxlora.peft._from_modules import check_base
from jaxlora.peft._names import Names, key_of, split_path
from jaxlora.peft._places import find_places
from jaxlora.peft._read import read
from jaxlora.peft._records import Adapter, PeftError
from jaxlora.peft._roles import shape_of_leaf
from jaxlora.peft._tied import is_embedding, is_head


def resized(params: Any, folder: Any, *, names: Names = None, adapter_name: str | None = None) -> Any:
  """Parameters with as many tokens as an adapter has: torch's `model.resize_token_embeddings`, before `load`.

      (vocabulary, features) -> (larger vocabulary, features),   the new rows zero, or what the folder has for the base

  An adapter that was trained after tokens were added holds larger embeddings and heads (`modules_to_save`, LoRA on
  them, `trainable_token_indices`). The base's new rows do not matter where the adapter replaces them.

  Args:
    params: the base, as for `load`; arrays or `jax.ShapeDtypeStruct`s.
    folder: the adapter's, as for `load`.
    names: as for `load`.
    adapter_name: as for `load`.

  Returns:
    A tree of the same nesting, whose token embeddings and heads have the adapter's number of tokens.

  Raises:
    PeftError: if the adapter has no larger vocabulary, or the folder cannot be read.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora, jaxlora.peft, tempfile
    >>> small, large = ({"embed_tokens": {"embedding": jnp.ones((n, 4))}} for n in (7, 9))
    >>> tree = jaxlora.adapt(large, jaxlora.LoraConfig(rank=2, targets=["embed_tokens"]), jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   jaxlora.peft.save(folder, tree, task_type="FEATURE_EXTRACTION")
    ...   jaxlora.peft.resized(small, folder)["embed_tokens"]["embedding"].shape
    (9, 4)

  Source: transformers, `PreTrainedModel.resize_token_embeddings`.
  """
  check_base(params, names, "resized")
  adapter = read(folder, adapter_name=adapter_name, mapped=True)
  nodes, treedef = flatten(params)
  leaves = dict(nodes)
  shapes = _shapes(adapter)
  places = find_places([key_of(name) for name in shapes], leaves, names)[0]
  found = {name: places[key_of(name)].path for name in shapes if key_of(name) in places}
  grown = {
    path: growth
    for name, path in found.items()
    if (growth := _growth(path, shape_of_leaf(leaves[path]), shapes[name])) is not None
  }
  if not grown:
    raise PeftError(f"resized: {folder} holds no embedding or head with more tokens than the parameters have.")
  (old, new), *others = {(shape_of_leaf(leaves[path])[axis], size) for path, (axis, size) in grown.items()}
  if others:
    raise PeftError(f"resized: {folder} has several vocabularies: {old} to {new}, {others[0][0]} to {others[0][1]}.")
  grown |= {
    path: (axis, new)
    for path, leaf in leaves.items()
    if path not in grown and (axis := _vocabulary_axis(path, shape_of_leaf(leaf), old)) is not None
  }
  bases = {found[name]: tensor for name, tensor in adapter.bases.items() if name in found}
  return jax.tree_util.tree_unflatten(
    treedef, [_longer(leaf, *grown[path], bases.get(path)) if path in grown else leaf for path, leaf in leaves.items()]
  )


def _shapes(adapter: Adapter) -> dict[str, tuple[int, ...]]:
  """The shapes that an adapter has for torch's parameters, by name; of rows of tokens the least that holds them."""
  shapes: dict[str, tuple[int, ...]] = {f"{name}.weight": module.shape for name, module in adapter.modules.items()}
  shapes |= {name: tensor.shape for name, tensor in {**adapter.bases, **adapter.whole}.items()}
  rows = {name: (max(tokens.indices) + 1, tokens.rows.shape[1]) for name, tokens in adapter.tokens.items()}
  return shapes | {name: shape for name, shape in rows.items() if name not in shapes}


def _is_of_tokens(path: str) -> bool:
  """Whether a leaf is a token embedding or a head, or a head's bias."""
  name, parameter = split_path(path)[0].replace("/", "."), split_path(path)[1]
  return is_head(name) or (is_embedding(name) and parameter == "weight")


def _growth(path: str, leaf: Sequence[int], torch: Sequence[int]) -> tuple[int, int] | None:
  """The axis along which a leaf is shorter than torch's (vocabulary, ...), and the length there; `None` for none."""
  if not _is_of_tokens(path) or len(leaf) != len(torch):
    return None
  if len(leaf) == 1:
    return (0, torch[0]) if torch[0] > leaf[0] else None
  axes = [axis for axis in (0, 1) if leaf[1 - axis] == torch[1] and leaf[axis] < torch[0]]
  if len(axes) == 2:  # as many tokens as features: an embedding has its tokens first, a kernel last
    axes = [0] if path.endswith("embedding") else [1]
  return (axes[0], torch[0]) if axes else None


def _vocabulary_axis(path: str, leaf: Sequence[int], old: int) -> int | None:
  """The axis of the tokens of another embedding or head, which grows along."""
  if not _is_of_tokens(path) or old not in leaf:
    return None
  return leaf.index(old) if list(leaf).count(old) == 1 else 0 if path.endswith("embedding") else len(leaf) - 1


def _longer(leaf: Any, axis: int, size: int, base: np.ndarray | None) -> Any:
  """A leaf of more tokens: zeros, or the rows of a base that the adapter's folder holds, (vocabulary, features)."""
  shape = (*leaf.shape[:axis], size, *leaf.shape[axis + 1 :])
  if isinstance(leaf, jax.ShapeDtypeStruct):
    return jax.ShapeDtypeStruct(shape, leaf.dtype)
  old = leaf.shape[axis]
  if base is None or base.ndim != leaf.ndim:
    more = np.zeros((*shape[:axis], size - old, *shape[axis + 1 :]), leaf.dtype)
  else:
    more = (base if axis == 0 else base.T)[(slice(None),) * axis + (slice(old, size),)].astype(leaf.dtype)
  return jnp.concatenate([jnp.asarray(leaf), jnp.asarray(more)], axis)
