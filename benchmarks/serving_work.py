"""The work of `serving.py`: a batch for the model, a bank of adapters, and the ways to serve one with the other."""

from collections.abc import Callable
from typing import Any, NamedTuple

import contestants
import forward
import jax
import jax.numpy as jnp
import models
import numpy as np
from settings import Base

import jaxlora

REACH_BATCH, REACH_TOKEN = 0.85, 0.7


class Work(NamedTuple):
  """A batch to serve: `fn(params, state, *args)` returns logits and the next state, which is donated.

  Attributes:
    title: its name in tables.
    tokens: tokens per row.
    fn: the model's function.
    state, args: its first operands, with the batch along their first axes.
    reach: the throughput over the base's to reach at least.
  """

  title: str
  tokens: int
  fn: Callable[..., tuple[jax.Array, Any]]
  state: Any
  args: tuple[Any, ...]
  reach: float


def whole_batch(base: Base) -> Work:
  """All tokens of every row at once."""
  settings = base.settings
  fn = lambda params, state, x: (base.model.apply({"params": params}, x), state)
  title = f"{settings.batch} rows x {settings.seq} tokens"
  return Work(title, settings.seq, fn, (), (base.batch.x,), REACH_BATCH)


def one_token(base: Base) -> Work:
  """The next token of every row, halfway through its cache."""
  settings = base.settings
  model = base.model.clone(decode=True)
  start = settings.seq // 2
  cache = models.empty_cache(model, settings.batch)
  cache = jax.tree.map(lambda leaf: jnp.full_like(leaf, start) if leaf.dtype == jnp.int32 else leaf, cache)

  def fn(params: Any, cache: Any, x: jax.Array) -> Any:
    logits, new = model.apply({"params": params, "cache": cache}, x, start=start, mutable=["cache"])
    # the position in the cache stays: every call does the same work
    return logits, jax.tree.map(lambda old, new: old if old.dtype == jnp.int32 else new, cache, new["cache"])

  title = f"{settings.batch} rows x 1 token, cache of {settings.seq}"
  return Work(title, 1, fn, cache, (base.batch.x[:, :1],), REACH_TOKEN)


def make_bank(base: Base, size: int) -> jaxlora.Bank:
  """A bank of `size` different adapters."""
  _, half = jaxlora.split(forward.trained(contestants.adapt(base)))
  bank = jaxlora.stack(dict.fromkeys(map(str, range(size)), half))
  factor = jax.random.uniform(jax.random.key(5), (size,), minval=0.5, maxval=1.5)

  def varied(leaf: jax.Array) -> jax.Array:
    return leaf if leaf.ndim == 1 else leaf * factor.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)

  return jax.tree.map(varied, bank)


def mix(distinct: int, rows: int, size: int) -> np.ndarray:
  """Ids of `rows` rows that cycle through `distinct` adapters, spread over a bank of `size`."""
  chosen = np.random.default_rng(0).permutation(size)[:distinct]
  return chosen[np.arange(rows) % distinct].astype(np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Serving.


class Server:
  """A compiled function and its state; every call passes the state on to the next."""

  def __init__(self, compiled: Any, before: tuple[Any, ...], work: Work, rows: slice = slice(None)):
    self.compiled, self.before = compiled, before
    self.state, self.args = of_rows(work.state, rows), of_rows(work.args, rows)

  def __call__(self) -> jax.Array:
    out, self.state = self.compiled(*self.before, self.state, *self.args)
    return out


def of_rows(tree: Any, rows: slice) -> Any:
  """Copies of some rows of every array: the originals must survive donation."""
  return jax.tree.map(lambda leaf: jnp.copy(leaf[rows] if leaf.ndim else leaf), tree)


def compiled(fn: Callable[..., Any], before: tuple[Any, ...], work: Work, rows: slice = slice(None)) -> Any:
  """Compiles `fn(*before, state, *args)`, with the state donated."""
  operands = (*before, of_rows(work.state, rows), *of_rows(work.args, rows))
  return jax.jit(fn, donate_argnums=len(before)).lower(*operands).compile()


def loop_of_merges(base: Base, bank: jaxlora.Bank, work: Work, distinct: int) -> Callable[[], Any]:
  """The loop that merges one adapter after the other and runs its rows."""
  size = base.settings.batch // distinct
  frozen, _ = jaxlora.split(contestants.adapt(base))
  fn = lambda frozen, half, *rest: work.fn(jaxlora.merge(jaxlora.join(frozen, half)), *rest)
  halves = [bank.take(str(k)) for k in mix(distinct, distinct, bank.capacity)]
  rows = [slice(k * size, (k + 1) * size) for k in range(distinct)]
  program = compiled(fn, (frozen, halves[0]), work, rows[0])
  servers = [Server(program, (frozen, half), work, part) for half, part in zip(halves, rows, strict=True)]
  return lambda: [server() for server in servers]


def check_agrees(base: Base, bank: jaxlora.Bank, work: Work, program: Any) -> float:
  """The largest difference between rows of a mixed batch and their adapters alone, over the largest logit.

  Raises:
    RuntimeError: if it is more than rounding.
  """
  rows = base.settings.batch
  ids = mix(rows, rows, bank.capacity)
  ids[1] = -1
  got = np.asarray(Server(program, (base.params, bank, jnp.asarray(ids)), work)(), np.float32)
  frozen, _ = jaxlora.split(contestants.adapt(base))
  alone, difference = jax.jit(jaxlora.wrap(work.fn)), 0.0
  for row in (0, 1, rows - 1):
    tree = base.params if ids[row] < 0 else jaxlora.join(frozen, bank.take(str(ids[row])))
    part = slice(row, row + 1)
    want = np.asarray(alone(tree, of_rows(work.state, part), *of_rows(work.args, part))[0][0], np.float32)
    difference = max(difference, float(np.abs(got[row] - want).max() / np.abs(want).max()))
  if difference > (5e-2 if base.settings.bf16 else 1e-5):
    raise RuntimeError(f"{work.title}: a row and its adapter alone differ by {difference:.1e}")
  return difference
