"""Cross entropy of a head's logits, a part of the tokens at a time.

Reading order: the loss -> its sums over all parts, and their derivative -> what is checked.
"""

from collections.abc import Callable, Sequence
import functools
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.checks import positive
from jaxlora._base.coded import is_coded
from jaxlora._base.dtypes import wider_dtype
from jaxlora._jax.shortcut import Shortcut, shortcut
from jaxlora._transform.factored import Factored
from jaxlora._transform.wrap import wrap


class Metrics(NamedTuple):
  """What a loss was made of; sums, so that those of several batches add up.

  Attributes:
    total: the weighted sum of the tokens' losses, in nats. Its gradient is that of the loss times `weight`.
    weight: the sum of the weights.
    correct: the weighted number of tokens whose label has the highest logit.
  """

  total: jax.Array
  weight: jax.Array
  correct: jax.Array


def chunked_cross_entropy(
  hidden: jax.Array, head: Any, labels: jax.Array, *, chunk: int = 256, weights: jax.Array | None = None
) -> tuple[jax.Array, Metrics]:
  """The mean cross entropy of labels under `softmax(hidden @ head)`, without an array of all logits.

      loss = sum_t w_t (log sum_v exp(z_tv) - z_t,label(t)) / sum_t w_t,        z = h W,  or  h W + s (h A) B

  The logits of `chunk` tokens are computed at a time, in float32 at least; temporary memory is theirs. The gradients
  of the hidden states and of the head, or of its factors, are made while they are there, with no product more than the
  plain loss has; the loss has a derivative of its own for that, which forward mode (`jax.jvp`) does not know. An
  adapted head stays factored: neither its update nor the gradient of its base is formed. Only heads of codes, and those
  with dropout, have their logits computed once more for the gradient.

  Args:
    hidden: (..., width), floats; what the head reads.
    head: (width, vocabulary): an array, a `LoraWeight`, or a weight of codes. Of an embedding that is the head as well,
      `embedding.T` within a function that goes through `wrap`, as in the example.
    labels: (...), integers. Where the weight is 0 they can be anything; any other outside of the vocabulary makes the
      loss NaN.
    chunk: tokens whose logits are held at once; it needs to divide nothing.
    weights: (...), floats, integers or bools: how much each token counts; `None` for 1. They are no parameters: their
      gradient is 0.

  Returns:
    The loss, a scalar in float32 at least: 0 where all weights are. And its `Metrics`, without gradients but for
    `total`. So `value_and_grad(..., has_aux=True)` takes a function that returns them.

  Raises:
    ValueError: on shapes that do not fit, naming both; on a chunk below 1.
    TypeError: on labels that are no integers, or a hidden state that is no float.

  Example:
    >>> import jax, jax.numpy as jnp, jaxlora
    >>> params = {"embedding": 0.1 * jax.random.normal(jax.random.key(0), (50, 8))}
    >>> config = jaxlora.LoraConfig(rank=2, targets=["embedding"], axes={"embedding": "oi"})
    >>> tree = jaxlora.adapt(params, config, jax.random.key(1))
    >>> def loss(params, tokens):
    ...   hidden = params["embedding"][tokens[:, :-1]]  # a model goes here
    ...   return jaxlora.losses.chunked_cross_entropy(hidden, params["embedding"].T, tokens[:, 1:], chunk=4)
    >>> tokens = jnp.arange(12).reshape(2, 6)
    >>> step = jaxlora.value_and_grad(jaxlora.wrap(loss), has_aux=True)
    >>> (value, metrics), grads = step(tree, tokens)
    >>> round(float(value), 2), float(metrics.weight), grads["embedding"].b.shape
    (3.91, 10.0, (2, 50))

  Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models", arXiv:2411.09009, section 3, says where
    the memory goes; the parts along the tokens are the simplest cure.
  """
  chunk = positive(chunk, "chunked_cross_entropy: chunk")
  weights = jnp.ones(jnp.shape(labels), jnp.float32) if weights is None else weights
  total, weight, correct = wrap(_sums)(hidden, head, labels, weights, chunk)
  metrics = Metrics(total, weight, lax.stop_gradient(correct))
  return total / jnp.where(weight == 0, 1, weight), metrics


def _sums(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array, chunk: int) -> Metrics:
  """The sums over all tokens; `head` is an array here, and factored by the transform where it is adapted."""
  _check(hidden, head, labels, weights)
  wide = wider_dtype(wider_dtype(hidden.dtype, head.dtype), jnp.dtype(jnp.float32))
  flat = hidden.reshape(-1, hidden.shape[-1]), head.T, labels.reshape(-1), weights.reshape(-1).astype(wide)
  return Metrics(*_in_chunks(max(1, min(chunk, labels.size)))(*flat))


# ----------------------------------------------------------------------------------------------------------------------
# The sums of flat tokens, and their derivative. Heads are (vocabulary, width) here: a tied one is its embedding.


def _sums_of(part: Callable[..., Sequence[jax.Array]], arrays: tuple[jax.Array, ...], chunk: int) -> Any:
  """The sums over all parts of `part(hidden, labels, weights)`."""

  def add(sums: tuple[jax.Array, ...], arrays: Any) -> tuple[tuple[jax.Array, ...], None]:
    return tuple(map(jnp.add, sums, part(*arrays))), None

  zero: tuple[jax.Array, ...] = (jnp.zeros((), arrays[2].dtype),) * 3
  return lax.scan(add, zero, _parts(arrays, chunk))[0]


def _plain(chunk: int, hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> Any:
  """The sums as JAX differentiates them: each part's logits are computed once more in the backward pass."""
  part = jax.checkpoint(lambda hidden, labels, weights: _part(hidden, head, labels, weights)[0])
  return _sums_of(part, (hidden, labels, lax.stop_gradient(weights)), chunk)


def _factored(chunk: int, call: Callable[..., list[Any]], operands: Sequence[Any]) -> Any:
  """The sums with an adapted head: the gradients of its factors are made while a part's logits are there, as well."""
  hidden, head, labels, weights = operands
  if not isinstance(head, Factored) or is_coded(head.base):
    return call(functools.partial(_plain, chunk), *operands)

  def part(hidden: jax.Array, thin: Any, base: jax.Array, labels: jax.Array, weights: jax.Array) -> list[jax.Array]:
    return call(lambda *args: _part(*args)[0], hidden, thin.replace(base=base), labels, weights)

  @jax.custom_vjp
  def sums(hidden: jax.Array, thin: Any, base: jax.Array, labels: jax.Array, weights: jax.Array) -> Any:
    return _sums_of(lambda hidden, *rest: part(hidden, thin, base, *rest), (hidden, labels, weights), chunk)

  def forwards(hidden: jax.Array, thin: Any, base: jax.Array, labels: jax.Array, weights: jax.Array) -> Any:
    def add(carry: Any, arrays: Any) -> tuple[Any, jax.Array]:
      def total(hidden: jax.Array, thin: Any) -> tuple[jax.Array, list[jax.Array]]:
        new = part(hidden, thin, base, *arrays[1:])
        return new[0], new

      (of_hidden, of_thin), new = jax.grad(total, (0, 1), has_aux=True)(arrays[0], thin)
      return jax.tree.map(lambda x, y: x + y.astype(x.dtype), carry, (tuple(new), of_thin)), of_hidden

    zero = (jnp.zeros((), weights.dtype),) * 3, jax.tree.map(lambda x: jnp.zeros(x.shape, weights.dtype), thin)
    (found, of_thin), of_hidden = lax.scan(add, zero, _parts((hidden, labels, weights), chunk))
    of_thin = jax.tree.map(lambda x, y: x.astype(y.dtype), of_thin, thin)
    return found, (of_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]], of_thin)

  def backwards(gradients: Any, cotangents: Any) -> tuple[Any, ...]:
    return *jax.tree.map(lambda x: (x * cotangents[0]).astype(x.dtype), gradients), None, None, None

  sums.defvjp(forwards, backwards)
  return sums(hidden, head.replace(base=None), head.base, labels, lax.stop_gradient(weights))


def _forwards(chunk: int, hidden: Any, head: Any, labels: Any, weights: Any) -> tuple[tuple[jax.Array, ...], Any]:
  """The sums, and the gradients of the first: a part's are made while its logits are there."""
  trained = hidden.perturbed, head.perturbed
  hidden, head, labels, weights = hidden.value, head.value, labels.value, weights.value

  def add(carry: Any, arrays: Any) -> tuple[Any, Any]:
    sums, of_head = carry
    hidden, labels, weights = arrays
    new, logits = _part(hidden, head, labels, weights)
    own = jnp.arange(logits.shape[1])[None] == labels[:, None]
    slopes = (jax.nn.softmax(logits) - own.astype(logits.dtype)) * weights[:, None]
    slopes = jnp.where(weights[:, None] == 0, 0, slopes)
    of_hidden = jnp.einsum("tv,vw->tw", slopes, head.astype(logits.dtype)) if trained[0] else None
    if trained[1]:
      of_head = of_head + jnp.einsum("tv,tw->vw", slopes, hidden.astype(logits.dtype))
    return (tuple(map(jnp.add, sums, new)), of_head), of_hidden

  zero = (jnp.zeros((), weights.dtype),) * 3
  of_head = jnp.zeros(head.shape, weights.dtype) if trained[1] else None
  (sums, of_head), of_hidden = lax.scan(add, (zero, of_head), _parts((hidden, labels, weights), chunk))
  if of_hidden is not None:
    of_hidden = of_hidden.reshape(-1, hidden.shape[1])[: hidden.shape[0]].astype(hidden.dtype)
  return sums, (of_hidden, None if of_head is None else of_head.astype(head.dtype))


def _backwards(gradients: Any, cotangents: Any) -> tuple[Any, ...]:
  total = cotangents[0]
  if isinstance(total, jax.custom_derivatives.SymbolicZero):
    return None, None, None, None
  scaled = (None if x is None else (x * total).astype(x.dtype) for x in gradients)
  return *scaled, None, None


def _part(
  hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array
) -> tuple[tuple[jax.Array, jax.Array, jax.Array], jax.Array]:
  """A part's sums, and its logits."""
  logits = jnp.einsum("tw,vw->tv", hidden, head, preferred_element_type=weights.dtype)
  peaks = lax.stop_gradient(logits.max(1))
  inside = (labels >= 0) & (labels < logits.shape[1])
  own = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[:, None], 1)[:, 0]
  losses = jnp.log(jnp.exp(logits - peaks[:, None]).sum(1)) + peaks - own
  losses = jnp.where(weights == 0, 0, jnp.where(inside, losses, jnp.nan))
  return ((weights * losses).sum(), weights.sum(), jnp.where(own == peaks, weights, 0).sum()), logits


def _parts(arrays: tuple[jax.Array, ...], chunk: int) -> tuple[jax.Array, ...]:
  """(tokens, ...) as (parts, chunk, ...); the last part is filled with tokens that count for nothing."""
  missing = -arrays[0].shape[0] % chunk
  filled = (jnp.pad(array, ((0, missing), *[(0, 0)] * (array.ndim - 1))) for array in arrays)
  return tuple(array.reshape(-1, chunk, *array.shape[1:]) for array in filled)


@functools.cache
def _in_chunks(chunk: int) -> Callable[..., tuple[jax.Array, ...]]:
  """The sums of parts of so many tokens."""
  plain, forwards, factored = (functools.partial(fn, chunk) for fn in (_plain, _forwards, _factored))
  return shortcut(Shortcut(plain, forwards, _backwards, factored), f"cross_entropy_{chunk}")


# ----------------------------------------------------------------------------------------------------------------------
# What is checked.


def _check(hidden: jax.Array, head: jax.Array, labels: jax.Array, weights: jax.Array) -> None:
  """Raises unless all four fit each other."""
  what = "chunked_cross_entropy"
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f"{what}: labels have dtype {labels.dtype}, expected integers, a class for each token.")
  if not jnp.issubdtype(hidden.dtype, jnp.floating):
    raise TypeError(f"{what}: hidden has dtype {hidden.dtype}, expected floats: what the head reads.")
  if hidden.ndim < 1 or head.ndim != 2 or hidden.shape[-1] != head.shape[0]:
    hint = " That is an embedding's layout: pass embedding.T." if head.shape[-1:] == hidden.shape[-1:] else ""
    raise ValueError(
      f"{what}: hidden has shape {hidden.shape} and the head {head.shape}, expected (..., width) and"
      f" (width, vocabulary).{hint}"
    )
  for name, array in (("labels", labels), ("weights", weights)):
    if array.shape != hidden.shape[:-1]:
      raise ValueError(f"{what}: {name} have shape {array.shape}, expected {hidden.shape[:-1]} as hidden's tokens.")
