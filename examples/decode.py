"""Several adapters decode in one batch, and one of them is replaced in mid-stream.

A small decoder learns the alphabet. Four adapters learn other orders of it, all in one batch over one frozen base: each
row's gradient reaches the adapter of that row. Then five rows are decoded side by side, token by token beside one
cache: one by the base, and one by each adapter. Halfway one adapter is replaced by another under the same name. The
other rows are not affected: their caches stay as they are, and nothing is compiled again.

    python examples/decode.py
"""

import argparse
from collections.abc import Callable, Sequence
import functools
import string
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlora

ALPHABET = string.ascii_lowercase
LENGTH = 24
WRITERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {  # the offset of step k from the first letter
  "backwards": lambda k: -k,
  "every other": lambda k: 2 * k,
  "doubled": lambda k: k // 2,
  "in pairs": lambda k: k ^ 1,
}


class Decoder(nn.Module):
  """A causal decoder of two blocks; with `decode` it has a cache of keys and values."""

  width: int = 32
  blocks: int = 2
  decode: bool = False

  @nn.compact
  def __call__(self, tokens: jax.Array, start: jax.Array | int = 0) -> jax.Array:
    """Logits (batch, time, letters) of tokens (batch, time), the first at position `start`."""
    position = self.param("position", nn.initializers.normal(0.1), (LENGTH, self.width))
    x = nn.Embed(len(ALPHABET), self.width, name="embed")(tokens)
    x = x + jax.lax.dynamic_slice_in_dim(position, start, tokens.shape[1])[None]
    mask = None if self.decode else nn.make_causal_mask(tokens)
    for k in range(self.blocks):
      attention = nn.MultiHeadDotProductAttention(2, decode=self.decode, name=f"attention_{k}")
      x = x + attention(nn.LayerNorm(name=f"norm_{k}")(x), mask=mask)
      x = x + nn.Dense(self.width, name=f"out_{k}")(nn.gelu(nn.Dense(4 * self.width, name=f"in_{k}")(x)))
    return nn.Dense(len(ALPHABET), name="head")(nn.LayerNorm(name="norm")(x))


MODEL = Decoder()


def texts(order: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
  """The text of that order from each first letter: (letters, time)."""
  first = np.arange(len(ALPHABET))[:, None]
  return (first + order(np.arange(LENGTH))[None]) % len(ALPHABET)


def loss_of(logits: jax.Array, tokens: jax.Array) -> jax.Array:
  """The cross entropy of the next letters."""
  return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens[:, 1:]).mean()


def fit(loss: Callable[[Any], jax.Array], start: Any, steps: int, rate: float) -> Any:
  """Trains the arrays of `start` with Adam."""
  tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

  @jax.jit
  def step(state: tuple[Any, Any], _: Any) -> tuple[Any, jax.Array]:
    value, grads = jax.value_and_grad(loss)(state[0])
    updates, opt_state = tx.update(grads, state[1], state[0])
    return (optax.apply_updates(state[0], updates), opt_state), value

  (trained, _), losses = jax.lax.scan(step, (start, tx.init(start)), length=steps)
  print(f"  loss {losses[0]:.2f} -> {losses[-1]:.4f}")
  return trained


def apply(params: Any, tokens: jax.Array) -> jax.Array:
  """Logits of whole sequences."""
  return MODEL.apply({"params": params}, tokens)


def pretrain(steps: int) -> Any:
  """Parameters of a decoder that continues the alphabet."""
  tokens = jnp.asarray(texts(lambda k: k))
  params = MODEL.init(jax.random.key(0), tokens)["params"]
  return fit(lambda params: loss_of(apply(params, tokens), tokens), params, steps, 3e-3)


def train_adapters(params: Any, steps: int) -> jaxlora.Bank:
  """One adapter per order, all trained in one batch: a row's gradient reaches its own adapter alone."""
  config = jaxlora.LoraConfig(rank=4, alpha=8)
  probe = lambda p: apply(p, jnp.zeros((1, LENGTH), jnp.int32))
  trees = {
    name: jaxlora.adapt(params, config, jax.random.key(k), probe=probe) for k, name in enumerate(WRITERS, start=1)
  }
  bank = jaxlora.stack(trees, capacity=8)
  tokens = jnp.asarray(np.concatenate([texts(order) for order in WRITERS.values()]))
  ids = jnp.repeat(bank.ids(WRITERS), len(ALPHABET))
  routed = jaxlora.route(apply)
  trained = fit(lambda bank: loss_of(routed(params, bank, ids, tokens), tokens) * len(trees), bank, steps, 1e-2)
  return trained.named_as(bank)


# ----------------------------------------------------------------------------------------------------------------------
# Writing.


class Stream(NamedTuple):
  """The state of decoding: the last letters (batch, 1), their position, and the cache."""

  token: jax.Array
  position: jax.Array
  cache: Any


def begin(letters: str) -> Stream:
  """The state ahead of decoding, with one row for each first letter."""
  tokens = jnp.asarray([[ALPHABET.index(letter)] for letter in letters], jnp.int32)
  shapes = jax.eval_shape(
    MODEL.clone(decode=True).init, jax.random.key(0), jnp.zeros((len(letters), LENGTH), jnp.int32)
  )
  cache = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes["cache"])
  return Stream(tokens, jnp.int32(0), cache)


def write_letter(params: Any, stream: Stream) -> Stream:
  """The most likely next letter of every row; a plain function, which knows nothing of adapters."""
  variables = {"params": params, "cache": stream.cache}
  logits, new = MODEL.clone(decode=True).apply(variables, stream.token, stream.position, mutable=["cache"])
  return Stream(logits.argmax(-1).astype(jnp.int32), stream.position + 1, new["cache"])


@functools.partial(jax.jit, donate_argnums=3)
def write(params: Any, bank: jaxlora.Bank, ids: jax.Array, stream: Stream) -> Stream:
  """`write_letter` with an adapter for each row."""
  return jaxlora.route(write_letter)(params, bank, ids, stream)


def generate(
  params: Any, bank: jaxlora.Bank, names: Sequence[str | None], letters: str, swap: tuple[int, str, str] | None = None
) -> list[str]:
  """The texts of all rows.

  Args:
    params: the base.
    bank: the adapters.
    names: each row's adapter; None is the base.
    letters: each row's first letter.
    swap: `(step, name, other)`: ahead of that step, `other` replaces the adapter `name` in the bank.
  """
  ids, stream = bank.ids(names), begin(letters)
  written = [np.asarray(stream.token)]
  for step in range(1, LENGTH):
    if swap is not None and step == swap[0]:
      bank = bank.put(swap[1], bank.take(swap[2]))  # the slot and the ids stay the same
    stream = write(params, bank, ids, stream)
    written.append(np.asarray(stream.token))  # read ahead of the next step, to which the stream is donated
  return ["".join(ALPHABET[k] for k in row) for row in np.concatenate(written, axis=1)]


def main(argv: Sequence[str] | None = None) -> dict[str, list[str]]:
  """Trains, and decodes twice: without a replacement and with one."""
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--steps", type=int, default=300, help="training steps of the base and of the adapters")
  args = parser.parse_args(argv)
  print("The base learns the alphabet:")
  params = pretrain(args.steps)
  print(f"{len(WRITERS)} adapters learn other orders, in one batch:")
  bank = train_adapters(params, args.steps)
  names, letters = [None, *WRITERS], "aaaaa"
  swap = (LENGTH // 2, "doubled", "backwards")
  written = {
    "before": generate(params, bank, names, letters),
    "swapped": generate(params, bank, names, letters, swap),
  }
  for name, plain, swapped in zip(names, *written.values(), strict=True):
    print(f"  {name or 'the base':12s} {plain}   {swapped if swapped != plain else '(the same)'}")
  print(f"On the right {swap[1]!r} was swapped for {swap[2]!r} after {swap[0]} letters.")
  print(f"Functions compiled for writing: {write._cache_size()}.")
  return written


if __name__ == "__main__":
  main()
