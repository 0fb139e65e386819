"""Cross entropy of a head's logits, a part of the tokens at a time.

Reading order: the loss -> its sums over all parts -> what is checked.
"""

import math
from typing import Any, NamedTuple

import jax
from jax import lax
import jax.numpy as jnp

from jaxlora._base.checks import positive
from jaxlora._base.dtypes import wider_dtype
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

  The logits of `chunk` tokens are computed at a time, in float32 at least, and once more for the gradient: a third
  product of the head's size instead of two, or of three where the head trains whole; in exchange temporary memory is
  that of `chunk` tokens' logits. An adapted head stays factored: neither its update nor the gradient of its base is
  formed.

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
  count = math.prod(labels.shape)
  chunk = max(1, min(chunk, count))
  missing = -count % chunk

  def parts(array: jax.Array, *own: int) -> jax.Array:
    flat = jnp.pad(array.reshape(count, *own), ((0, missing), *[(0, 0)] * len(own)))
    return flat.reshape(-1, chunk, *own)

  @jax.checkpoint
  def part(hidden: jax.Array, labels: jax.Array, weights: jax.Array) -> Metrics:
    logits = jnp.einsum("tw,wv->tv", hidden, head, preferred_element_type=wide)
    peaks = lax.stop_gradient(logits.max(1))
    inside = (labels >= 0) & (labels < logits.shape[1])
    own = jnp.take_along_axis(logits, jnp.where(inside, labels, 0)[:, None], 1)[:, 0]
    losses = jnp.log(jnp.exp(logits - peaks[:, None]).sum(1)) + peaks - own
    losses = jnp.where(weights == 0, 0, jnp.where(inside, losses, jnp.nan))
    return Metrics((weights * losses).sum(), weights.sum(), jnp.where(own == peaks, weights, 0).sum())

  def add(sums: Metrics, arrays: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[Metrics, None]:
    return Metrics(*map(jnp.add, sums, part(*arrays))), None

  weights = lax.stop_gradient(weights.astype(wide))
  zero = Metrics(*[jnp.zeros((), wide)] * 3)
  return lax.scan(add, zero, (parts(hidden, hidden.shape[-1]), parts(labels), parts(weights)))[0]


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
