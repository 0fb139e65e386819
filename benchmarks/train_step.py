"""A LoRA step takes little more than the frozen floor; the steps of other libraries take as long as full fine-tuning.

All contestants take the same training step of the same model. Their times are compared, within interleaved rounds of
one run, with those of the frozen floor (forward pass and input gradient, which every trainer needs) and of full
fine-tuning.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import contestants
from contestants import FLOOR, FULL
import harness
import jax
import peers
from settings import Settings, add_sizes, make_base
import steps

PEFT = "PEFT (torch)"
REACH_FLOOR, REACH_FLOOR_VARIANT, REACH_FULL = 1.03, 1.08, 0.70


def suite(settings: Settings) -> list[Settings]:
  """These settings, and the variations for which the same is claimed."""
  sizes = [{"rank": 4 * settings.rank}, {"width": settings.width // 2}]
  changes = [*sizes, {"scan": True}, {"remat": True}, {"bf16": True}]
  return [settings, *(settings._replace(**change) for change in changes)]


def compare(settings: Settings, args: argparse.Namespace, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Compares all contestants at one setting."""
  candidates = [one for one in contestants.contestants() if wanted(one.name, args.only)]
  here, absent = contestants.present(candidates, settings)
  base = make_base(settings)
  entries = steps.prepare(base, here, tick)
  seconds = steps.time_steps(base, entries, args.rounds, lambda _: tick(f"timing {settings.title()}"))
  over_floor, over_full = harness.ratios(seconds, FLOOR), harness.ratios(seconds, FULL)
  rows = {
    name: {
      "over_floor": over_floor[name],
      "over_full": over_full[name],
      "seconds": harness.summarize(seconds[name]),
      "flops": entry.compiled.flops,
      "bytes": entry.compiled.bytes,
      "check": entry.check,
    }
    for name, entry in entries.items()
  }
  comparison = {
    "title": settings.title(),
    "settings": settings._asdict(),
    "control": over_floor[FLOOR + harness.CONTROL],
    "train_state_over_split": train_state_over_split(seconds),
    "rows": rows,
    "left_out": absent,
  }
  if wanted(PEFT, args.only):
    tick("PEFT")
    reason = peft_misfit(settings)
    if reason:
      absent.append(f"{PEFT} is left out: {reason}")
    else:
      comparison["peft"] = peers.run_peft("peft_torch", settings, args.rounds)
      rows[PEFT] = peft_row(comparison["peft"])
  return comparison


def train_state_over_split(seconds: dict[str, list[float]]) -> dict[str, Any] | None:
  """The time of the `TrainState` flow over that of the `split` flow, if both ran."""
  split, train_state = "jaxlora", "jaxlora, TrainState"
  return harness.ratios(seconds, split)[train_state] if split in seconds and train_state in seconds else None


def wanted(name: str, only: Sequence[str] | None) -> bool:
  """Whether `--only` includes a contestant; the floor and full fine-tuning are always included."""
  return not only or name in (FLOOR, FULL) or any(name.startswith(start) for start in only)


def peft_misfit(settings: Settings) -> str | None:
  """Why PEFT cannot run at these settings, or None."""
  if not (harness.installed("torch") and harness.installed("peft")):
    return "torch and peft are not installed; the extra `peers` brings them: pip install 'jaxlora[peers]'"
  if settings.scan or settings.remat:
    return "its model is neither scanned nor remat"
  if jax.default_backend() != "cpu":
    return "it runs on the CPU alone"
  return None


def peft_row(results: dict[str, Any]) -> dict[str, Any]:
  """PEFT's row: its ratios are to torch's own floor and full fine-tuning."""
  values = {field: results[field]["PEFT"] for field in ("over_floor", "over_full", "seconds")}
  return {**values, "flops": None, "bytes": None, "check": results["check"]}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(comparison: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of one setting's table, then its rows."""
  rows: list[tuple[str, ...]] = [("method", "step / floor", "step / full", "time", "FLOPs", "temp")]
  for name, row in comparison["rows"].items():
    flops = "-" if row["flops"] is None else f"{row['flops'] / 1e9:.2f} G"
    temp = "-" if row["bytes"] is None else f"{row['bytes']['temp'] / 1e6:,.0f} MB"
    ratios = (harness.ratio_cell(row[field]) for field in ("over_floor", "over_full"))
    rows.append((name, *ratios, harness.milliseconds(row["seconds"]), flops, temp))
  return rows


def describe(comparison: dict[str, Any]) -> str:
  """One setting's table, for a terminal."""
  head, *rows = cells(comparison)
  lines = [comparison["title"], harness.table(head, rows)]
  lines.append(f"A/A control (the floor again / the floor): {harness.ratio_cell(comparison['control'])}")
  if comparison["train_state_over_split"]:
    lines.append(f"TrainState / split: {harness.ratio_cell(comparison['train_state_over_split'])}")
  return "\n".join([*lines, *comparison["left_out"]])


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md: all contestants at the first setting."""
  comparison = results["comparisons"][0]
  head, *rows = cells(comparison)
  lines = (
    f"{comparison['title']}; {results['settings']['rounds']} rounds, medians (min-max);"
    f" the A/A control is {harness.ratio_cell(comparison['control'])}.",
    f"{harness.conditions(results, 'qwix', 'peft', 'torch')}. PEFT's ratios are to torch's own floor and full"
    " fine-tuning.",
  )
  return "\n".join([*lines, "", harness.markdown(head, rows)])


def suite_table(results: dict[str, Any]) -> str:
  """The suite's table in benchmarks/README.md: jaxlora at every setting."""
  first = results["comparisons"][0]["settings"]
  rows = []
  for comparison in results["comparisons"]:
    ours, floor = (comparison["rows"][name] for name in ("jaxlora", FLOOR))
    cells = (
      *(harness.ratio_cell(ours[field]) for field in ("over_floor", "over_full")),
      f"{ours['bytes']['temp'] / floor['bytes']['temp']:.2f}",
      *(harness.ratio_cell(comparison[field]) for field in ("control", "train_state_over_split")),
    )
    rows.append((setting_name(comparison["settings"], first), *cells))
  head = ("setting", "step / floor", "step / full", "temp / floor", "A/A control", "`TrainState` / `split`")
  rounds = f"{results['settings']['rounds']} rounds each. {harness.conditions(results)}."
  return f"{rounds}\n\n{harness.markdown(head, rows)}"


def setting_name(settings: dict[str, Any], first: dict[str, Any]) -> str:
  """The name of a setting of the suite: where it differs from the first."""
  names = {"rank": f"rank {settings['rank']}", "width": f"d={settings['width']}"}
  names |= {"scan": "scanned", "remat": "remat", "bf16": "bf16"}
  changed = [name for field, name in names.items() if settings[field] != first[field]]
  return ", ".join(changed or [names["rank"]])


def brief(results: dict[str, Any]) -> str:
  """The table of docs/numbers.md."""
  rows = [
    (
      name,
      *(f"{row[field]['median']:.2f}" for field in ("over_floor", "over_full")),
      "-" if row["bytes"] is None else f"{row['bytes']['temp'] / 1e6:,.0f} MB",
    )
    for name, row in results["comparisons"][0]["rows"].items()
  ]
  return harness.markdown(("", "step / floor", "step / full fine-tuning", "temp memory"), rows)


_CHIPS = {"v5e": "TPU v5e", "h100": "H100"}


def door(measured: dict[str, Any], *compiled: dict[str, Any]) -> str:
  """The table of README.md: a step measured here, and steps compiled for chips, each over its frozen floor."""
  steps = measured["comparisons"][0]["rows"]
  shown = ("full fine-tuning", "textbook merge", "qwix", "nnx.LoRA", "jaxlora")
  here = f"{measured['hardware']['cores']} CPU cores"
  temp = lambda row: row["bytes"]["temp"] / steps[FLOOR]["bytes"]["temp"]
  rows = [
    (f"{here}, **measured**: time", *(f"{steps[name]['over_floor']['median']:.2f}" for name in shown)),
    (f"{here}, compiled: temporary memory", *(f"{temp(steps[name]):.2f}" for name in shown)),
  ]
  for chip in compiled:
    name = chip["chip"]["name"].partition(":")[0]
    figures = {"cycles": "cycles, the compiler's estimate", "temp": "temporary memory"}
    for field, title in figures.items():
      if field in chip["rows"][FLOOR]:
        ratios = (f"{chip['rows'][method]['over_floor'][field]:.2f}" for method in shown)
        rows.append((f"{_CHIPS[name]}, **compiled, not run**: {title}", *ratios))
  return harness.markdown(("a training step / the frozen floor", *shown), rows)


def brief_suite(results: dict[str, Any]) -> str:
  """The sentence of docs/numbers.md on the other settings."""
  first, *others = results["comparisons"]
  found = [
    f"{setting_name(one['settings'], first['settings'])} {one['rows']['jaxlora']['over_floor']['median']:.2f}"
    for one in others
  ]
  return f"Other settings over their floors: {', '.join(found)}."


def plot(results: dict[str, Any], path: Path) -> None:
  """A panel for each setting, and one for the ratio to full fine-tuning."""
  panels = []
  for number, comparison in enumerate(results["comparisons"]):
    over_floor, over_full = (
      {name: row[field] for name, row in comparison["rows"].items()} for field in ("over_floor", "over_full")
    )
    reach = REACH_FLOOR_VARIANT if number else REACH_FLOOR
    panels.append(harness.Panel(comparison["title"], "step time / frozen floor", over_floor, reach))
    if not number:
      panels.append(harness.Panel(comparison["title"], "step time / full fine-tuning", over_full, REACH_FULL))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def names() -> list[str]:
  """Names of all contestants, installed or not."""
  return [*(one.name for one in contestants.contestants()), PEFT]


def beginnings(text: str) -> list[str]:
  """A parser of beginnings of names, separated by commas."""
  for start in text.split(","):
    if not any(name.startswith(start) for name in names()):
      raise argparse.ArgumentTypeError(f"no contestant begins with {start!r}; there are: {'; '.join(names())}")
  return text.split(",")


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = harness.make_parser(__file__, __doc__, "--suite")
  harness.add_layers(parser)
  add_sizes(parser)
  parser.add_argument("--suite", action="store_true", help="also 4 x the rank, d / 2, scanned, remat, and bf16")
  parser.add_argument("--only", type=beginnings, help="contestants whose names begin so: jaxlora,qwix")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what train_step.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  if args.suite:
    harness.rename(parser, args, "train_step_suite")
  settings = Settings.parse(parser, args)
  everything = suite(settings) if args.suite else [settings]
  for one in everything:
    Settings.parse(parser, args, **one._asdict())
  count = sum(wanted(name, args.only) for name in names())
  with harness.progress(len(everything) * steps.turns(count, args.rounds), "turn", args.quiet) as bar:
    comparisons = [compare(one, args, harness.ticker(bar)) for one in everything]
  results = {**harness.provenance(args), "comparisons": comparisons}
  harness.publish(args, "train_step", results, plot)
  print("\n\n".join(map(describe, comparisons)))
  return results


if __name__ == "__main__":
  main()
