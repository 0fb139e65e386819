"""`labels`, `mask`, `optimizer`, `lora_plus`: optax on the trainable leaves alone."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora._weight.tree import adapted_leaves, check_adapted, map_adapted
from jaxlora._weight.weight import is_adapted, parts, trained_parts, with_parts


def labels(tree: Any) -> Any:
  """A tree of strings that say what each leaf is: `"a"`, `"b"`, `"magnitude"`, `"full"` or `"frozen"`.

  Args:
    tree: a combined tree, or any tree of its structure.

  Returns:
    The tree with a label in the place of each leaf: what `optax.partition` takes to give A and B their own optimisers.
    Put the partition inside `optimizer`, which gives it the trainable leaves alone: by itself it cannot take the
    `None`s of `jaxlora.grad`.

  Example:
    >>> import optax
    >>> each = {"a": optax.adam(1e-4), "b": optax.adam(2e-3), "full": optax.sgd(0.1), "frozen": optax.set_to_zero()}
    >>> tx = optimizer(optax.partition(each, labels))
  """

  def labelled(node):
    trains = trained_parts(node)
    return with_parts(
      node, {name: part if part is None else trains.get(name, "frozen") for name, part in parts(node).items()}
    )

  return map_adapted(labelled, labelled, lambda x: "frozen", tree)


def mask(tree: Any) -> Any:
  """A tree of bools: `True` for the leaves that train.

  On its own in `optax.masked` this is a trap: `masked` passes the raw gradients of the other leaves through. Use
  `optimizer`.

  Args:
    tree: a combined tree, or any tree of its structure.

  Returns:
    The tree with a bool in the place of each leaf.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> mask(tree)
    {'kernel': LoraWeight(?x? io, rank 2, base=False, a=True, b=True)}
  """
  return jax.tree_util.tree_map(lambda label: label != "frozen", labels(tree))


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """Trains the adapters of a combined tree with `tx`, and leaves everything else exactly as it is.

  For loops that keep one parameter tree, such as flax's `TrainState`. Frozen leaves get zero updates and no optimizer
  state, whether the gradients hold arrays for them (`jax.grad`) or nothing (`jaxlora.grad`). Whatever else is put
  around `tx` goes inside, `optimizer(optax.MultiSteps(tx, 4))`: outside it would meet those gradients itself.

  Args:
    tx: any optax transformation; it sees the trainable leaves alone, weight decay and clipping included.

  Returns:
    An optax transformation for the whole tree.

  Raises:
    TypeError: if `tx` is no optax transformation.
    ValueError: from `init`, if the tree has no adapted leaf, is a half, or is the view of another `optimizer` around
      this one; from `update`, without `params` where the gradients hold `None`.

  Example:
    >>> import optax
    >>> tx = optimizer(optax.adamw(1e-4))
  """
  if isinstance(tx, optax.MultiSteps):  # which optax's own wrappers accept as well
    tx = tx.gradient_transformation()
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(f"optimizer: found {tx!r}, expected an optax transformation, such as optax.adamw(1e-4).")
  routed = optax.chain(
    optax.masked(tx, mask), optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(lambda x: not x, mask(tree)))
  )

  def init(params):
    check_adapted(params, "optimizer")
    if any(isinstance(node.base, optax.MaskedNode) for _, node in adapted_leaves(params)):
      raise ValueError(
        "optimizer: found one inside another; one is enough: optimizer(tx) masks the base for all of tx."
      )
    return routed.init(params)

  def update(updates, state, params=None, **extra):
    return routed.update(_with_zeros(updates, params), state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


def lora_plus(
  learning_rate: optax.ScalarOrSchedule,
  ratio: float = 16.0,
  make: Callable[[optax.ScalarOrSchedule], optax.GradientTransformation] = optax.adamw,
) -> optax.GradientTransformation:
  """LoRA+: B learns `ratio` times as fast as A and everything else that trains.

      eta_B = ratio * eta_A

  The right learning rates of A and B lie apart by the width of the model (section 3 of the paper). It is a partition by
  `labels`, nothing more.

  Args:
    learning_rate: of A, of magnitudes and of leaves trained whole: a number or an optax schedule.
    ratio: B's learning rate over A's; the paper suggests about 16.
    make: makes a transformation from a learning rate, such as `optax.adam`.

  Returns:
    An optax transformation for the trainable half of a tree, or, inside `optimizer`, for the whole tree.

  Raises:
    ValueError: if `ratio` is not a finite number above 0.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((8, 4))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> frozen, trainable = jaxlora.split(tree)
    >>> opt_state = lora_plus(1e-4).init(trainable)

  Source: Hayou et al., "LoRA+: Efficient Low Rank Adaptation of Large Models", arXiv:2402.12354, section 4.
  """
  if isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < math.inf:
    raise ValueError(f"lora_plus: ratio is {ratio!r}, expected a finite number above 0, such as 16.")

  def faster(count: Any) -> Any:
    return ratio * learning_rate(count) if callable(learning_rate) else ratio * learning_rate

  slow = make(learning_rate)
  fast = make(faster if callable(learning_rate) else faster(0))
  each = {"a": slow, "b": fast, "magnitude": slow, "full": slow, "frozen": optax.set_to_zero()}
  return optax.partition(each, labels)


def _with_zeros(updates: Any, params: Any) -> Any:
  """Gradients with zeros where `jaxlora.grad` has `None`, or `jax.grad` has float0, which nothing can be added to."""
  if params is None:
    for path, node in adapted_leaves(updates):
      if None in parts(node).values():
        raise ValueError(
          f"optimizer: update found None in the gradients of {path}, as jaxlora.grad gives them, and no params to tell"
          " its shape. Call tx.update(gradients, state, params)."
        )
    return updates

  def one(param: Any, update: Any) -> Any:
    if is_adapted(param):
      held = parts(update)
      return with_parts(param, {name: one(part, held[name]) for name, part in parts(param).items()})
    return _zeros(param) if update is None or _is_float0(update) else update

  def leaf(node):
    return node is None or is_adapted(node)

  return jax.tree_util.tree_map(one, params, updates, is_leaf=leaf)


def _zeros(param: Any) -> Any:
  """Zeros of one element's memory, broadcast by NumPy: `set_to_zero` replaces them, so nothing is compiled for them."""
  return None if param is None else np.broadcast_to(np.zeros((), jnp.result_type(param)), jnp.shape(param))


def _is_float0(update: Any) -> bool:
  return getattr(update, "dtype", None) == jax.dtypes.float0
