"""Modules with the factors of qwix, which Tunix trains, as ours, and back."""

from typing import Any

from flax import nnx
import jax.numpy as jnp

from jaxlora._base.text import listed
from jaxlora._weight.weight import LoraWeight
from jaxlora.nnx._adapt import from_tree
from jaxlora.nnx._opened import opened
from jaxlora.nnx._walk import attributes, every_object, owned_variables, paths_of
from jaxlora.peft._lora_leaves import from_lora_leaves, is_qwixs
from jaxlora.peft._records import PeftError
from jaxlora.peft._roles import Axes
from jaxlora.quant._qwix import from_qwix as quantised_by_qwix

_A, _B = "_lora_a", "_lora_b"
_LEFT = ("qwix_path", "qwix_rngs", "disable_quant_stats_update")  # qwix's own attributes of every module


def from_qwix(module: Any, *, alpha: float, axes: Axes = None, **options: Any) -> Any:
  """A module that `qwix.apply_lora_to_model` made as an adapted one, of its plain classes, with equal outputs.

      W' = W + alpha / rank * A B

  Args:
    module: a module of NNX with `kernel_lora_a` and `kernel_lora_b` beside `kernel`; it is not changed. Weights that
      qwix has quantised stay codes, as `jaxlora.quant.from_qwix` takes them; activations are not quantised.
    alpha: of qwix's rule, which the module does not hold.
    axes: regex over paths -> roles, one letter per axis, for weights whose roles the factors' shapes do not tell.
    **options: as for `from_tree`.

  Returns:
    The adapted module, as `jaxlora.nnx.adapt` makes them; `to_qwix` is the inverse.

  Raises:
    TypeError: if it is no module of NNX.
    ValueError: naming the leaf: a factor without the other one or without its weight, factors that do not fit, codes
      that have no format here; or if there are no factors.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx, qwix  # doctest: +SKIP
    >>> model = qwix.apply_lora_to_model(model, qwix.LoraProvider(rank=4, alpha=8.0), x, rngs=rngs)  # doctest: +SKIP
    >>> model = jaxlora.nnx.from_qwix(model, alpha=8.0)  # doctest: +SKIP

  Source: `qwix/_src/providers/lora.py` and `qwix/_src/model.py` of qwix 0.1.8.
  """
  if not isinstance(module, nnx.Module):
    raise TypeError(f"from_qwix: found {type(module).__name__}, expected a module of flax.nnx.")
  tree = nnx.clone(module, graph=True)
  paths, found = paths_of(tree), 0
  problems: list[str] = []
  for node in list(every_object(tree).values()):
    if isinstance(node, nnx.Variable):
      continue
    for name in sorted({name[: -len(_A)] for name in attributes(node) if name.endswith((_A, _B))}):
      found += 1
      _take(node, name, "/".join(filter(None, (paths[id(node)], name))), alpha, axes, problems)
    for name in _LEFT:
      if name in vars(node):
        delattr(node, name)
    if (plain := vars(type(node)).get("_unquantized_type")) is not None:
      object.__setattr__(node, "__class__", plain)
  if problems:
    raise ValueError(f"from_qwix: {listed(problems)}. Nothing was converted.")
  if not found:
    raise ValueError(
      "from_qwix: found no factors of qwix, expected kernel_lora_a and kernel_lora_b beside kernel. Pass what"
      " qwix.apply_lora_to_model returned, or adapt it with jaxlora.nnx.adapt."
    )
  return from_tree(tree, **options)


def _take(node: Any, name: str, path: str, alpha: float, axes: Axes, problems: list[str]) -> None:
  """Puts a weight together with its factors, which leave the module."""
  held = {part: vars(node).get(part) for part in (name, name + _A, name + _B)}
  if missing := [part for part, value in held.items() if value is None]:
    problems.append(f"{path}: {listed(missing)} missing, expected the weight and both factors")
    return
  if strange := [value for value in held.values() if not (isinstance(value, nnx.Variable) or is_qwixs(value))]:
    kinds = {type(value).__name__ for value in strange}
    problems.append(f"{path}: found {listed(sorted(kinds))}, expected Variables, or codes of qwix")
    return
  *modules, last = path.split("/")
  try:
    leaves: Any = {last + part.removeprefix(name): _raw(value, path) for part, value in held.items()}
    for key in reversed(modules):
      leaves = {key: leaves}
    weight: Any = from_lora_leaves(leaves, alpha=alpha, axes=axes)
  except (PeftError, ValueError) as error:
    problems.append(f"{path}: {error}")
    return
  for key in path.split("/"):
    weight = weight[key]
  if isinstance(held[name], nnx.Variable):
    held[name].set_raw_value(weight)
  else:
    setattr(node, name, nnx.Param(weight))
  for part in (name + _A, name + _B, f"{name}_lora_einsum_str"):
    if part in vars(node):
      delattr(node, part)


def _raw(value: Any, path: str) -> Any:
  """The value of a Variable, or qwix's codes as a quantised array."""
  return value.get_raw_value() if isinstance(value, nnx.Variable) else quantised_by_qwix({path: value})[path]


def to_qwix(model: Any, onto: Any, *, alpha: float) -> Any:
  """The inverse of `from_qwix`: a module that qwix made, with the factors of an adapted one.

  Args:
    model: what `jaxlora.nnx.adapt` or `from_tree` returned.
    onto: the same module as `qwix.apply_lora_to_model` gives it; its other state stays. It is not changed.
    alpha: of qwix's rule; where our scale is another one than its `alpha / rank`, the difference goes into B.

  Returns:
    A module like `onto`.

  Raises:
    ValueError: naming the leaves that one has and the other has not, or whose rank or variant differs.

  Example:
    >>> model = jaxlora.nnx.to_qwix(model, qwix_model, alpha=8.0)  # doctest: +SKIP
  """
  tree, new = opened(model), nnx.clone(onto, graph=True)
  paths = paths_of(tree)
  nodes = {paths[id(variable)]: variable.get_raw_value() for _, _, variable in owned_variables(tree)}
  nodes = {path: node for path, node in nodes.items() if isinstance(node, LoraWeight)}
  variables = {path: node for node, path in ((v, p) for v, p in _paths(new)) if path.endswith((_A, _B))}
  expected = {path + part for path in nodes for part in (_A, _B)}
  if differing := sorted(expected ^ variables.keys()):
    raise ValueError(f"to_qwix: {listed(differing)} in one of the two modules alone; expected the same in both.")
  for path, node in nodes.items():
    a, b = (variables[path + part] for part in (_A, _B))
    axis = node.roles.count("s")
    if node.variant != "lora" or node.extra or node.dropout or a.shape[-1] != node.rank:
      raise ValueError(
        f"to_qwix: {path}: found variant {node.variant!r}, rank {node.rank}, dropout {node.dropout}; expected 'lora',"
        f" {a.shape[-1]}, 0."
      )
    ratio = node.scale / (alpha / node.rank)
    a.set_value(jnp.moveaxis(node.a, axis, -1).reshape(a.shape))
    b.set_value((node.b if ratio == 1 else node.b * jnp.asarray(ratio, node.b.dtype)).reshape(b.shape))
  return new


def _paths(module: Any) -> list[tuple[nnx.Variable, str]]:
  paths = paths_of(module)
  return [(node, paths[key]) for key, node in every_object(module).items() if isinstance(node, nnx.Variable)]
