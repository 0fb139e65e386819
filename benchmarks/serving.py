"""A batch in which every row has its own adapter costs little more than the base, however many adapters there are.

One language model serves a batch of rows with 1, 8, 32 different adapters out of a bank of a thousand, on whole
sequences and token by token beside a cache. Beside it: the base alone, which it cannot go below; a small bank; a loop
that merges one adapter after the other and runs its rows; and PEFT's `adapter_names=` on torch's CPU, over torch's own
base. A second table times the ways to compute one product, whatever the library would choose.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import contestants
from contestants import Base, Settings
import forward
import harness
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import models
import numpy as np

import jaxlora

BASE, MIXED, SMALL, MERGES, PEFT = (
  "base",
  "jaxlora, mixed batch",
  "jaxlora, small bank",
  "a loop of merges",
  "PEFT (torch)",
)
REACH_BATCH, REACH_TOKEN, FLAT = 0.85, 0.7, 0.1
WAYS = ("gathered", "row by row", "wide")
RAGGED = "ragged_dot"


class Work(NamedTuple):
  """What is served: `fn(params, state, *args)` gives logits and the next state, which is donated.

  Attributes:
    title: a name.
    tokens: per row.
    state, args: what `fn` starts with; rows along their first axis.
    reach: throughput over the base's, at least.
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
    # the place in the cache stays: every call is the same work
    return logits, jax.tree.map(lambda old, new: old if old.dtype == jnp.int32 else new, cache, new["cache"])

  title = f"{settings.batch} rows x 1 token, cache of {settings.seq}"
  return Work(title, 1, fn, cache, (base.batch.x[:, :1],), REACH_TOKEN)


def make_bank(base: Base, size: int) -> jaxlora.Bank:
  """A bank of that many different adapters."""
  _, half = jaxlora.split(forward.trained(contestants.adapt(base)))
  bank = jaxlora.stack(dict.fromkeys(map(str, range(size)), half))
  factor = jax.random.uniform(jax.random.key(5), (size,), minval=0.5, maxval=1.5)

  def varied(leaf: jax.Array) -> jax.Array:
    return leaf if leaf.ndim == 1 else leaf * factor.reshape(-1, *[1] * (leaf.ndim - 1)).astype(leaf.dtype)

  return jax.tree.map(varied, bank)


def mix(distinct: int, rows: int, size: int) -> np.ndarray:
  """Ids of that many different adapters, spread over the bank, in turn."""
  chosen = np.random.default_rng(0).permutation(size)[:distinct]
  return chosen[np.arange(rows) % distinct].astype(np.int32)


# ----------------------------------------------------------------------------------------------------------------------
# Who serves.


class Server:
  """A compiled function with its state, which every call hands on to the next."""

  def __init__(self, compiled: Any, before: tuple[Any, ...], work: Work, rows: slice = slice(None)):
    self.compiled, self.before = compiled, before
    self.state, self.args = of_rows(work.state, rows), of_rows(work.args, rows)

  def __call__(self) -> jax.Array:
    out, self.state = self.compiled(*self.before, self.state, *self.args)
    return out


def of_rows(tree: Any, rows: slice) -> Any:
  """Copies, as they are donated."""
  return jax.tree.map(lambda leaf: jnp.copy(leaf[rows] if leaf.ndim else leaf), tree)


def compiled(fn: Callable[..., Any], before: tuple[Any, ...], work: Work, rows: slice = slice(None)) -> Any:
  """`fn(*before, state, *args)`, whose state is donated."""
  operands = (*before, of_rows(work.state, rows), *of_rows(work.args, rows))
  return jax.jit(fn, donate_argnums=len(before)).lower(*operands).compile()


def loop_of_merges(base: Base, bank: jaxlora.Bank, work: Work, distinct: int) -> Callable[[], Any]:
  """One adapter after the other: merge it, run its rows."""
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


def compare(
  base: Base, bank: jaxlora.Bank, work: Work, distinct: Sequence[int], rounds: int, tick: Callable[[str], Any]
) -> dict[str, Any]:
  """Everybody's throughput over the base's, for every number of distinct adapters."""
  rows = base.settings.batch
  tick(f"compiling {work.title}")
  plain = compiled(work.fn, (base.params,), work)
  routed = jaxlora.route(work.fn)
  mixed = compiled(routed, (base.params, bank, jnp.zeros(rows, jnp.int32)), work)
  small = make_bank(base, min(rows, bank.capacity))
  of_small = compiled(routed, (base.params, small, jnp.zeros(rows, jnp.int32)), work)
  difference = check_agrees(base, bank, work, mixed)

  runs: dict[str, Callable[[], Any]] = {BASE: Server(plain, (base.params,), work)}
  for count in distinct:
    ids = jnp.asarray(mix(count, rows, bank.capacity))
    runs[entry(MIXED, count)] = Server(mixed, (base.params, bank, ids), work)
    runs[entry(MERGES, count)] = loop_of_merges(base, bank, work, count)
  most = jnp.asarray(mix(min(rows, max(distinct)), rows, small.capacity))
  runs[entry(SMALL, max(distinct))] = Server(of_small, (base.params, small, most), work)
  runs = harness.with_control(runs, BASE, Server(plain, (base.params,), work))
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda _: tick(work.title))
  over_base = harness.ratios(seconds, BASE)
  throughput = {name: inverse(over_base[name]) for name in over_base}
  ways = jaxlora.explain(routed, base.params, bank, jnp.zeros(rows, jnp.int32), work.state, *work.args)
  return {
    "title": work.title,
    "tokens": work.tokens,
    "reach": work.reach,
    "distinct": list(distinct),
    "throughput": throughput,
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
    "control": throughput[BASE + harness.CONTROL],
    "difference": difference,
    "ways": sorted({use.way for use in ways.uses}),
    "flat_in_adapters": spread([throughput[entry(MIXED, count)] for count in distinct]),
    "flat_in_bank": spread([throughput[entry(name, max(distinct))] for name in (MIXED, SMALL)]),
    "temp_bytes": {
      name: program.memory_analysis().temp_size_in_bytes for name, program in ((BASE, plain), (MIXED, mixed))
    },
  }


def entry(name: str, distinct: int) -> str:
  """What a row of the table is called."""
  return f"{name}, {distinct}"


def inverse(ratio: dict[str, Any]) -> dict[str, Any]:
  """The throughput that a ratio of times means."""
  return harness.summarize([1 / value for value in ratio["rounds"]])


def spread(values: Sequence[dict[str, Any]]) -> float:
  """How far apart medians are: the largest over the smallest, less one."""
  medians = [value["median"] for value in values]
  return max(medians) / min(medians) - 1


def memory(base: Base, bank: jaxlora.Bank) -> dict[str, float]:
  """Bytes at rest: the base's, one adapter's own, the bank's, and the bank's over those of its adapters."""
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  own = size(bank.take("0"))
  return {
    "base": size(base.params), "adapter": own, "bank": size(bank), "bank_over_own": size(bank) / (bank.capacity * own)
  }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The ways to compute one product.


def ways_of(settings: Settings, tokens: int, adapters: int, rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """A chain of products of one size, computed in every way; time per product, with the base's own in it."""
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
    """Rows sorted by adapter, one grouped product."""
    order = jnp.argsort(ids)
    sizes = jnp.bincount(ids, length=adapters).astype(jnp.int32) * tokens

    def low_rank(name: str, x: jax.Array) -> jax.Array:
      slots = bank.factors[name]
      h = jax.lax.ragged_dot(x[order].reshape(-1, width), slots.a.mT, sizes)
      return jnp.zeros_like(x).at[order].set(jax.lax.ragged_dot(h, slots.b, sizes).reshape(x.shape))

    return fn(params, x, low_rank)

  programs = {BASE: jax.jit(fn).lower(params, x).compile()}
  runs: dict[str, Callable[[], Any]] = {BASE: lambda: programs[BASE](params, x)}
  # what sums over all adapters is out of the question for many
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
    "throughput": {name: inverse(ratio) for name, ratio in harness.ratios(seconds, BASE).items()},
    "seconds": {name: harness.summarize([value / layers for value in values]) for name, values in seconds.items()},
  }


# ----------------------------------------------------------------------------------------------------------------------
# PEFT.


def add_peft(results: dict[str, Any], settings: Settings, rounds: int) -> str | None:
  """Puts PEFT's throughput over torch's own base beside the others'; returns why not, where it cannot."""
  if not (harness.installed("torch") and harness.installed("peft")):
    return f"{PEFT} is left out: torch and peft are not installed; the extra `peers` brings them."
  if jax.default_backend() != "cpu":
    return f"{PEFT} is left out: it runs on the CPU alone."
  results["peft"] = contestants.run_peft(
    "peft_serving", settings, rounds, f"--distinct={','.join(map(str, results['comparisons'][0]['distinct']))}"
  )
  for comparison in results["comparisons"]:
    own = results["peft"]["works"][str(comparison["tokens"])]
    for count, ratio in own["throughput"].items():
      comparison["throughput"][entry(PEFT, int(count))] = ratio
      comparison["seconds"][entry(PEFT, int(count))] = own["seconds"][count]
  return None


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def describe(comparison: dict[str, Any]) -> str:
  """One piece of work's table."""
  rows = [
    (name, harness.ratio_cell(ratio), harness.milliseconds(comparison["seconds"][name]))
    for name, ratio in comparison["throughput"].items()
    if not name.endswith(harness.CONTROL)
  ]
  base, mixed = (comparison["temp_bytes"][name] / 1e6 for name in (BASE, MIXED))
  return "\n".join(
    [
      f"{comparison['title']}, computed {' and '.join(comparison['ways'])}",
      harness.table(("served by, distinct adapters", "throughput / base", "time"), rows),
      f"To reach: {comparison['reach']}. A/A control: {harness.ratio_cell(comparison['control'])}. Flat in distinct"
      f" adapters within {comparison['flat_in_adapters']:.0%}, in the size of the bank within"
      f" {comparison['flat_in_bank']:.0%}. Temp {mixed:,.1f} MB, base {base:,.1f} MB. Rows and their adapters alone"
      f" differ by {comparison['difference']:.1e} of the largest logit.",
    ]
  )


def describe_ways(ways: Sequence[dict[str, Any]]) -> str:
  """The table of products."""
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


def tables(results: dict[str, Any]) -> str:
  """The comparisons as a README has them."""
  held = results["memory"]
  parts = [
    f"{results['title']}, a bank of {results['settings']['bank']:,} adapters of {held['adapter'] / 1e6:,.2f} MB:"
    f" {held['bank'] / 1e6:,.0f} MB beside a base of {held['base'] / 1e6:,.0f} MB. {results['settings']['rounds']}"
    f" rounds, medians (min-max). {harness.conditions(results, *harness.PEERS)}."
  ]
  for one in results["comparisons"]:
    rows = [
      (name, harness.ratio_cell(ratio), harness.milliseconds(one["seconds"][name]))
      for name, ratio in one["throughput"].items()
      if not name.endswith(harness.CONTROL)
    ]
    parts += [
      f"{one['title']}; to reach {one['reach']}; A/A control {harness.ratio_cell(one['control'])}; flat in distinct"
      f" adapters within {one['flat_in_adapters']:.0%}, in the size of the bank within {one['flat_in_bank']:.0%}:",
      harness.markdown(("served by, distinct adapters", "throughput / base", "time"), rows),
    ]
  return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
  """Throughput against distinct adapters, a panel for each piece of work."""
  comparisons = results["comparisons"]
  figure = Figure(figsize=(4.8 * len(comparisons), 4), layout="constrained")
  for axes, comparison in zip(figure.subplots(1, len(comparisons), squeeze=False)[0], comparisons, strict=True):
    for name, color in ((MIXED, "tab:blue"), (MERGES, "tab:gray"), (PEFT, "tab:orange")):
      found = {k: comparison["throughput"].get(entry(name, k)) for k in comparison["distinct"]}
      values = {k: value for k, value in found.items() if value is not None}
      if values:
        medians = [value["median"] for value in values.values()]
        low = [value["median"] - value["min"] for value in values.values()]
        high = [value["max"] - value["median"] for value in values.values()]
        axes.errorbar(list(values), medians, yerr=[low, high], color=color, marker="o", capsize=3, label=name)
    axes.axhline(1, color="black", linewidth=1, label=BASE)
    axes.axhline(
      comparison["reach"], color="tab:green", linestyle="--", linewidth=1, label=f"to reach: {comparison['reach']}"
    )
    axes.set_xscale("log", base=2)
    axes.set_xticks(comparison["distinct"], list(map(str, comparison["distinct"])))
    axes.set(title=comparison["title"], xlabel="distinct adapters in the batch", ylim=(0, None))
  figure.axes[0].set_ylabel("throughput / base")
  figure.axes[-1].legend(frameon=False, fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = harness.make_parser(__file__, __doc__, "--rank 16 --bank 1000")
  harness.add_layers(parser)
  harness.add_sizes(parser)
  parser.set_defaults(batch=32)
  count = harness.several(harness.positive(int))
  parser.add_argument("--bank", type=harness.positive(int), default=1000, help="adapters in the bank")
  parser.add_argument("--distinct", type=count, default=[1, 8, 32], help="distinct adapters in the batch")
  parser.add_argument("--no-peft", action="store_true", help="leave PEFT out")
  parser.add_argument("--no-ways", action="store_true", help="leave the table of single products out")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what serving.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3, bank=64)
  settings = Settings.parse(parser, args)
  if wrong := [count for count in args.distinct if settings.batch % count or count > args.bank]:
    parser.error(f"--distinct {wrong[0]}: must divide the batch of {settings.batch}, and be in a bank of {args.bank}")
  base = contestants.make_base(settings)
  bank = make_bank(base, args.bank)
  sizes = [] if args.no_ways else [(tokens, size) for tokens in (1, settings.seq) for size in (1, 4, args.bank)]
  results: dict[str, Any] = {**harness.provenance(args), "title": settings.title(), "memory": memory(base, bank)}
  with harness.progress(0, "turn", args.quiet) as bar:
    tick = harness.ticker(bar)
    results["comparisons"] = [
      compare(base, bank, work(base), args.distinct, args.rounds, tick) for work in (whole_batch, one_token)
    ]
    del bank
    results["ways"] = [ways_of(settings, *size, args.rounds, tick) for size in sizes]
    tick(PEFT)
    left_out = None if args.no_peft else add_peft(results, settings, args.rounds)
  harness.publish(args, "serving", results, plot)
  print(f"{results['title']}, bank of {args.bank:,} adapters", *map(describe, results["comparisons"]), sep="\n\n")
  if results["ways"]:
    print("", describe_ways(results["ways"]), sep="\n")
  held = results["memory"]
  print(
    f"\nAt rest: base {held['base'] / 1e6:,.1f} MB, an adapter {held['adapter'] / 1e6:,.2f} MB, the bank"
    f" {held['bank'] / 1e6:,.1f} MB, {held['bank_over_own']:.4f} of its adapters' own."
  )
  if left_out:
    print(left_out)
  return results


if __name__ == "__main__":
  main()
