"""Losses, the learning-rate schedule and the training step, for pretraining and for every method."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .decoder import PAD
from .tokens import SUMMARY, Rows


def cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """The mean over tokens other than padding, in nats."""
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return (losses * (targets != PAD)).sum() / (targets != PAD).sum()


def text_loss(apply: Callable[..., Any], params: Any, pieces: jax.Array) -> jax.Array:
  """The loss on running text: pieces (batch, WINDOW + 1)."""
  logits, _ = apply({"params": params}, pieces[:, :-1], jnp.ones_like(pieces[:, :-1], bool))
  return cross_entropy(logits, pieces[:, 1:])


def summary_loss(apply: Callable[..., Any], params: Any, rows: Rows) -> jax.Array:
  """The loss on summaries, given their bodies."""
  logits, _ = apply({"params": params}, rows.tokens[:, :-1], rows.valid[:, :-1], last=SUMMARY)
  return cross_entropy(logits, rows.tokens[:, -SUMMARY:])


def schedule(lr: float, steps: int) -> np.ndarray:
  """The learning rate of every step: a linear warm-up over a tenth of them, then a cosine decay to zero."""
  rate = optax.warmup_cosine_decay_schedule(0.0, lr, max(1, steps // 10), steps)
  return np.asarray([rate(k + 1) for k in range(steps)], np.float32)


def make_step(loss: Callable[..., jax.Array]) -> Callable[..., Any]:
  """A jitted step of Adam; the learning rate is an argument, so that a sweep over rates compiles once."""
  tx = optax.scale_by_adam()

  @jax.jit
  def step(trainable, opt_state, frozen, batch, rate):
    value, grads = jax.value_and_grad(loss)(trainable, frozen, batch)
    updates, opt_state = tx.update(grads, opt_state, trainable)
    return jax.tree.map(lambda p, u: p - rate * u, trainable, updates), opt_state, value

  return step


def init_adam(trainable: Any) -> Any:
  """Adam's state ahead of the first step."""
  return optax.scale_by_adam().init(trainable)
