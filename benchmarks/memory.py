"""A LoRA step needs little more memory and FLOPs than the frozen floor, and recomputation takes next to no time.

Compared are XLA's figures of each compiled training step, which are exact: temporary bytes over the frozen floor's, and
FLOPs over those that a LoRA step needs. The time with and without recomputation is measured in interleaved rounds.

"Needed" FLOPs are the floor's plus the factors' own, 6 x tokens x rank x (input + output) for each kernel, minus the
input gradient of the first block's query, key and value: the floor computes it, but no trained parameter depends on it.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import contestants
from contestants import FLOOR, FULL
import harness
from settings import Base, Settings, add_sizes, make_base
import steps

REACH_TEMP, REACH_FLOPS, REACH_TIME = 1.10, 1.005, 1.05
RECOMPUTE, NO_RECOMPUTE = "jaxlora, recompute", "jaxlora, no recompute"


def factor_flops(base: Base) -> tuple[int, int]:
  """FLOPs of the factors, and of the input gradient of the first block's query, key and value, which is not needed.

  The forward pass has the products x A and (x A) B; the backward pass has both factors' gradients and two products for
  the input gradient. A block under remat computes the forward products twice, except the last (x A) B, on which no
  gradient depends.
  """
  settings = base.settings
  tokens = settings.batch * settings.seq
  factors = 6 * tokens * contestants.factor_parameters(base)
  if settings.remat:
    last = settings.layers * settings.rank * settings.width
    factors += 2 * tokens * (contestants.factor_parameters(base) - last)
  skipped = 3 * 2 * tokens * settings.width * (settings.width + settings.rank)
  return factors, skipped


def compare(settings: Settings, args: argparse.Namespace, tick: Any) -> dict[str, Any]:
  """Compiled figures and times of all contestants."""
  candidates = contestants.contestants() + contestants.recompute_contestants()
  here, absent = contestants.present(candidates, settings)
  base = make_base(settings)
  entries = steps.prepare(base, here, tick)
  seconds = steps.time_steps(base, entries, args.rounds, lambda _: tick("timing"))
  over_floor = harness.ratios(seconds, FLOOR)
  floor = entries[FLOOR].compiled
  factors, skipped = factor_flops(base)
  rows = {}
  for name, entry in entries.items():
    flops = entry.compiled.flops
    rows[name] = {
      "bytes": entry.compiled.bytes,
      "temp_over_floor": entry.compiled.bytes["temp"] / floor.bytes["temp"],
      "flops": flops,
      "flops_over_floor_and_factors": flops and flops / (floor.flops + factors),
      "flops_over_needed": flops and flops / (floor.flops + factors - skipped),
      "over_floor": over_floor[name],
      "seconds": harness.summarize(seconds[name]),
      "check": entry.check,
    }
  return {
    "title": settings.title(),
    "model": settings._asdict(),
    "factor_flops": factors,
    "skipped_flops": skipped,
    "control": over_floor[FLOOR + harness.CONTROL],
    "recompute_over_not": harness.ratios(seconds, NO_RECOMPUTE)[RECOMPUTE] if RECOMPUTE in seconds else None,
    "rows": rows,
    "left_out": absent,
  }


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  head = ("method", "temp", "temp / floor", "FLOPs", "/ (floor + factors)", "/ needed", "step / floor", "time")
  rows: list[tuple[str, ...]] = [head]
  for name, row in results["rows"].items():
    figures = (
      f"{row['bytes']['temp'] / 1e6:,.1f} MB",
      harness.exact_cell(row["temp_over_floor"]),
      "-" if row["flops"] is None else f"{row['flops'] / 1e9:.3f} G",
      harness.exact_cell(row["flops_over_floor_and_factors"]),
      harness.exact_cell(row["flops_over_needed"]),
      harness.ratio_cell(row["over_floor"]),
      harness.milliseconds(row["seconds"]),
    )
    rows.append((name, *figures))
  return rows


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  head, *rows = cells(results)
  lines = [results["title"], harness.table(head, rows)]
  lines.append(f"A/A control (the floor again / the floor): {harness.ratio_cell(results['control'])}")
  if results["recompute_over_not"]:
    lines.append(f"time with recompute / without: {harness.ratio_cell(results['recompute_over_not'])}")
  else:
    lines.append("this jaxlora.wrap has no option to recompute")
  return "\n".join([*lines, *results["left_out"]])


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  head, *rows = cells(results)
  ratio = results["recompute_over_not"]
  lines = (
    f"{results['settings']['rounds']} rounds. {harness.conditions(results)}.",
    f"The A/A control is {harness.ratio_cell(results['control'])}"
    + (f"; the recomputing step takes {harness.ratio_cell(ratio)} of the time without." if ratio else "."),
  )
  return "\n".join([*lines, "", harness.markdown(head, rows)])


def plot(results: dict[str, Any], path: Any) -> None:
  """Temporary bytes, FLOPs and times over the floor's."""
  rows = results["rows"]
  temp = {name: harness.summarize([row["temp_over_floor"]]) for name, row in rows.items()}
  flops = {name: harness.summarize([row["flops_over_needed"]]) for name, row in rows.items() if row["flops"]}
  times = {name: row["over_floor"] for name, row in rows.items()}
  panels = [harness.Panel(results["title"], "XLA temp bytes / frozen floor's", temp, REACH_TEMP)]
  if flops:
    without_floor = {name: value for name, value in flops.items() if name not in (FLOOR, FULL)}
    panels.append(harness.Panel("", "FLOPs / needed", without_floor, REACH_FLOPS))
  panels.append(harness.Panel("", "step time / frozen floor", times))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what memory.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--remat --rank 32")
  harness.add_layers(parser)
  add_sizes(parser)
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  settings = Settings.parse(parser, args)
  count = len(contestants.contestants() + contestants.recompute_contestants())
  with harness.progress(steps.turns(count, args.rounds), "turn", args.quiet) as bar:
    comparison = compare(settings, args, harness.ticker(bar))
  results = {**harness.provenance(args), **comparison}
  harness.publish(args, "memory", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
