"""Direct preference optimisation of an adapter; the reference is the same tree with its adapter off."""

from collections.abc import Callable
import functools
import itertools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlora
from jaxlora.checkpoint import Manager
from studies.summaries.decoder import PAD, Decoder, Params

from .pairs import ANSWER, Rows

EVERY = 10  # steps between two checkpoints
TX = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())  # the rate is an argument of the step


class Settings(NamedTuple):
  """What decides a run, beside the base and the data."""

  rate: float
  steps: int
  batch: int
  beta: float
  rank: int
  zero: str
  seed: int


def log_probs(model: Decoder, params: Params, rows: Rows) -> jax.Array:
  """The log p of both sentences of each pair, given their prompt, in nats: (pairs, 2)."""
  tokens, valid = (x.reshape(-1, x.shape[-1]) for x in rows)
  logits, _ = model.apply({"params": params}, tokens[:, :-1], valid[:, :-1], last=ANSWER)
  targets = tokens[:, -ANSWER:]
  losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
  return -(losses * (targets != PAD)).sum(1).reshape(-1, 2)


class Steps(NamedTuple):
  """The compiled functions of one model and one beta.

  Attributes:
    update: `(trainable, opt_state, frozen, rows, rate) -> (trainable, opt_state, loss, margin)`.
    measure: `(tree, rows) -> margins (pairs,)`: how much the reward of what is chosen is ahead, in nats.
  """

  update: Any
  measure: Callable[..., jax.Array]


@functools.cache
def make_steps(model: Decoder, beta: float) -> Steps:
  """Margins are `beta (log p / p_ref of the chosen - log p / p_ref of the rejected)`; the loss is -log sigmoid of them.

  Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", eq. 7
  (arXiv:2305.18290). Base weights are in memory once: p_ref is the same call with the adapter off.
  """
  score = functools.partial(log_probs, model)
  policy, reference = jaxlora.wrap(score, on_materialize="error"), jaxlora.wrap(score, adapters=False)

  def margins(tree: Any, rows: Rows) -> jax.Array:
    rewards = beta * (policy(tree, rows) - reference(tree, rows))
    return rewards[:, 0] - rewards[:, 1]

  def loss(trainable: Any, frozen: Any, rows: Rows) -> tuple[jax.Array, jax.Array]:
    found = margins(jaxlora.join(frozen, trainable), rows)
    return -jax.nn.log_sigmoid(found).mean(), found.mean()

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(trainable: Any, opt_state: Any, frozen: Any, rows: Rows, rate: jax.Array) -> tuple[Any, ...]:
    (value, margin), grads = jax.value_and_grad(loss, has_aux=True)(trainable, frozen, rows)
    updates, opt_state = TX.update(grads, opt_state, trainable)
    return jax.tree.map(lambda p, u: p - rate * u, trainable, updates), opt_state, value, margin

  return Steps(update, jax.jit(margins))


def adapt(base: Params, settings: Settings) -> Any:
  """The tree that trains: factors on every kernel."""
  config = jaxlora.LoraConfig(settings.rank, exclude=".*(embed|position)/.*", zero=settings.zero)
  use = lambda params: Decoder(*sizes(params)).apply({"params": params}, *_ONE)[0]
  return jaxlora.adapt(base, config, jax.random.key(settings.seed), probe=use)


_ONE = jnp.zeros((1, 2), jnp.int32), jnp.ones((1, 2), bool)


def sizes(params: Params) -> tuple[int, ...]:
  """The sizes of a decoder, from its parameters, in `Decoder`'s order."""
  vocabulary, width = params["embed"]["embedding"].shape
  depth = sum(name.startswith("block_") for name in params)
  heads = params["block_0"]["attention"]["query"]["kernel"].shape[1]
  return vocabulary, width, depth, heads, params["position"]["embedding"].shape[0]


def batches(count: int, settings: Settings) -> list[np.ndarray]:
  """The pairs of each step, from the seed alone, so that a run goes on where it stood."""
  rng = np.random.default_rng(settings.seed)
  epochs = (rng.permutation(count)[: count // settings.batch * settings.batch] for _ in itertools.count())
  parts = (part for epoch in epochs for part in epoch.reshape(-1, settings.batch))
  return list(itertools.islice(parts, settings.steps))


def train(
  model: Decoder, base: Params, rows: Rows, settings: Settings, folder: Path, digest: str, tick: Callable[[int], Any]
) -> tuple[Any, dict[str, list[float]]]:
  """Trains an adapter, from its start or from its latest checkpoint, bit for bit.

  Args:
    model, base: the network and its frozen parameters.
    rows: the training pairs.
    settings: of the run.
    folder: of its checkpoints.
    digest: of all that decides it; checkpoints of another run are an error.
    tick: called with the number of steps that were done.

  Returns:
    The trained tree; the loss and the mean margin of each step.

  Raises:
    ValueError: if the checkpoints are of another run, or there are fewer pairs than a batch has.
  """
  if len(rows.tokens) < settings.batch:
    raise ValueError(f"found {len(rows.tokens)} pairs, expected at least the {settings.batch} of a batch: --batch")
  steps = make_steps(model, settings.beta)
  frozen, trainable = jaxlora.split(adapt(base, settings))
  opt_state, seen = TX.init(trainable), {"digest": digest, "loss": [], "margin": []}
  with Manager(folder.resolve(), max_to_keep=1) as manager:
    if manager.latest_step() is not None:
      state = manager.restore(base, opt_state)
      if state.data["digest"] != digest:
        raise ValueError(f"{folder} holds a run of other settings or data; name another --out, or delete it")
      seen, opt_state, trainable = state.data, state.opt_state, jaxlora.split(state.tree)[1]
    begun = len(seen["loss"])
    tick(begun)
    for step, index in enumerate(batches(len(rows.tokens), settings)[begun:], begun + 1):
      rate = np.float32(settings.rate * min(1, step / max(1, settings.steps // 10)))
      trainable, opt_state, loss, margin = steps.update(trainable, opt_state, frozen, rows.take(index), rate)
      seen["loss"].append(float(loss))
      seen["margin"].append(float(margin))
      if step % EVERY == 0 or step == settings.steps:
        manager.save(step, jaxlora.join(frozen, trainable), opt_state, data=seen)
        manager.wait()
      tick(1)
  return jaxlora.join(frozen, trainable), {name: seen[name] for name in ("loss", "margin")}


def memory(model: Decoder, base: Params, rows: Rows, settings: Settings) -> dict[str, int]:
  """Bytes of a compiled step: its arguments, what it needs beside them, and what they would be with a second base."""
  frozen, trainable = jaxlora.split(adapt(base, settings))
  args = trainable, TX.init(trainable), frozen, rows.take(np.arange(settings.batch)), np.float32(0)
  found = make_steps(model, settings.beta).update.lower(*args).compile().memory_analysis()
  sized = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  return {
    "arguments": found.argument_size_in_bytes,
    "temporary": found.temp_size_in_bytes,
    "base": sized(base),
    "rest": sized(args) - sized(frozen),
  }
