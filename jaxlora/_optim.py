"""Gradients only where they belong: `mask`, `labels`, `optimizer`, `value_and_grad`, `grad`."""

from collections.abc import Callable, Sequence
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxlora._adapt import check_adapted, join, map_adapted, split
from jaxlora._weight import is_adapted


def labels(tree: Any) -> Any:
  """A tree of strings that say what each leaf is: `"a"`, `"b"`, `"full"` or `"frozen"`.

  Args:
    tree: a combined tree, or any tree of its structure.

  Returns:
    The tree with a label in the place of each leaf: what `optax.partition` takes to give A and B their own optimisers.
  """
  return map_adapted(
    lambda w: dataclasses.replace(w, base="frozen", a="a", b="b"),
    lambda w: dataclasses.replace(w, base="frozen", value="full"),
    lambda x: "frozen",
    tree,
  )


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
  state, whether the gradients hold arrays for them (`jax.grad`) or nothing (`jaxlora.grad`).

  Args:
    tx: any optax transformation; it sees the trainable leaves alone, weight decay and clipping included.

  Returns:
    An optax transformation for the whole tree.

  Raises:
    ValueError: from `init`, if the tree has no adapted leaf.

  Example:
    >>> import optax
    >>> tx = optimizer(optax.adamw(1e-4))
  """
  routed = optax.chain(
    optax.masked(tx, mask), optax.masked(optax.set_to_zero(), lambda tree: jax.tree.map(lambda x: not x, mask(tree)))
  )

  def init(params):
    check_adapted(params, "optimizer")
    return routed.init(params)

  def update(updates, state, params=None, **extra):
    return routed.update(_with_zeros(updates, params), state, params, **extra)

  return optax.GradientTransformationExtraArgs(init, update)


def _with_zeros(updates: Any, params: Any) -> Any:
  """Gradients with zeros where `jaxlora.grad` left nothing."""
  if params is None:
    return updates

  def one(param, update):
    if is_adapted(param):
      parts = {
        field.name: zero if part is None else part
        for field in dataclasses.fields(param)
        if not field.metadata.get("static")
        for part, zero in [(getattr(update, field.name), _zeros(getattr(param, field.name)))]
      }
      return dataclasses.replace(param, **parts)
    return _zeros(param) if update is None else update

  def leaf(node):
    return node is None or is_adapted(node)

  return jax.tree_util.tree_map(one, params, updates, is_leaf=leaf)


def _zeros(param: Any) -> Any:
  return None if param is None else jnp.zeros_like(param)


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
    ValueError: if an argument has no adapted leaf.

  Example:
    >>> loss = lambda tree, x: apply({"params": tree}, x).sum()  # doctest: +SKIP
    >>> value, grads = value_and_grad(loss)(tree, x)  # doctest: +SKIP
  """
  numbers = (argnums,) if isinstance(argnums, int) else tuple(argnums)

  def differentiated(*args: Any, **kwargs: Any) -> Any:
    places = [n % len(args) for n in numbers]
    halves = {n: split(args[n]) for n in places}
    frozen = tuple(halves[n][0] if n in halves else arg for n, arg in enumerate(args))

    def of_trainable(trainables, args):
      full = list(args)
      for n, trainable in zip(places, trainables, strict=True):
        full[n] = join(args[n], trainable)
      return fn(*full, **kwargs)

    value, grads = jax.value_and_grad(of_trainable, has_aux=has_aux)(tuple(halves[n][1] for n in places), frozen)
    return value, grads[0] if isinstance(argnums, int) else grads

  return differentiated


def grad(fn: Callable[..., Any], argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Callable[..., Any]:
  """`jax.grad` with respect to the trainable leaves of combined trees alone; see `value_and_grad`.

  Returns:
    A function that returns the gradients, or `(gradients, aux)`.
  """
  both = value_and_grad(fn, argnums, has_aux)

  def differentiated(*args: Any, **kwargs: Any) -> Any:
    value, grads = both(*args, **kwargs)
    return (grads, value[1]) if has_aux else grads

  return differentiated
