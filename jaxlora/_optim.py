"""Gradients only where they belong: `mask`, `labels`, `optimizer`, `lora_plus`, `value_and_grad`, `grad`."""

from collections.abc import Callable, Sequence
import functools
import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlora._adapt import adapted_leaves, check_adapted, join, map_adapted, split
from jaxlora._weight import is_adapted, parts, trained_parts, with_parts


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
  if isinstance(tx, optax.MultiSteps):  # optax's own wrappers take it as it is, too
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
  """Gradients with zeros where `jaxlora.grad` left nothing, or `jax.grad` what no optimizer can add: float0."""
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
  """Zeros that take no memory, and none of a compiler's time: `set_to_zero` puts its own in their place."""
  return None if param is None else np.broadcast_to(np.zeros((), jnp.result_type(param)), jnp.shape(param))


def _is_float0(update: Any) -> bool:
  return getattr(update, "dtype", None) == jax.dtypes.float0


def value_and_grad(
  fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False
) -> Callable[..., Any]:
  """`jax.value_and_grad` with respect to the trainable leaves of combined trees alone.

  The base gets no gradient buffers at all, and may hold integers.

  Args:
    fn: a function that returns a scalar, or `(scalar, aux)`; it takes combined trees and calls `wrap`ped functions.
    argnums: which positional arguments are combined trees to differentiate.
    has_aux: whether `fn` returns `(scalar, aux)`.

  Returns:
    A function that returns `(value, gradients)`; the gradients have the structure of `split(tree)[1]`, with `None` in
    the places of frozen leaves.

  Raises:
    TypeError: if `argnums` is no integer or sequence of them.
    ValueError: when called, if `argnums` names no positional argument, or one twice, or one without an adapted leaf.

  Example:
    >>> loss = lambda tree, x: apply({"params": tree}, x).sum()  # doctest: +SKIP
    >>> value, grads = value_and_grad(loss)(tree, x)  # doctest: +SKIP
  """
  return _differentiated(fn, argnums, has_aux, "value_and_grad")


def _differentiated(
  fn: Callable[..., Any], argnums: int | Sequence[int], has_aux: bool, what: str
) -> Callable[..., Any]:
  numbers, single = _argument_numbers(argnums, what)

  @functools.wraps(fn)
  def differentiated(*args: Any, **kwargs: Any) -> Any:
    places = _places(numbers, len(args), what)
    for n in places:
      check_adapted(args[n], f"{what}: argument {n}")
    halves = {n: split(args[n]) for n in places}
    frozen = tuple(halves[n][0] if n in halves else arg for n, arg in enumerate(args))

    def of_trainable(trainables, args):
      full = list(args)
      for n, trainable in zip(places, trainables, strict=True):
        full[n] = join(args[n], trainable)
      return fn(*full, **kwargs)

    value, grads = jax.value_and_grad(of_trainable, has_aux=has_aux)(tuple(halves[n][1] for n in places), frozen)
    return value, grads[0] if single else grads

  return differentiated


def _argument_numbers(argnums: Any, what: str) -> tuple[tuple[int, ...], bool]:
  """The numbers in `argnums`, and whether it is one alone."""
  try:
    return (operator.index(argnums),), True
  except TypeError:
    pass
  try:
    return tuple(map(operator.index, argnums)), False
  except TypeError:
    raise TypeError(
      f"{what}: argnums is {argnums!r}, expected the number of a positional argument, or a sequence of such numbers."
    ) from None


def _places(numbers: Sequence[int], count: int, what: str) -> list[int]:
  """Which of `count` positional arguments the numbers mean."""
  for n in numbers:
    if not -count <= n < count:
      raise ValueError(
        f"{what}: argnums has {n}, but the call has {count} positional arguments"
        + (f"; expected a number from {-count} to {count - 1}." if count else ".")
        + " Pass the tree by position, not by keyword."
      )
  places = [n % count for n in numbers]
  if len(set(places)) != len(places):
    raise ValueError(f"{what}: argnums {tuple(numbers)} names an argument twice; name each once.")
  return places


def grad(fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
  """`jax.grad` with respect to the trainable leaves of combined trees alone; see `value_and_grad`.

  Returns:
    A function that returns the gradients, or `(gradients, aux)`.
  """
  both = _differentiated(fn, argnums, has_aux, "grad")

  @functools.wraps(fn)
  def differentiated(*args: Any, **kwargs: Any) -> Any:
    value, grads = both(*args, **kwargs)
    return (grads, value[1]) if has_aux else grads

  return differentiated
