"""The training loop: one for every method, with checkpoints from which it goes on bit for bit."""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlora
from jaxlora.checkpoint import Manager

from . import packing, scores
from .packing import Packed
from .rows import Example, Rows, batch, training_order

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())  # the rate is an argument of the step


class RunError(ValueError):
  """A run that cannot go on as it was asked to; what it has kept is as it was."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """How long and how fast.

  Attributes:
    rate: the peak learning rate: after a linear warm-up over a tenth of the steps, before a cosine decay to zero.
    steps: updates.
    batch: pairs of an update.
    accumulate: parts that a batch is computed in, one after the other; the update is the same to rounding.
    seed: of the factors and of the order of the pairs.
    pack: tokens of a row that holds several pairs, as `packing` makes them; `None` for a row each. The update is the
      same to rounding.
  """

  rate: float
  steps: int = 75
  batch: int = 4
  accumulate: int = 1
  seed: int = 0
  pack: int | None = None

  @property
  def settings(self) -> dict[str, Any]:
    """As JSON; what is not used is not said, so that results of before it was there keep their digest."""
    return {name: value for name, value in dataclasses.asdict(self).items() if (name, value) != ("pack", None)}

  def rates(self) -> np.ndarray:
    """The learning rate of each step."""
    warm, step = max(1, self.steps // 10), np.arange(1, self.steps + 1)
    decay = 0.5 * (1 + np.cos(np.pi * np.maximum(step - warm, 0) / (self.steps - warm + 1)))
    return (self.rate * np.minimum(step / warm, decay)).astype(np.float32)


@functools.partial(jax.jit, donate_argnums=(0, 1))
def update(
  trainable: Any, opt_state: Any, frozen: Any, rows: Rows | Packed, rate: jax.Array
) -> tuple[Any, Any, jax.Array]:
  """One step of Adam on the mean loss of the answers' tokens; rows are (parts, batch / parts, tokens)."""
  losses = packing.adapted_losses if isinstance(rows, Packed) else scores.adapted_losses

  def loss(trainable: Any, part: Any) -> tuple[jax.Array, jax.Array]:
    sums, counts = losses(jaxlora.join(frozen, trainable), part)
    return sums.sum(), counts.sum()

  def add(total: Any, part: Any) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, jax.value_and_grad(loss, has_aux=True)(trainable, part)), None

  zero = ((jnp.zeros(()), jnp.zeros((), jnp.int32)), jax.tree.map(jnp.zeros_like, trainable))
  ((total, count), grads), _ = jax.lax.scan(add, zero, rows)
  updates, opt_state = TX.update(jax.tree.map(lambda g: g / count, grads), opt_state, trainable)
  return jax.tree.map(lambda p, u: p - rate * u, trainable, updates), opt_state, total / count


def train(
  tree: Any,
  base: Any,
  examples: Sequence[Example],
  schedule: Schedule,
  pad: int,
  digest: str,
  folder: Path,
  every: int,
  tick: Callable[..., Any],
) -> tuple[Any, dict[str, Any]]:
  """Trains a tree, from its start or from its latest checkpoint.

  Args:
    tree: what `methods.adapt` made of `base`.
    base: the frozen weights.
    examples: the training pairs.
    schedule: how long and how fast.
    pad: the token of padding.
    digest: of everything that decides the run, checked on the way back.
    folder: of the checkpoints.
    every: steps between two of them.
    tick: called after each step with its number, its loss and its tokens a second.

  Returns:
    The trained tree, and what was seen: the loss and the seconds of each step, its tokens (without padding).

  Raises:
    RunError: if the checkpoints are of another run, which they stay, or if the loss is not finite.
  """
  frozen, trainable = jaxlora.split(tree)
  opt_state, seen = TX.init(trainable), {"digest": digest, "loss": [], "seconds": [], "tokens": []}
  with Manager(folder.resolve(), max_to_keep=1) as manager:
    if manager.latest_step() is not None:
      state = manager.restore(base, opt_state)
      if state.data["digest"] != digest:
        raise RunError(
          f"{folder}: holds a run of other data or settings ({state.data['digest']}, expected {digest}): name another"
          " folder, or delete this one to begin anew"
        )
      seen, opt_state, trainable = state.data, state.opt_state, jaxlora.split(state.tree)[1]
    begun, rates = len(seen["loss"]), schedule.rates()
    tick(begun, None, None)
    order = training_order(examples, schedule.batch, schedule.steps, schedule.seed)
    for step in range(begun, schedule.steps):
      begin = time.perf_counter()
      rows = _rows([examples[k] for k in order[step]], schedule, pad)
      parts = jax.tree.map(lambda x: x.reshape(schedule.accumulate, -1, x.shape[-1]), rows)
      trainable, opt_state, value = update(trainable, opt_state, frozen, parts, rates[step])
      seen["loss"].append(float(value))
      seen["seconds"].append(round(time.perf_counter() - begin, 3))
      seen["tokens"].append(int(rows.valid.sum()))
      tick(step + 1, seen["loss"][-1], seen["tokens"][-1] / seen["seconds"][-1])
      if not np.isfinite(value):
        raise RunError(f"step {step + 1}: the loss is {float(value)}, expected a finite one: take a lower rate")
      if (step + 1) % every == 0 and step + 1 < schedule.steps:
        manager.save(step + 1, jaxlora.join(frozen, trainable), opt_state, data=seen)
  return jaxlora.join(frozen, trainable), seen


def _rows(examples: Sequence[Example], schedule: Schedule, pad: int) -> Rows | Packed:
  """The rows of one update."""
  if schedule.pack is None:
    return batch(examples, pad)
  return packing.pack(examples, schedule.pack, pad, schedule.accumulate)
