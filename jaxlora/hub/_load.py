"""`load`: a model's files into a tree, one leaf after the other."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora.hub._codes import CodedLeaf, coded_leaves, coded_value, in_floats
from jaxlora.hub._layers import layers_of, tensors_of, together
from jaxlora.hub._plan import Plan, plan_of
from jaxlora.hub._records import HubError, Source, failed
from jaxlora.hub._source import open_source
from jaxlora.peft._from_modules import check_base
from jaxlora.peft._names import Names
from jaxlora.peft._nodes import device_array, layer_from_torch
from jaxlora.peft._records import PeftError
from jaxlora.peft._roles import Axes, known_roles
from jaxlora.quant._shards import check_shards, placed


def load(
  source: str | os.PathLike[str],
  like: Any,
  *,
  names: Names = None,
  axes: Axes = None,
  dtype: Any = None,
  shardings: Any = None,
  probe: Callable[[Any], Any] | None = None,
  ignore: str | None = None,
  codes: str | None = None,
) -> Any:
  """Reads a model's weights into a tree of parameters.

      kernel = weight.T,    scanned kernel = stack_l weight_l.T,    convolution (h, w, in, out) = weight (out, in, h, w)

  Nothing is read until every tensor and every leaf has its place. Then one leaf after the other is read (from a view of
  the file where it is safetensors), laid out, cast, and put on its devices.

  Args:
    source: a safetensors file, an index of several, a folder with either, or a GGUF file (Llama, Mistral, Qwen2 and
      Qwen3, as llama.cpp writes them). Codes become floats, those of safetensors (FP8, NF4, GPTQ, AWQ, ...) too, but
      for the leaves that `codes` names.
    like: the tree: arrays, or `jax.ShapeDtypeStruct`s. Linen's parameters, NNX modules, dictionaries.
    names: regex over paths -> torch module's name, as for `jaxlora.peft.load`; `Split` and `Joined` where one leaf is
      several modules, or several leaves are one.
    axes: regex -> roles, where nothing else tells which axes of a leaf are inputs, such as `"io"`.
    dtype: of all floating leaves; `None` for each leaf's own.
    shardings: a `jax.sharding.Sharding` for all leaves, or a tree of them like `like`; each device gets its part alone.
      `None` for the shardings of the leaves of `like`, where they have some.
    probe: as for `jaxlora.adapt`: a call of the model that tells the roles that names do not.
    ignore: a regex of the model's tensors that the tree has no leaves for, such as `"vision_tower.*"`.
    codes: a regex over the paths of leaves that stay codes where the file has codes for them, `".*"` for all: they are
      `jaxlora.QuantizedArray`s then, in the leaf's layout, whose values are those of the load in floats, to the bit.

  Returns:
    A tree of the same nesting. Leaves that are no floats and have no tensor (counters, random keys) are `like`'s own.

  Raises:
    HubError: listing all that does not fit: leaves without a tensor, tensors without a leaf, shapes, codes of several
      formats in one leaf; files that cannot be read.

  Example:
    >>> import tempfile, jax, jax.numpy as jnp, numpy as np, jaxlora.hub, safetensors.numpy
    >>> weight = np.arange(6, dtype=np.float32).reshape(2, 3)  # torch's (out, in)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...   safetensors.numpy.save_file({"model.layers.0.mlp.weight": weight}, folder + "/model.safetensors")
    ...   jaxlora.hub.load(folder, {"layers_0": {"mlp": {"kernel": jax.ShapeDtypeStruct((3, 2), jnp.float32)}}})
    {'layers_0': {'mlp': {'kernel': Array([[0., 3.],
           [1., 4.],
           [2., 5.]], dtype=float32)}}}
  """
  opened = open_source(source)
  check_base(like, names, "hub.load")
  nodes, treedef = flatten(like)
  leaves = dict(nodes)
  try:
    known = known_roles(leaves, like, axes, probe)
  except PeftError as error:
    raise HubError(f"hub.load: {error}") from error
  plan, problems = plan_of(opened, leaves, known, names, ignore)
  coded, unfit = (set[str](), list[str]())
  if not problems:
    coded, unfit = coded_leaves({path: tensors_of(plan, opened, path) for path in plan.names}, opened, codes)
  problems += unfit
  problems += [
    f"{path}: names= has a scale for its values, and codes are the file's own. {in_floats(path)}"
    for path in sorted(coded & plan.parts.keys())
    if getattr(plan.parts[path].parts, "scale", None)
  ]
  if problems:
    raise failed(f"hub.load: {opened.place}", problems)
  lying = dict(zip(leaves, _shardings_of(leaves, shardings), strict=True))
  new = {path: _on_devices(path, value, lying[path]) for path, value in _values(plan, opened, dtype, coded)}
  return treedef.unflatten([new.get(path, leaf) for path, leaf in leaves.items()])


def _shardings_of(leaves: Mapping[str, Any], shardings: Any) -> list[Any]:
  """The sharding of each leaf; `None` where nothing says one."""
  if shardings is None:
    return [
      getattr(leaf, "sharding", None) if isinstance(leaf, jax.ShapeDtypeStruct) else None for leaf in leaves.values()
    ]
  if isinstance(shardings, jax.sharding.Sharding):
    return [shardings] * len(leaves)
  found = jax.tree.leaves(shardings, is_leaf=lambda node: node is None or isinstance(node, jax.sharding.Sharding))
  if len(found) != len(leaves):
    raise HubError(
      f"hub.load: shardings has {len(found)} leaves, and the tree {len(leaves)}; expected one for each (None for the"
      " default), or one jax.sharding.Sharding for all."
    )
  return found


def _values(plan: Plan, source: Source, dtype: Any, coded: Collection[str]) -> Iterator[tuple[str, Any]]:
  """The leaves by path, one after the other."""
  done: set[str] = set()
  for path in plan.names:
    if path not in done:
      paths = together(plan, path)
      yield from _in_floats(plan, source, [other for other in paths if other not in coded], dtype).items()
      for other in filter(coded.__contains__, paths):
        yield other, _in_codes(plan, source, other, dtype)
      done |= {*paths}


def _in_floats(plan: Plan, source: Source, paths: Sequence[str], dtype: Any) -> dict[str, np.ndarray]:
  """Leaves that share their torch modules, made of the tensors of one layer after the other."""
  values = {path: np.empty(shape_of_leaf(plan.leaves[path]), _kind(plan.leaves[path], dtype)) for path in paths}
  index_of = {name: (path, index) for path in paths for index, name in plan.names[path].items()}
  filled = 0
  for arrays in layers_of(plan, source, paths[0], lambda name: source.tensors[name].read()) if paths else ():
    for name in index_of.keys() & arrays.keys():
      path, index = index_of[name]
      axes = plan.known.stacked_axes(path, len(index))
      layers = np.moveaxis(values[path], axes, range(len(index)))  # a view
      layers[index] = layer_from_torch(
        path, values[path].shape, layers.shape[len(index) :], name, arrays[name], plan.known
      )
      filled += 1
  assert filled == len(index_of)
  return values


def _in_codes(plan: Plan, source: Source, path: str, dtype: Any) -> Any:
  """A leaf of codes, of NumPy arrays."""
  shape, kind = shape_of_leaf(plan.leaves[path]), _kind(plan.leaves[path], dtype)
  leaf = CodedLeaf(path, shape, kind, plan.names[path], plan.known, simple=path not in plan.parts)
  return coded_value(leaf, source, lambda read: layers_of(plan, source, path, read))


def _kind(leaf: Any, dtype: Any) -> np.dtype:
  """The dtype that a leaf gets."""
  own = jnp.result_type(leaf)
  return own if dtype is None or not jnp.issubdtype(own, jnp.floating) else jnp.dtype(dtype)


def _on_devices(path: str, value: Any, sharding: Any) -> Any:
  if isinstance(value, np.ndarray):
    if sharding is None:
      return device_array(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
  if not isinstance(sharding, jax.sharding.NamedSharding):
    return jax.device_put(value, sharding)
  lies = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
  check_shards("hub.load", path, lies, value.block, f"Shard it along another axis. {in_floats(path)}")
  return placed(value, lies)
