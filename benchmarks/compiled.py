"""What the compilers of TPUs and GPUs make of the training steps, without the chip: compiled, not run.

Every contestant's step is compiled ahead of time for one chip, from shapes alone. The figures are the compiler's and
exact: the same program and compiler give the same ones on every host. They are no times. A TPU's compiler estimates
cycles of each fusion; a GPU's does not, and there what runs between the matrix products is counted, which is what a
trainer can save.

With --fits the question is another one: the largest batch whose step fits into the chip's memory, of a model with about
a billion parameters. It is found to a sixteenth.

Where the host has the chip, the steps are run and timed as well, as in train_step.py.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ahead import Target, compile_for, figures, largest, step_fits
from chips import CHIPS, Chip, NoCompilerError, device_of, is_here, stay_on_the_host
import contestants
from contestants import FLOOR, Contestant
import harness
from settings import Settings, add_sizes, base_shapes, make_base
import steps
from train_step import beginnings, wanted

NOT_RUN = "compiled, not run"
PEERS = ("textbook merge", "qwix", "nnx.LoRA")
# What to stay below, over the floor's; the last is the ratio to the best peer's.
REACH = {
  "tpu": {"cycles": 1.05, "temp": 1.00},
  "gpu": {"temp": 0.75, "bytes_outside": 1.10},
}
REACH_PEER = 0.90


# ----------------------------------------------------------------------------------------------------------------------
# Figures of the steps.


def candidates(only: Sequence[str] | None) -> list[Contestant]:
  """The contestants. Jaxlora is not told which chip it is for: forms for a platform are chosen where it is lowered."""
  without, _ = contestants.recompute_contestants()
  return [one for one in (*contestants.contestants(), without) if wanted(one.name, only)]


def microseconds(row: dict[str, Any], chip: Chip) -> dict[str, float | None]:
  """The same as times, by the chip's figures: what the products and the memory need at least, and the estimate."""
  rates = {"flops": chip.flops, "bytes": chip.bandwidth, "cycles": chip.clock}
  return {
    name: None if rate is None or row.get(name) is None else 1e6 * row[name] / rate for name, rate in rates.items()
  }


def over(row: dict[str, Any], floor: dict[str, Any]) -> dict[str, float | None]:
  """Figures over the floor's; None where there is none, or the floor's is 0."""
  return {name: value / floor[name] if floor[name] and value is not None else None for name, value in row.items()}


def over_best_peer(rows: dict[str, Any], field: str) -> dict[str, Any] | None:
  """Jaxlora's figure over the smallest one of another library's, and whose that is."""
  peers = {name: rows[name][field] for name in PEERS if rows.get(name, {}).get(field)}
  if not peers or "jaxlora" not in rows:
    return None
  best = min(peers, key=peers.__getitem__)
  return {"ratio": rows["jaxlora"][field] / peers[best], "peer": best}


def compare(target: Target, settings: Settings, args: argparse.Namespace, tick: Callable[[str], Any]) -> dict[str, Any]:
  """The figures of all contestants, and times where the chip is here."""
  chip = target.chip
  here, absent = contestants.present(candidates(args.only), settings)
  base, rows = base_shapes(settings), {}
  for one in here:
    tick(f"compiling {one.name}")
    rows[one.name] = figures(compile_for(target, one, base), chip, settings)
  floor = dict(rows[FLOOR])
  best = over_best_peer(rows, "cycles" if chip.platform == "tpu" else "temp")
  for row in rows.values():
    row.update(over_floor=over(row, floor), microseconds=microseconds(row, chip))
  return {"rows": rows, "over_best_peer": best, "run": run_here(target, settings, args, tick), "left_out": absent}


def run_here(target: Target, settings: Settings, args: argparse.Namespace, tick: Any) -> dict[str, Any] | None:
  """Times of the steps on this host's own device, if it is such a chip."""
  if not is_here(target.device):
    return None
  here, _ = contestants.present(candidates(args.only), settings)
  base = make_base(settings)
  seconds = steps.time_steps(base, steps.prepare(base, here, tick), args.rounds, lambda _: tick("timing"))
  return {
    "seconds": {name: harness.summarize(values) for name, values in seconds.items()},
    "over_floor": harness.ratios(seconds, FLOOR),
  }


# ----------------------------------------------------------------------------------------------------------------------
# What fits.


def compare_fits(target: Target, settings: Settings, args: argparse.Namespace, tick: Any) -> dict[str, Any]:
  """The largest batch of every contestant."""
  here, absent = contestants.present(candidates(args.only), settings)
  rows: dict[str, Any] = {}
  begin = 1
  for one in here:

    def fits(batch: int, one: Contestant = one) -> bool:
      tick(f"{one.name}, {batch} sequences")
      return step_fits(target, one, settings._replace(batch=batch))

    found = largest(fits, begin)
    rows[one.name] = {"batch": found, "tokens": found * settings.seq}
    begin = 1 << max(0, found.bit_length() - 1)
  parameters = contestants.all_parameters(base_shapes(settings))
  return {"rows": rows, "parameters": parameters, "left_out": absent}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def quantity(value: float | None, unit: str, scale: float) -> str:
  """A figure with its unit."""
  if value is None:
    return "-"
  return f"{value / scale:,.{2 if value < 100 * scale else 0}f} {unit}"


# What tables show of a figure: its name, its unit, and how much that is.
_FIGURES = {
  "tpu": {
    "cycles": ("cycles", "M", 1e6),
    "temp": ("temp", "MB", 1e6),
    "bytes": ("bytes accessed", "GB", 1e9),
    "flops": ("FLOPs", "G", 1e9),
  },
  "gpu": {
    "temp": ("temp", "MB", 1e6),
    "bytes_outside": ("bytes outside of GEMMs", "GB", 1e9),
    "gemms": ("GEMMs", "", 1),  # a count
    "flops": ("their FLOPs", "G", 1e9),
  },
}
_TIMES = {"flops": "FLOPs / peak", "bytes": "bytes / bandwidth", "cycles": "cycles / clock"}


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table of figures, then its rows."""
  shown = _FIGURES[results["chip"]["platform"]]
  times = {name: head for name, head in _TIMES.items() if name != "cycles" or "cycles" in shown}
  heads = [head for title, *_ in shown.values() for head in (title, "/ floor")]
  table = [("method", *heads, *times.values())]
  for name, row in results["rows"].items():
    line = [name]
    for field, (_, unit, scale) in shown.items():
      value = f"{row[field]}" if field == "gemms" else quantity(row[field], unit, scale)
      line += [value, harness.exact_cell(row["over_floor"][field])]
    table.append((*line, *(quantity(row["microseconds"][time], "us", 1) for time in times)))
  return table


def fits_cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table of batches, then its rows."""
  rows = [(name, f"{row['batch']:,}", f"{row['tokens']:,}") for name, row in results["rows"].items()]
  return [("method", "largest batch", "tokens per step"), *rows]


def remarks(results: dict[str, Any]) -> list[str]:
  """What stands below a table: the peers, the run, who is missing."""
  lines = []
  if best := results.get("over_best_peer"):
    figure = "cycles" if results["chip"]["platform"] == "tpu" else "temp bytes"
    reach = f"; to reach: {REACH_PEER:.2f}" if figure == "cycles" else ""
    lines.append(f"jaxlora's {figure} / the best peer's: {best['ratio']:.3f} ({best['peer']}{reach})")
  if run := results.get("run"):
    ratios = [f"{name} {harness.ratio_cell(ratio)}" for name, ratio in run["over_floor"].items()]
    lines.append(f"run on this host's {results['hardware']['device']}, step / floor: {'; '.join(ratios)}")
  else:
    lines.append(f"Nothing was run: this host has no {results['chip']['name']}, and these are no times.")
  return [*lines, *results["left_out"]]


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  head, *rows = fits_cells(results) if results["settings"]["fits"] else cells(results)
  return "\n".join([results["title"], harness.table(head, rows), *remarks(results)])


def tables(results: dict[str, Any]) -> str:
  """A table of benchmarks/README.md: of figures, or of batches."""
  head, *rows = fits_cells(results) if results["settings"]["fits"] else cells(results)
  versions = ", ".join(
    f"{name} {results['versions'][name]}" for name in results["compiler"] if name in results["versions"]
  )
  conditions = f"{results['title']}. jax {results['versions']['jax']}, {versions}."
  return "\n\n".join([conditions, harness.markdown(head, rows), "\n".join(remarks(results))])


def plot(results: dict[str, Any], path: Path) -> None:
  """A panel for each figure that has something to reach, or one of batches."""
  if results["settings"]["fits"]:
    batches = {name: harness.summarize([row["batch"]]) for name, row in results["rows"].items()}
    panels = [harness.Panel(results["title"], "largest batch", batches)]
  else:
    panels = []
    for field, reach in REACH[results["chip"]["platform"]].items():
      ratios = {name: row["over_floor"][field] for name, row in results["rows"].items()}
      known = {name: harness.summarize([ratio]) for name, ratio in ratios.items() if ratio is not None}
      label = f"{_FIGURES[results['chip']['platform']][field][0]} / frozen floor's"
      panels += [harness.Panel("" if panels else results["title"], label, known, reach)] if known else []
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = harness.make_parser(__file__, __doc__, "--chip v5e:2x2 --bf16 --d 1024 --seq 512 --layers 4")
  harness.add_layers(parser)
  add_sizes(parser)
  parser.add_argument("--mixed", action="store_true", help="computation in bfloat16, parameters in float32")
  parser.add_argument("--llama", action="store_true", help="blocks of Llama's shape: seven kernels, gated, no biases")
  parser.add_argument("--chip", choices=list(CHIPS), default="v5e:2x2", help="the chip to compile for")
  parser.add_argument("--fits", action="store_true", help="find the largest batch, of a model of a billion parameters")
  parser.add_argument("--only", type=beginnings, help="contestants whose names begin so: jaxlora,qwix")
  return parser


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
  """The command line; --fits has sizes of its own."""
  parser = make_parser()
  if parser.parse_known_args(argv)[0].fits:
    parser.set_defaults(d=2048, layers=16, seq=2048, vocabulary=32768)
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  harness.rename(parser, args, f"compiled_{'fits_' * args.fits}{'llama_' * args.llama}{CHIPS[args.chip].short}")
  return parser, args


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what compiled.json holds."""
  parser, args = parse(argv)
  settings, chip = Settings.parse(parser, args), CHIPS[args.chip]
  stay_on_the_host()
  try:
    target = Target(chip, device_of(chip))
  except NoCompilerError as error:
    parser.error(str(error))
  count = len(candidates(args.only))
  total = None if args.fits else count + steps.turns(count, args.rounds) * is_here(target.device)
  with harness.progress(total, "step", args.quiet) as bar:
    found = (compare_fits if args.fits else compare)(target, settings, args, harness.ticker(bar))
  size = f"{found['parameters'] / 1e9:.2f} G parameters, " if args.fits else ""
  results = {
    **harness.provenance(args),
    "title": f"{chip.name}, {NOT_RUN}: {size}{settings.title('B' if args.fits else None)}",
    "model": settings._asdict(),
    "chip": {field: getattr(chip, field) for field in ("name", "platform", "flops", "bandwidth", "clock", "memory")},
    "compiler": list(chip.packages),
    **found,
  }
  results["versions"] |= chip.versions()
  harness.publish(args, "compiled", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
