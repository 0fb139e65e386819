"""`labels`, `mask`, `optimizer`, `lora_plus`: optax on the trainable leaves alone."""

from collections.abc import Callable
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora._base.coded import is_coded
from jaxlora._train.view import check_trainable, extra_in_halves, is_placeholder, trainable_half
from jaxlora._weight.describe import is_array
from jaxlora._weight.placement import on_the_mesh_of
from jaxlora._weight.tree import adapted_leaves, is_half_leaf, map_adapted
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

  For loops that keep one parameter tree, such as flax's `TrainState` or `nnx.Optimizer`. Frozen leaves get zero updates
  and no optimizer state, whether the gradients hold arrays for them (`jax.grad`) or nothing (`jaxlora.grad`). Whatever
  else is put around `tx` goes inside, `optimizer(optax.MultiSteps(tx, 4))`: outside it would meet those gradients
  itself. Line searches go there, too: their `grad`, and what their `value_fn` is called with, are taken care of.

  The state is that of `tx` for the trainable half, `tx.init(split(tree)[1])`: `opt_state.hyperparams`,
  `optax.tree_utils.tree_get` and the like find in it what they find without `optimizer`.

  Args:
    tx: any optax transformation; it sees the trainable half alone, weight decay and clipping included.

  Returns:
    An optax transformation for the whole tree; a trainable half is taken, too. Leaves that are no numbers, such as the
    functions and bools in an Equinox module, have `None` for their update, as `eqx.apply_updates` wants it.

  Raises:
    TypeError: if `tx` is no optax transformation.
    ValueError: from `init`, if the tree has no adapted leaf, or is a frozen half; from `update`, without `params` where
      the gradients hold `None`, or with gradients of another tree.

  Example:
    >>> import optax
    >>> tx = optimizer(optax.adamw(1e-4))

    The learning rate, by optax's own means:

    >>> import jax, jax.numpy as jnp, jaxlora
    >>> tree = jaxlora.adapt({"kernel": jnp.ones((6, 5))}, jaxlora.LoraConfig(rank=2), jax.random.key(0))
    >>> state = optimizer(optax.inject_hyperparams(optax.adam)(1e-4)).init(tree)
    >>> state = optax.tree_utils.tree_set(state, learning_rate=1e-5)
    >>> float(state.hyperparams["learning_rate"])
    1e-05
  """
  if isinstance(tx, optax.MultiSteps):  # which optax's own wrappers accept as well
    tx = tx.gradient_transformation()
  if not isinstance(tx, optax.GradientTransformation):
    raise TypeError(f"optimizer: found {tx!r}, expected an optax transformation, such as optax.adamw(1e-4).")
  inner = optax.with_extra_args_support(tx)

  def init(params):
    if is_placeholder(params):
      return inner.init(params)
    check_trainable(params, "optimizer")
    half = trainable_half(params)
    return on_the_mesh_of(inner.init(half), half)

  def update(updates, state, params=None, **extra):
    if params is None:
      _check_shapes_known(updates)
    half = None if params is None else trainable_half(params)
    made, state = inner.update(trainable_half(updates), state, half, **extra_in_halves(extra, params))
    return _with_zeros(made, updates if params is None else params), state

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


def _check_shapes_known(updates: Any) -> None:
  """Raises where gradients hold `None` and there are no parameters that tell the shapes of the zeros for it."""
  for path, node in adapted_leaves(updates):
    if None in parts(node).values():
      raise ValueError(
        f"optimizer: update found None in the gradients of {path}, as jaxlora.grad gives them, and no params to tell"
        " its shape. Call tx.update(gradients, state, params)."
      )


def _with_zeros(updates: Any, tree: Any) -> Any:
  """The updates of a trainable half in the structure of a tree, with zeros for what is frozen."""
  places, treedef = jax.tree_util.tree_flatten(tree, is_leaf=is_half_leaf)
  made = jax.tree_util.tree_leaves(updates, is_leaf=is_half_leaf)
  if len(made) != len(places):
    raise ValueError(
      f"optimizer: update found {len(made)} leaves in the gradients, expected the {len(places)} of params: they are of"
      " another tree. Differentiate by the tree that is passed as params."
    )

  def one(place: Any, update: Any) -> Any:
    if is_adapted(place) and is_adapted(update):
      held = parts(update)
      return with_parts(place, {name: one(part, held[name]) for name, part in parts(place).items()})
    return _zeros(place) if update is None else update

  return jax.tree_util.tree_unflatten(treedef, map(one, places, made))


def _zeros(leaf: Any) -> Any:
  """Zeros of one element's memory, broadcast by NumPy: what is added to a frozen leaf compiles nothing of its own.

  Numbers of Python's own stay such; of leaves that are no numbers there is no zero.
  """
  if is_coded(leaf):
    return jax.tree.map(_zeros, leaf)
  if not is_array(leaf):
    return type(leaf)(0) if isinstance(leaf, (int, float, complex)) and not isinstance(leaf, bool) else None
  dtype = jnp.dtype(bool) if leaf.dtype == jax.dtypes.float0 else leaf.dtype
  is_number = jnp.issubdtype(dtype, np.number) or jnp.issubdtype(dtype, np.bool_)
  return np.broadcast_to(np.zeros((), dtype), jnp.shape(leaf)) if is_number else None
