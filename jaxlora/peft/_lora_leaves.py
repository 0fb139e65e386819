"""Trees in which qwix, Tunix or `flax.nnx.LoRA` left factors beside the weights, as adapted trees."""

from collections.abc import Mapping
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora._adapt.config import LoraConfig
from jaxlora._base.coded import is_coded
from jaxlora._base.paths import components, flatten
from jaxlora._base.patterns import first_match
from jaxlora._weight.weight import LoraWeight
from jaxlora.peft._records import raise_problems
from jaxlora.peft._roles import Axes

_SUFFIXES = ("_lora_a", "_lora_b")  # qwix's, behind the weight's own name


def has_lora_leaves(paths: Any) -> bool:
  """Whether some paths are those of factors beside weights."""
  return any(_factor_of(path) is not None for path in paths)


def from_lora_leaves(tree: Any, *, alpha: float | None = None, axes: Axes = None) -> dict[str, Any]:
  """An adapted tree made of one that holds the factors of qwix, Tunix or `flax.nnx.LoRA` beside its weights.

      qwix:   W' = W + alpha / rank * A B,    nnx:   W' = W + A B,    A (in, rank), B (rank, out)

  `kernel_lora_a` and `_b` belong to `kernel`; those of an `nnx.LoRALinear`, below `lora`, to the kernel beside it;
  those of an `nnx.LoRA`, to the kernel of its `base_module`, which takes its place.

  Args:
    tree: nested dictionaries, such as a Linen model's parameters or `nnx.to_pure_dict(nnx.state(model))`. Weights may
      be codes, or missing, as in a checkpoint of the factors alone.
    alpha: of qwix's rule, which its trees do not hold; nnx has none.
    axes: regex -> roles, one letter per axis, for weights whose roles the factors' shapes do not tell.

  Returns:
    Nested dictionaries with `LoraWeight`s, and `jax.ShapeDtypeStruct`s for the weights that are missing.

  Raises:
    PeftError: listing factors that do not fit their weights, or whose scale or roles nothing tells, and weights in
      qwix's codes: `jaxlora.quant.from_qwix` takes those.

  Example:
    >>> import jax.numpy as jnp, jaxlora.peft
    >>> q = {"kernel": jnp.ones((6, 2, 4)), "kernel_lora_a": jnp.ones((6, 3)), "kernel_lora_b": jnp.ones((3, 8))}
    >>> jaxlora.peft.from_lora_leaves({"q": q}, alpha=6)
    {'q': {'kernel': LoraWeight(6x2x4 ioo, rank 3, f32, scale 2)}}

  Source: `qwix/_src/providers/lora.py` of qwix 0.1.8, `flax/nnx/nn/lora.py` of flax 0.12.
  """
  leaves = dict(flatten(tree, is_leaf=lambda node: is_coded(node) or is_qwixs(node))[0])
  patterns = LoraConfig(axes=axes).axes
  pairs: dict[str, dict[str, Any]] = {}  # by the path of the weight
  plain: dict[str, Any] = {}
  wrapped = {weight.rpartition("/")[0] for path in leaves if (weight := _wrapped_weight(path, leaves)) is not None}
  for path, leaf in leaves.items():
    if (half := _factor_of(path)) is None:
      plain[_unwrapped(path, wrapped)] = leaf
    else:
      pairs.setdefault(_weight_of(path, leaves, wrapped), {})[half] = (path, leaf)
  problems = [
    f"{path}: found {type(leaf).__name__}, which qwix quantised; take it in first, jaxlora.quant.from_qwix(tree)"
    for path, leaf in plain.items()
    if is_qwixs(leaf)
  ]
  raise_problems("from_lora_leaves", problems)
  for weight, halves in pairs.items():
    if len(halves) < 2:
      problems.append(f"{weight}: found {next(iter(halves.values()))[0]} alone; expected both factors")
      continue
    qwix = halves["a"][0].endswith(_SUFFIXES[0])
    if qwix and alpha is None:
      problems.append(
        f"{weight}: qwix's trees do not hold alpha, and its scale is alpha / rank. Say alpha= (--alpha in the command"
        " line)"
      )
      continue
    try:
      a, b = (jnp.asarray(halves[half][1]) for half in "ab")
      plain[weight] = _adapted(weight, plain.get(weight), a, b, alpha if qwix else None, patterns)
    except ValueError as error:
      problems.append(f"{weight}: {error}")
  raise_problems("from_lora_leaves", problems)
  return _nested(plain)


def is_qwixs(node: Any) -> bool:
  """Whether this is an array in qwix's codes, or its box."""
  return type(node).__module__.startswith("qwix.")


def _factor_of(path: str) -> str | None:
  """`"a"` or `"b"` where a path is that of a factor."""
  name = components(path)[-1]
  return next((half for half in "ab" if name == f"lora_{half}" or name.endswith(f"_lora_{half}")), None)


def _wrapped_weight(path: str, leaves: Mapping[str, Any]) -> str | None:
  """The weight of an `nnx.LoRA` around a module, by the path of its first factor."""
  *modules, name = components(path)
  weight = "/".join([*modules, "base_module", "kernel"])
  return weight if name == "lora_a" and weight in leaves else None


def _unwrapped(path: str, wrapped: set[str]) -> str:
  """A path without the `base_module` of an `nnx.LoRA`."""
  for module in wrapped:
    if path.startswith(f"{module}/"):
      return f"{module.removesuffix('/base_module')}/{path.removeprefix(f'{module}/')}"
  return path


def _weight_of(path: str, leaves: Mapping[str, Any], wrapped: set[str]) -> str:
  """The path that the weight of a factor has in the result."""
  *modules, name = components(path)
  if not name.startswith("lora_"):
    return "/".join([*modules, name.removesuffix(name[-len(_SUFFIXES[0]) :])])
  if modules[-1:] == ["lora"] and "/".join([*modules, "base_module", "kernel"]) not in leaves:
    modules = modules[:-1]  # an nnx.LoRALinear's
  return "/".join([*modules, "kernel"])


def _adapted(
  path: str, weight: Any, a: jax.Array, b: jax.Array, alpha: float | None, patterns: Mapping[str, str] | None
) -> LoraWeight:
  """A weight with its factors, (..., in, rank) and (..., rank, out), as (*stack, rank, *in) and (*stack, rank, *out).

  Raises:
    ValueError: if they do not fit, or fit in several ways.
  """
  given = first_match(patterns, path)
  if weight is None:
    if a.ndim > 2 and b.ndim > 2 and given is None:
      raise ValueError("the weight is not there, and nothing tells which axes of its factors are stacked; say axes=")
    given = given or "i" * (a.ndim - 1) + "o" * (b.ndim - 1)
    weight = jax.ShapeDtypeStruct(_shape_by_roles(given, a.shape, b.shape), a.dtype)
  shape, rank = tuple(weight.shape), a.shape[-1]
  if given is not None and len(given) != len(shape):
    raise ValueError(f"axes: {given!r} has {len(given)} letters, and the shape is {shape}")
  fits = [roles for roles in ([given] if given else _candidates(len(shape))) if _fits(shape, roles, a.shape, b.shape)]
  if len(fits) > 1 and components(path)[-1] == "kernel":  # Flax's kernels have their inputs first
    first = [roles for roles in fits if roles == "".join(sorted(roles, key="sio".index))]
    fits = first if len(first) == 1 else fits
  if len(fits) != 1:
    found = f"fit it as {', '.join(fits)}; say axes=" if fits else "do not fit it"
    raise ValueError(f"shape {shape}: factors of shapes {a.shape} and {b.shape} {found}")
  (roles,) = fits
  stack, ins, outs = (tuple(n for n, role in zip(shape, roles, strict=True) if role == own) for own in "sio")
  rank_first = jnp.moveaxis(a.reshape(*stack, math.prod(ins), rank), -1, -2).reshape(*stack, rank, *ins)
  return LoraWeight.from_factors(weight, rank_first, b.reshape(*stack, rank, *outs), roles, alpha=alpha)


def _shape_by_roles(roles: str, a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
  """The shape of a weight by its roles and the shapes of its factors.

  Raises:
    ValueError: if the factors have other numbers of axes.
  """
  stack = roles.count("s")
  sizes = {"s": iter(a[:stack]), "i": iter(a[stack:-1]), "o": iter(b[stack + 1 :])}
  if [len(a) - 1, len(b) - 1] != [stack + roles.count("i"), stack + roles.count("o")]:
    raise ValueError(f"axes: {roles!r} does not fit factors of shapes {a} and {b}, whose weight is not there")
  return tuple(next(sizes[role]) for role in roles)


def _candidates(ndim: int) -> list[str]:
  return ["".join(roles) for roles in itertools.product("sio", repeat=ndim) if {"i", "o"} <= set(roles)]


def _fits(shape: tuple[int, ...], roles: str, a: tuple[int, ...], b: tuple[int, ...]) -> bool:
  """Whether factors belong to a weight with these roles: axis by axis, or with its inputs and its outputs flattened."""
  stack, ins, outs = (tuple(n for n, role in zip(shape, roles, strict=True) if role == own) for own in "sio")
  rank = a[-1]
  return a in ((*stack, *ins, rank), (*stack, math.prod(ins), rank)) and b in (
    (*stack, rank, *outs),
    (*stack, rank, math.prod(outs)),
  )


def _nested(leaves: Mapping[str, Any]) -> dict[str, Any]:
  tree: dict[str, Any] = {}
  for path, leaf in leaves.items():
    node = tree
    *modules, name = components(path)
    for module in modules:
      node = node.setdefault(module, {})
    node[name] = leaf
  return tree
