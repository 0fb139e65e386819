"""Greedy decoding of a batch, one program from the prompts to the answers."""

from collections.abc import Callable, Sequence
import functools

import jax
import jax.numpy as jnp
import numpy as np

from .model import Cache, Config, Llama, empty_cache
from .rows import Example, batch, by_length
from .tokens import Chat

# Logits of the last of some tokens: `call(tokens, room, cache, at) -> (batch, 1, vocabulary), cache`.
Call = Callable[[jax.Array, jax.Array, Cache, jax.Array | int], tuple[jax.Array, Cache]]


@functools.partial(jax.jit, static_argnames=("limit", "end", "pad"))
def greedy(model: Llama, prompts: jax.Array, valid: jax.Array, limit: int, end: int, pad: int) -> jax.Array:
  """The most likely next token, again and again.

  Args:
    model: plain weights; of a tree with adapters, call this through `jaxlora.wrap`, or merge it first.
    prompts: (batch, tokens), padded on the left.
    valid: the same, bool: no padding.
    limit: the most tokens of an answer.
    end: the token after which a row is done.
    pad: what done rows hold.

  Returns:
    (batch, limit) tokens, the end among them.
  """
  call = lambda tokens, room, cache, at: model(tokens, room, last=1, cache=cache, at=at)
  return decode(call, model.config, prompts, valid, limit, end, pad)


def decode(
  call: Call, config: Config, prompts: jax.Array, valid: jax.Array, limit: int, end: int, pad: int
) -> jax.Array:
  """The loop of `greedy`, around any call of a model: `serving` has one in which every row has its own adapter."""
  count, width = prompts.shape
  room = jnp.concatenate([valid, jnp.ones((count, limit), bool)], 1)
  logits, cache = call(prompts, room, empty_cache(config, count, width + limit), 0)
  answers = jnp.full((count, limit), pad, jnp.int32)

  def goes_on(state):
    step, _, _, _, done = state
    return (step < limit) & ~done.all()

  def one(state):
    step, next, answers, cache, done = state
    answers = answers.at[:, step].set(jnp.where(done, pad, next))
    done = done | (next == end)
    logits, cache = call(next[:, None], room, cache, width + step)
    return step + 1, logits[:, -1].argmax(-1).astype(jnp.int32), answers, cache, done

  first = logits[:, -1].argmax(-1).astype(jnp.int32)
  return jax.lax.while_loop(goes_on, one, (0, first, answers, cache, jnp.zeros(count, bool)))[2]


def answers(
  model: Llama, chat: Chat, examples: Sequence[Example], size: int, limit: int, tick=lambda count: None
) -> list[str]:
  """What a model answers to each prompt.

  Args:
    model: plain weights.
    chat: its tokenizer.
    examples: the prompts.
    size: prompts that are decoded at once.
    limit: the most tokens of an answer.
    tick: called with the number of prompts after each batch.
  """
  found: dict[int, str] = {}
  for index in by_length(examples, size):
    rows = batch([examples[k]._replace(answer=[]) for k in index], chat.pad, answer=0)
    tokens = np.asarray(greedy(model, rows.tokens, rows.valid, limit, chat.end, chat.pad))
    new = {int(k): chat.decode(row) for k, row in zip(index, tokens.tolist(), strict=True)}
    tick(len(new.keys() - found.keys()))
    found |= new
  return [found[k] for k in range(len(examples))]
