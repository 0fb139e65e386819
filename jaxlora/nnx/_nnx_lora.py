"""Modules with flax's own layers of LoRA, `nnx.LoRALinear` and `nnx.LoRA`, as ours, and back."""

from typing import Any

from flax import nnx
import jax.numpy as jnp

from jaxlora._base.text import listed
from jaxlora._weight.weight import FullWeight, LoraWeight
from jaxlora.nnx._adapt import from_tree
from jaxlora.nnx._opened import opened
from jaxlora.nnx._variables import holds_weight
from jaxlora.nnx._walk import children, every_object, owned_variables, paths_of

_EXPECTED = "expected nnx.LoRALinear, and nnx.LoRA around an nnx.Linear"


def from_nnx_lora(module: Any, **options: Any) -> Any:
  """A module with flax's layers of LoRA as an adapted one, with equal outputs.

      y = x W + (x A) B,    lora_a = A (in, rank), lora_b = B (rank, out)

  An `nnx.LoRALinear` becomes the `nnx.Linear` that it extends, and an `nnx.LoRA` its `base_module`, with factors beside
  their kernels. Their scale is 1.

  Args:
    module: a module of NNX; it is not changed.
    **options: as for `from_tree`.

  Returns:
    The adapted module, as `jaxlora.nnx.adapt` makes them; `to_nnx_lora` is the inverse.

  Raises:
    TypeError: if it is no module of NNX.
    ValueError: naming every leaf that is part of no such layer: an `nnx.LoRA` without a module or around another one
      than `nnx.Linear`, a subclass, factors that do not fit; or if there is none at all.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx
    >>> layer = nnx.LoRALinear(6, 5, lora_rank=2, rngs=nnx.Rngs(0))
    >>> model = jaxlora.nnx.from_nnx_lora(layer)
    >>> type(model).__name__, jaxlora.summary(model).leaves[0].rank
    ('Linear', 2)

  Source: `flax/nnx/nn/lora.py` of flax 0.12.
  """
  if not isinstance(module, nnx.Module):
    raise TypeError(f"from_nnx_lora: found {type(module).__name__}, expected a module of flax.nnx.")
  holder = nnx.List([nnx.clone(module, graph=True)])  # so that the module itself has a place in another one
  paths = {key: path.partition("/")[2] for key, path in paths_of(holder).items()}
  problems: list[str] = []
  for node in list(every_object(holder).values()):
    if type(node) is nnx.LoRALinear:
      _set(node, node.lora, paths, problems)
      object.__setattr__(node, "__class__", nnx.Linear)
      del node.lora
  for node in list(every_object(holder).values()):
    for name, value in [] if isinstance(node, nnx.Variable) else list(vars(node).items()):
      if type(value) is nnx.LoRA and type(value.base_module) is nnx.Linear:
        _set(value.base_module, value, paths, problems)
        object.__setattr__(node, name, value.base_module)
  problems += [
    f"{paths[id(node)] or 'the module'}: found {type(node).__name__}, {_EXPECTED}"
    for node in every_object(holder).values()
    if isinstance(node, (nnx.LoRA, nnx.LoRALinear))
  ]
  inside = {
    id(child) for node in every_object(holder).values() if isinstance(node, nnx.LoRA) for _, child in children(node)
  }
  problems += [
    f"{paths[id(node)]}: found a LoRAParam outside of flax's layers, {_EXPECTED}"
    for node in every_object(holder).values()
    if isinstance(node, nnx.LoRAParam) and id(node) not in inside
  ]
  if problems:
    raise ValueError(f"from_nnx_lora: {listed(problems)}. Nothing was converted.")
  if not any(holds_weight(node) for node in every_object(holder).values()):
    raise ValueError(f"from_nnx_lora: found no layer of LoRA, {_EXPECTED}. Adapt it with jaxlora.nnx.adapt.")
  return from_tree(holder[0], **options)


def _set(linear: Any, lora: Any, paths: dict[int, str], problems: list[str]) -> None:
  kernel, a, b = linear.kernel.get_raw_value(), lora.lora_a.get_raw_value(), lora.lora_b.get_raw_value()
  path = "/".join(filter(None, (paths[id(linear)], "kernel")))
  if holds_weight(linear.kernel):
    problems.append(f"{path}: found a second adapter of this kernel, expected one")
  elif a.shape[0] != kernel.shape[0] or b.shape[1] != kernel.shape[1] or a.shape[1] != b.shape[0]:
    problems.append(f"{path}: found factors {a.shape} and {b.shape}, expected those of a kernel {kernel.shape}")
  else:
    linear.kernel.set_raw_value(LoraWeight.from_factors(kernel, a.T, b, "io"))


def to_nnx_lora(model: Any) -> Any:
  """The inverse of `from_nnx_lora`: every adapted `nnx.Linear` as an `nnx.LoRALinear`, with equal outputs.

  The scale, which flax's layers do not have, goes into `lora_b`. Leaves trained whole have their trained values.

  Args:
    model: what `jaxlora.nnx.adapt` or `from_tree` returned; it is not changed.

  Returns:
    A module of flax alone.

  Raises:
    ValueError: naming every adapted weight that flax's layer has no place for: of another module, variant or layout, or
      with dropout.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx
    >>> model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    >>> model = jaxlora.nnx.adapt(model, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.nnx.to_nnx_lora(model).lora.lora_a.shape
    (6, 2)
  """
  tree = opened(model)
  paths = paths_of(tree)
  problems: list[str] = []
  for owner, name, variable in list(owned_variables(tree)):
    node = variable.get_raw_value()
    if isinstance(node, FullWeight):
      variable.set_raw_value(node.value)
    elif isinstance(node, LoraWeight):
      plain = node.variant == "lora" and not node.extra and node.roles == "io" and not node.dropout
      if type(owner) is nnx.Linear and name == "kernel" and plain:
        _extend(owner, node)
      else:
        problems.append(
          f"{paths[id(variable)]}: found {type(owner).__name__}, variant {node.variant!r}, roles {node.roles!r},"
          f" dropout {node.dropout}; expected the kernel of an nnx.Linear, 'lora', 'io', 0"
        )
  if problems:
    raise ValueError(f"to_nnx_lora: {listed(problems)}. Fold them in with jaxlora.merge(model) instead.")
  return tree


def _extend(linear: Any, node: LoraWeight) -> None:
  a, b = node.a.T, node.b * jnp.asarray(node.scale, node.b.dtype)
  lora = nnx.LoRA(a.shape[0], a.shape[1], b.shape[1], param_dtype=a.dtype, rngs=nnx.Rngs(0))
  lora.lora_a.set_value(a)
  lora.lora_b.set_value(b)
  linear.kernel.set_raw_value(node.base)
  object.__setattr__(linear, "__class__", nnx.LoRALinear)
  linear.lora = lora
