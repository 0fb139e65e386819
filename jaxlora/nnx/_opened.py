"""An adapted module as the tree that the rest of this library takes."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from jaxlora._weight.partitioned import named_box
from jaxlora.nnx._variables import holds_weight, node_of
from jaxlora.nnx._walk import FACTORS, every_object, factors_of, paths_of, plain_class


def to_tree(module: Any) -> Any:
  """The module as `jaxlora.adapt` makes one: of its plain classes, a `LoraWeight` in the place of each adapted weight.

  Every function of this library takes it; `jaxlora.merge`, `strip`, `split`, `summary`, `jaxlora.peft.save` and
  `jaxlora.checkpoint.save` take the module that `jaxlora.nnx.adapt` returned as well, and do this first.

  Args:
    module: what `jaxlora.nnx.adapt` or `from_tree` returned. It is not changed, and shares its arrays.

  Returns:
    A module of the same nesting; `from_tree` is the inverse.

  Example:
    >>> from flax import nnx
    >>> import jax, jaxlora.nnx
    >>> model = nnx.Linear(6, 5, rngs=nnx.Rngs(0))
    >>> model = jaxlora.nnx.adapt(model, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> jaxlora.nnx.to_tree(model).kernel.get_value()
    LoraWeight(6x5 io, rank 2, f32)
  """
  tree = nnx.clone(module, graph=True)
  open_in_place(tree)
  return tree


def opened(tree: Any) -> Any:
  """A module of ours as `to_tree` gives it; any other tree as it is."""
  return to_tree(tree) if isinstance(tree, nnx.Module) and plain_class(tree) is not None else tree


def open_in_place(module: Any, base: Callable[[Any, str], Any] = lambda base, path: base) -> list[str]:
  """Gives modules their plain classes back, and their Variables the adapted weights; returns these' paths."""
  paths = paths_of(module)
  adapted = []
  for _, _, variable, factors in list(factors_of(module)):
    if not holds_weight(variable):  # of a weight that two modules share the first has done it
      path = paths[id(variable)]
      variable.set_raw_value(node_of(factors, base(variable.get_raw_value(), path)))
      named_box(variable)
      adapted.append(path)
  for node in every_object(module).values():
    if (plain := plain_class(node)) is not None:
      if FACTORS in vars(node):
        delattr(node, FACTORS)
      object.__setattr__(node, "__class__", plain)
  return adapted
