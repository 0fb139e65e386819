"""The ways to compute one product with an adapter per row, timed side by side, whatever the library would choose."""

from collections.abc import Callable, Sequence
from typing import Any

import harness
import jax
import jax.numpy as jnp
import numpy as np
from serving_work import mix
from settings import Settings

import jaxlora

BASE = "base"
WAYS = ("gathered", "row by row", "wide")
RAGGED = "ragged_dot"


def ways_of(settings: Settings, tokens: int, adapters: int, rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """A chain of products of one size, computed in every way; times are per product, the base's product included."""
  width, rank, rows, layers = settings.width, settings.rank, settings.batch, 4
  keys = iter(jax.random.split(jax.random.key(2), 3 * layers + 1))
  normal = lambda *shape: jax.random.normal(next(keys), shape) / width**0.5
  params = {str(k): normal(width, width) for k in range(layers)}

  def fn(params: Any, x: jax.Array, low_rank: Callable[[str, jax.Array], Any] = lambda name, x: 0.0) -> jax.Array:
    for name, kernel in params.items():
      x = jnp.tanh(x @ kernel + low_rank(name, x))
    return x

  _, half = jaxlora.split(jaxlora.adapt(params, jaxlora.LoraConfig(rank=rank, targets=".*"), next(keys)))
  bank = jaxlora.stack(dict.fromkeys(map(str, range(adapters)), half))
  bank = jax.tree.map(lambda leaf: leaf if leaf.ndim == 1 else normal(*leaf.shape), bank)
  x, ids = (
    jax.random.normal(jax.random.key(3), (rows, tokens, width)),
    jnp.asarray(mix(min(rows, adapters), rows, adapters)),
  )

  def ragged(params: Any, bank: jaxlora.Bank, ids: jax.Array, x: jax.Array) -> jax.Array:
    """Rows sorted by adapter, and one grouped product."""
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=adapters).astype(jnp.int32) * tokens

    def low_rank(name: str, x: jax.Array) -> jax.Array:
      slots = bank.factors[name]
      h = jax.lax.ragged_dot(x[order].reshape(-1, width), slots.a.mT, sizes)
      return jnp.zeros_like(x).at[order].set(jax.lax.ragged_dot(h, slots.b, sizes).reshape(x.shape))

    return fn(params, x, low_rank)

  programs = {BASE: jax.jit(fn).lower(params, x).compile()}
  runs: dict[str, Callable[[], Any]] = {BASE: lambda: programs[BASE](params, x)}
  # `wide` and `ragged_dot` compute with every adapter of the bank: far too slow for a large one
  over_all = adapters <= rows
  for name in (*WAYS[:2], *((WAYS[2], RAGGED) if over_all else ())):
    tick(f"compiling {name}")
    routed = ragged if name == RAGGED else jaxlora.route(fn, via=name)
    programs[name] = jax.jit(routed).lower(params, bank, ids, x).compile()
    runs[name] = lambda name=name: programs[name](params, bank, ids, x)
  outs = {name: np.asarray(run()) for name, run in runs.items()}
  for name in outs:
    if name != BASE and not np.allclose(outs[name], outs[WAYS[0]], atol=1e-4):
      raise RuntimeError(f"{name} and {WAYS[0]} differ")
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda _: tick("ways"))
  chosen = jaxlora.explain(jaxlora.route(fn), params, bank, ids, x).uses[0].way
  return {
    "tokens": tokens,
    "adapters": adapters,
    "chosen": chosen,
    "throughput": {name: harness.inverse(ratio) for name, ratio in harness.ratios(seconds, BASE).items()},
    "seconds": {name: harness.summarize([value / layers for value in values]) for name, values in seconds.items()},
  }


def describe_ways(ways: Sequence[dict[str, Any]]) -> str:
  """The table, for a terminal."""
  names = (BASE, *WAYS, RAGGED)
  rows = [
    (
      str(one["tokens"]),
      f"{one['adapters']:,}",
      *(harness.ratio_cell(one["throughput"].get(name)) for name in names[1:]),
      one["chosen"],
    )
    for one in ways
  ]
  head = ("tokens a row", "bank", *names[1:], "chosen")
  return "\n".join(["Throughput of single products over the base's own product", harness.table(head, rows)])
