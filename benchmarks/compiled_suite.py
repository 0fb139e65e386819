"""What a TPU's compiler makes of the training steps in every setting, of every generation: compiled, not run.

The figures are those of compiled.py, cycles and temporary bytes over the frozen floor's, of each contestant. Finished
ones are kept in --out, so that an interrupted run goes on where it was.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import ahead
from ahead import Target, compile_for, figures
import chips
from chips import CHIPS, NoCompilerError, device_of, stay_on_the_host
from compiled import NOT_RUN, REACH
import contestants
from contestants import FLOOR, FULL
import harness
import hlo
import models
import settings as sizes
from settings import Settings, base_shapes

SOURCES = (ahead, chips, contestants, hlo, models, sizes)
SHOWN = (FULL, "qwix", "nnx.LoRA", "jaxlora")


class Setting(NamedTuple):
  """One row: a name, and how its sizes differ from d=1024, 8 x 512 tokens, rank 8, bf16."""

  name: str
  changes: dict[str, Any]


SETTINGS = (
  Setting("4 layers, scanned, remat", {"layers": 4, "scan": True, "remat": True}),
  Setting("4 layers, scanned", {"layers": 4, "scan": True}),
  Setting("4 layers, scanned, remat, rank 64", {"layers": 4, "scan": True, "remat": True, "rank": 64}),
  Setting("4 layers, scanned, rank 64", {"layers": 4, "scan": True, "rank": 64}),
  Setting("4 layers, scanned, remat, rank 16", {"layers": 4, "scan": True, "remat": True, "rank": 16}),
  Setting("2 layers", {}),
  Setting("2 layers, d=2048", {"width": 2048}),
  Setting("2 layers, rank 64", {"rank": 64}),
  Setting("2 layers, bf16 on float32 parameters", {"bf16": False, "mixed": True}),
)
# Every setting of a v5e, and rank 8 with 2 and 4 layers on the others.
_FEW = tuple(row for row in SETTINGS if row.name in ("4 layers, scanned, remat", "4 layers, scanned", "2 layers"))
ROWS = {"v5e:2x2": SETTINGS, "v5p:2x2x1": _FEW, "v6e:2x2": _FEW}


def settings_of(row: Setting) -> Settings:
  """The sizes of a row."""
  return Settings(**({"width": 1024, "layers": 2, "batch": 8, "seq": 512, "bf16": True} | row.changes))


def figures_of(target: Target, row: Setting, name: str) -> dict[str, Any] | None:
  """One contestant's figures; none where it does not support the setting or is not installed."""
  settings = settings_of(row)
  everybody = [one for one in contestants.contestants() if one.name == name]
  here, _ = contestants.present(everybody, settings)
  if not here:
    return None
  found = figures(compile_for(target, here[0], base_shapes(settings)), target.chip, settings)
  return {field: found[field] for field in ("cycles", "temp")}


def compare(args: argparse.Namespace, bar: Any) -> dict[str, dict[str, Any]]:
  """The figures by chip and setting, then by contestant."""
  kept = harness.Runs(args.out / "runs.json", args.fresh)
  source = harness.source_digest(*(Path(module.__file__) for module in SOURCES))
  found: dict[str, dict[str, Any]] = {}
  for chip in args.chips:
    target = Target(CHIPS[chip], device_of(CHIPS[chip]))
    for row in ROWS[chip]:
      for name in (FLOOR, *args.only):
        bar.set_description(f"{chip}, {row.name}: {name}")
        versions = harness.versions(*harness.PEERS) | CHIPS[chip].versions()
        key = harness.digest({"chip": chip, **settings_of(row)._asdict(), "of": name, "in": [source, versions]})
        figures = kept.result(
          key, lambda row=row, name=name, target=target: figures_of(target, row, name), lambda: None
        )
        bar.update(1)
        found.setdefault(chip, {}).setdefault(row.name, {})[name] = figures
  return found


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def ratio(row: dict[str, Any], name: str, field: str) -> float | None:
  """A contestant's figure over the floor's; none where it was not compiled, or where the floor holds nothing."""
  return row[name][field] / row[FLOOR][field] if row.get(name) and row[FLOOR][field] else None


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  names = [name for name in SHOWN if name in results["settings"]["only"]]
  cell = lambda value: "-" if value is None else f"{value:.3f}"
  table = [("chip", "setting", "floor", *names, *(f"{name}, temp" for name in names))]
  for chip, rows in results["rows"].items():
    for setting, row in rows.items():
      figures = [cell(ratio(row, name, field)) for field in ("cycles", "temp") for name in names]
      table.append((chip.partition(":")[0], setting, f"{row[FLOOR]['cycles'] / 1e6:.2f} M", *figures))
  return table


TITLE = f"{NOT_RUN}: cycles, then temporary bytes, over the frozen floor's; d=1024, 8 x 512 tokens, rank 8, bf16"


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(TITLE, cells(results))


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("jax", "flax", "qwix", "libtpu"))
  return harness.documented(f"{TITLE[0].upper()}{TITLE[1:]}. {versions}.", cells(results))


def plot(results: dict[str, Any], path: Path) -> None:
  """A panel for each contestant's cycles."""
  panels = []
  for name in results["settings"]["only"]:
    named = {
      f"{chip}, {setting}": ratio(row, name, "cycles")
      for chip, rows in results["rows"].items()
      for setting, row in rows.items()
    }
    values = {place: harness.summarize([value]) for place, value in named.items() if value is not None}
    reach = REACH["tpu"]["cycles"] if name == "jaxlora" else None
    panels += [harness.Panel(name, "cycles / frozen floor's", values, reach)] if values else []
  harness.plot_bars(panels, path)


def chosen(text: str) -> list[str]:
  """A parser of contestants."""
  names = text.split(",")
  if unknown := [name for name in names if name not in SHOWN]:
    raise argparse.ArgumentTypeError(f"no contestant {unknown[0]!r}; there are: {', '.join(SHOWN)}")
  return names


def chips_of(text: str) -> list[str]:
  """A parser of chips."""
  found = [name for word in text.split(",") for name in ROWS if name.startswith(word)]
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r} begins no chip; there are: {', '.join(ROWS)}")
  return found


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Compiles all steps; returns what compiled_suite.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--chips v5e,v5p")
  parser.add_argument("--chips", type=chips_of, default=list(ROWS), help="chips whose names begin so: v5e,v5p")
  parser.add_argument("--only", type=chosen, default=list(SHOWN), help="contestants beside the floor: qwix,jaxlora")
  parser.add_argument("--fresh", action="store_true", help="compile again what is kept in --out")
  args = parser.parse_args(argv)
  stay_on_the_host()
  count = sum(len(ROWS[chip]) for chip in args.chips) * (1 + len(args.only))
  try:
    with harness.progress(count, "step", args.quiet) as bar:
      rows = compare(args, bar)
  except NoCompilerError as error:
    parser.error(str(error))
  except KeyboardInterrupt:
    harness.say_interrupted(args.out / "runs.json")
  results = {**harness.provenance(args), "rows": rows}
  results["versions"] |= CHIPS[args.chips[0]].versions()
  harness.publish(args, "compiled_suite", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
