"""`load`: a model's files into a tree, one leaf after the other."""

from collections.abc import Callable, Iterator, Mapping
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._base.paths import flatten
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora.hub._plan import Plan, plan_of, read_group
from jaxlora.hub._records import HubError, Source, failed
from jaxlora.hub._source import open_source
from jaxlora.peft._from_modules import check_base
from jaxlora.peft._names import Names
from jaxlora.peft._nodes import device_array, layer_from_torch
from jaxlora.peft._records import PeftError
from jaxlora.peft._roles import Axes, known_roles


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
) -> Any:
  """Reads a model's weights into a tree of parameters.

      kernel = weight.T,    scanned kernel = stack_l weight_l.T,    convolution (h, w, in, out) = weight (out, in, h, w)

  Nothing is read until every tensor and every leaf has its place. Then one leaf after the other is read (from a view of
  the file where it is safetensors), laid out, cast, and put on its devices.

  Args:
    source: a safetensors file, an index of several, a folder with either, or a GGUF file (Llama, Mistral, Qwen2 and
      Qwen3, as llama.cpp writes them; its codes become floats). Weights that are quantised in safetensors (FP8, NF4,
      GPTQ, AWQ, ...) become floats, too.
    like: the tree: arrays, or `jax.ShapeDtypeStruct`s. Linen's parameters, NNX modules, dictionaries.
    names: regex over paths -> torch module's name, as for `jaxlora.peft.load`; `Split` and `Joined` where one leaf is
      several modules, or several leaves are one.
    axes: regex -> roles, where nothing else tells which axes of a leaf are inputs, such as `"io"`.
    dtype: of all floating leaves; `None` for each leaf's own.
    shardings: a `jax.sharding.Sharding` for all leaves, or a tree of them like `like`; each device gets its part alone.
      `None` for the shardings of the leaves of `like`, where they have some.
    probe: as for `jaxlora.adapt`: a call of the model that tells the roles that names do not.
    ignore: a regex of the model's tensors that the tree has no leaves for, such as `"vision_tower.*"`.

  Returns:
    A tree of the same nesting. Leaves that are no floats and have no tensor (counters, random keys) are `like`'s own.

  Raises:
    HubError: listing all that does not fit: leaves without a tensor, tensors without a leaf, shapes; files that cannot
      be read.

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
  if problems:
    raise failed(f"hub.load: {opened.place}", problems)
  placed = dict(zip(leaves, _shardings_of(leaves, shardings), strict=True))
  new = {path: _on_devices(value, placed[path]) for path, value in _values(plan, opened, dtype)}
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


def _values(plan: Plan, source: Source, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
  """The leaves by path, one after the other."""
  done: set[str] = set()
  for path in plan.names:
    if path in plan.parts and path not in done:
      arrays = read_group(plan, source, path)
      together = [other for other in plan.parts if plan.parts[other].modules == plan.parts[path].modules]
      for other in together:
        yield other, _value(plan, other, arrays.__getitem__, dtype)
      done |= {*together}
    elif path not in done:
      yield path, _value(plan, path, lambda name: source.tensors[name].read(), dtype)


def _value(plan: Plan, path: str, read: Callable[[str], np.ndarray], dtype: Any) -> np.ndarray:
  """A leaf, made of the tensor of each of its layers."""
  leaf, tensors = plan.leaves[path], plan.names[path]
  shape, own = shape_of_leaf(leaf), jnp.result_type(leaf)
  kind = own if dtype is None or not jnp.issubdtype(own, jnp.floating) else jnp.dtype(dtype)
  stacked = len(next(iter(tensors)))
  axes = plan.known.stacked_axes(path, stacked)
  value = np.empty(shape, kind)
  layers = np.moveaxis(value, axes, range(stacked))  # a view
  for index, name in tensors.items():
    layers[index] = layer_from_torch(path, shape, layers.shape[stacked:], name, read(name), plan.known)
  return value


def _on_devices(value: np.ndarray, sharding: Any) -> jax.Array:
  if sharding is None:
    return device_array(value)
  return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])
