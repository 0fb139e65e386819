"""A batch in which every row has its own adapter costs little more than the base, however many adapters there are.

One language model serves a batch of rows with 1, 8, 32 different adapters out of a bank of a thousand, on whole
sequences and token by token beside a cache. Compared with it are the base alone, which is the upper limit; a small
bank; a loop that merges one adapter after the other and runs its rows; and PEFT's `adapter_names=` on torch's CPU, over
torch's own base. A second table times the ways to compute one product, whatever the library would choose.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import harness
import jax
import jax.numpy as jnp
from matplotlib.figure import Figure
import peers
from serving_ways import BASE, describe_ways, ways_of
from serving_work import Server, Work, check_agrees, compiled, loop_of_merges, make_bank, mix, one_token, whole_batch
from settings import Base, Settings, make_base

import jaxlora

MIXED, SMALL, MERGES, PEFT = "jaxlora, mixed batch", "jaxlora, small bank", "a loop of merges", "PEFT (torch)"


def compare(
  base: Base, bank: jaxlora.Bank, work: Work, distinct: Sequence[int], rounds: int, tick: Callable[[str], Any]
) -> dict[str, Any]:
  """Throughput over the base's, for every way to serve and every number of distinct adapters."""
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
  throughput = {name: harness.inverse(over_base[name]) for name in over_base}
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
  """The name of a row."""
  return f"{name}, {distinct}"


def spread(values: Sequence[dict[str, Any]]) -> float:
  """The largest median over the smallest, minus 1."""
  medians = [value["median"] for value in values]
  return max(medians) / min(medians) - 1


def memory(base: Base, bank: jaxlora.Bank) -> dict[str, float]:
  """Bytes at rest: of the base, of one adapter, of the bank, and of the bank over the sum of its adapters."""
  size = lambda tree: sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
  own = size(bank.take("0"))
  return {
    "base": size(base.params), "adapter": own, "bank": size(bank), "bank_over_own": size(bank) / (bank.capacity * own)
  }  # fmt: skip


def add_peft(results: dict[str, Any], settings: Settings, rounds: int) -> str | None:
  """Adds PEFT's throughput over torch's own base to the comparisons; returns why not, if it cannot run."""
  if not (harness.installed("torch") and harness.installed("peft")):
    return f"{PEFT} is left out: torch and peft are not installed; the extra `peers` brings them."
  if jax.default_backend() != "cpu":
    return f"{PEFT} is left out: it runs on the CPU alone."
  results["peft"] = peers.run_peft(
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
  """A comparison's table, for a terminal."""
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


def tables(results: dict[str, Any]) -> str:
  """The tables of benchmarks/README.md."""
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
  """Throughput over the number of distinct adapters, a panel for each batch."""
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
  base = make_base(settings)
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
