"""Adapted leaves made of torch's modules and tensors: one of each, or those of all layers of a stack."""

from collections.abc import Mapping, Sequence
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxlora._adapt.layouts import Clue
from jaxlora._weight.dora import squared_norms
from jaxlora._weight.shapes import shape_of_leaf
from jaxlora._weight.weight import UNIT_SCALE, LoraWeight
from jaxlora.peft._layout import factors_from_torch, torch_shapes, weight_from_torch
from jaxlora.peft._records import RESIZE, Module, is_resized
from jaxlora.peft._roles import KnownRoles, roles_for_module, roles_of_layer

Index = tuple[int, ...]  # along the stacked axes of a leaf; () where it has none


def lora_weight(path: str, leaf: Any, modules: Mapping[Index, Module], known: KnownRoles, dropout: float) -> LoraWeight:
  """A leaf adapted by the module of each of its layers; layers without one have zero factors.

  Raises:
    ValueError: if they do not fit.
  """
  shape, (first, *_) = shape_of_leaf(leaf), modules.values()
  if not jnp.issubdtype(jnp.result_type(leaf), jnp.floating):
    raise ValueError(f"dtype {leaf.dtype} cannot be adapted; expected a real floating dtype")
  told = _roles_of(path, shape, first, len(next(iter(modules))), known)
  roles = told.roles
  factors = {index: _factors(index, module, first.kind, shape, roles) for index, module in modules.items()}
  stack = tuple(size for size, role in zip(shape, roles, strict=True) if role == "s")
  a, b, alpha = _stacked(modules, factors, stack)
  dora = first.magnitude is not None
  if any((module.magnitude is not None) != dora for module in modules.values()):
    raise ValueError("some of its layers have a magnitude (DoRA), and others have none")
  return LoraWeight(
    base=leaf,
    variant="dora" if dora else "lora",
    extra=_magnitudes(leaf, roles, modules) if dora else {},
    a=device_array(a),
    b=device_array(b),
    roles=roles,
    rank=max(module.rank for module in modules.values()),
    alpha=alpha,
    scaling=first.scaling,
    dropout=dropout,
    sure=told.proven,
  )


def _roles_of(path: str, shape: Sequence[int], module: Module, stacked: int, known: KnownRoles) -> Clue:
  """The roles of a leaf with `stacked` stacked axes, one layer of which `module` adapts."""
  axes = known.stacked_axes(path, stacked)
  layer = [size for d, size in enumerate(shape) if d not in axes]
  if len(layer) < 2:
    raise ValueError(f"shape {tuple(shape)} has fewer than two axes beside {stacked} stacked ones")
  if path in known.given:
    if not {"i", "o"} <= set(known.given[path]):
      raise ValueError(f"roles {known.given[path]!r} have no input or no output axis, and a low-rank update needs both")
    return Clue(known.given[path], "it is given")
  told = roles_for_module(path, layer, module, known)
  if len(told.roles) != len(layer):
    raise ValueError(f"shape {tuple(shape)}, but the adapter is one of {module.kind}: {module.a.shape}")
  rest = iter(told.roles)
  return told._replace(roles="".join("s" if d in axes else next(rest) for d in range(len(shape))))


def _factors(
  index: Index, module: Module, kind: str, shape: Sequence[int], roles: str
) -> tuple[np.ndarray, np.ndarray]:
  """The factors of one layer, (rank, *in) and (rank, *out), checked against the leaf that it belongs to."""
  layer = [size for size, role in zip(shape, roles, strict=True) if role != "s"]
  stack = tuple(size for size, role in zip(shape, roles, strict=True) if role == "s")
  layer_roles = roles.replace("s", "")
  expected = torch_shapes(layer, layer_roles, module.kind, module.rank)
  if any(k >= size for k, size in zip(index, stack, strict=True)):
    raise ValueError(f"{module.name} is layer {index}, but the leaf's shape {shape} has {stack} of them")
  if (module.a.shape, module.b.shape) != expected or module.kind != kind:
    raise ValueError(
      f"{module.name} has lora_A {module.a.shape} and lora_B {module.b.shape}; expected {expected[0]} and"
      f" {expected[1]} for a leaf of shape {shape} with roles {roles!r}"
    )
  return factors_from_torch(module, layer, layer_roles)


def _stacked(
  modules: Mapping[Index, Module], factors: Mapping[Index, tuple[np.ndarray, np.ndarray]], stack: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, float]:
  """The factors of all layers with one rank and one scale, and the alpha of that scale.

  Smaller ranks are filled up with zeros. The scale is that of the first module whose own is not zero; what differs goes
  into B.
  """
  first = next((module for module in modules.values() if module.scale), next(iter(modules.values())))
  if not stack:
    return *factors[()], first.alpha
  rank = max(module.rank for module in modules.values())
  a, b = (
    np.zeros((*stack, rank, *pieces[0].shape[1:]), np.result_type(*(piece.dtype for piece in pieces)))
    for pieces in zip(*factors.values(), strict=True)
  )
  for index, module in modules.items():
    ratio = module.scale / first.scale if first.scale else 1.0
    a[index][: module.rank], piece = factors[index]
    b[index][: module.rank] = piece if ratio == 1 else piece * b.dtype.type(ratio)
  alpha = first.alpha if first.rank == rank else first.scale * UNIT_SCALE[first.scaling](rank)
  return a, b, alpha


def _magnitudes(leaf: Any, roles: str, modules: Mapping[Index, Module]) -> dict[str, jax.Array]:
  """DoRA's parts; layers without a module keep the base's norms.

  Raises:
    ValueError: if the base's values are not known.
  """
  if isinstance(leaf, jax.ShapeDtypeStruct):
    raise ValueError("DoRA takes the norms of the base, and this one has a shape alone; load onto the base's values")
  norm = jnp.sqrt(squared_norms(jnp.asarray(leaf), roles))
  magnitude = np.array(norm)
  for index, module in modules.items():
    magnitude[index] = np.asarray(module.magnitude, magnitude.dtype).reshape(magnitude[index].shape)
  return {"magnitude": jnp.asarray(magnitude), "norm": norm}


def whole_value(path: str, leaf: Any, tensors: Mapping[Index, tuple[str, np.ndarray]], known: KnownRoles) -> jax.Array:
  """The value of a leaf that torch's tensors replace; layers of a stack without a tensor keep the base's.

  Args:
    path: of the leaf.
    leaf: the base.
    tensors: the name and the value of the torch parameter, by index along the stacked axes.
    known: roles of the tree.

  Raises:
    ValueError: if a tensor does not fit.
  """
  shape, stacked = shape_of_leaf(leaf), len(next(iter(tensors)))
  abstract = isinstance(leaf, jax.ShapeDtypeStruct)
  value = np.zeros(shape, leaf.dtype) if abstract or not stacked else np.array(leaf)
  layers = np.moveaxis(value, known.stacked_axes(path, stacked), range(stacked))  # a view
  stack, layer = layers.shape[:stacked], layers.shape[stacked:]
  for index, (name, tensor) in tensors.items():
    if any(k >= size for k, size in zip(index, stack, strict=True)):
      raise ValueError(f"{name} is layer {index}, but the leaf's shape {shape} has {stack} of them")
    layers[index] = layer_from_torch(path, shape, layer, name, tensor, known).astype(leaf.dtype)
  return device_array(value)


def layer_from_torch(
  path: str, shape: Sequence[int], layer: Sequence[int], name: str, tensor: np.ndarray, known: KnownRoles
) -> np.ndarray:
  """One layer of a leaf of `shape`, in the layout of the leaf, made of the torch parameter `name`.

  Raises:
    ValueError: if it does not fit.
  """
  module, _, parameter = name.rpartition(".")
  if parameter == "bias":
    found = tensor.reshape(layer) if tensor.ndim == 1 and tensor.size == math.prod(layer) else None
  elif parameter != "weight":
    found = _as_it_is(name, tensor, layer)
  else:
    inputs_first = known.stores_inputs_first(module)
    roles = roles_of_layer(path, layer, known, None if inputs_first else tensor.shape)
    found = weight_from_torch(tensor, layer, roles, known.kind(path, module, roles), inputs_first)
  if found is None:
    hint = f". {RESIZE}" if is_resized(name, layer, tensor.shape) else ""
    raise ValueError(f"{name} has shape {tensor.shape}, which does not fit a leaf of shape {tuple(shape)}{hint}")
  return found


def _as_it_is(name: str, tensor: np.ndarray, layer: Sequence[int]) -> np.ndarray | None:
  """A parameter that is no layer's weight, such as Mamba's `A_log`; `None` where it does not fit.

  Raises:
    ValueError: where its sizes do not tell that its axes are in the leaf's order.
  """
  if tensor.shape != tuple(layer):
    return None
  long = [size for size in layer if size > 1]
  if len({*long}) < len(long):
    raise ValueError(
      f"{name} has shape {tensor.shape}, which does not tell in which order its axes are. Put the file's tensor into"
      " the merged parameters by hand, and leave it out of the file"
    )
  return tensor


def device_array(array: np.ndarray) -> jax.Array:
  """A copy on the device: whoever changes the NumPy array later does not change the tree."""
  if array.dtype == np.float64 and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
    array = array.astype(np.float32)
  return jnp.array(array, copy=True)
