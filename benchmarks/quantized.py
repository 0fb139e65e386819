"""A training step on a base of 4 or 8 bits takes the float base's time, and less memory than it.

Compared are LoRA steps of one model: on its floats, and on its kernels in every format. XLA's figures of the compiled
step are exact: arguments (the base is most of them), and temporary bytes over the float base's. Times are measured in
interleaved rounds, over the float base's. The error of a format is that of its kernels by Frobenius' norm, the largest
of all, and that of the logits of the batch.

qwix' own LoRA on its own codes is beside them where it is installed; it cuts no tiles out of stacked kernels (--scan).

With --chip the steps are compiled for a chip instead, from shapes alone, and nothing is run: what its compiler says of
memory, and, of a TPU, its estimate of cycles.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ahead import Target, compile_for, figures
from chips import CHIPS, NoCompilerError, device_of, stay_on_the_host
import contestants
from contestants import Contestant, Program
import harness
import jax
import jax.numpy as jnp
import models
import quantized_peers
from settings import Base, Settings, add_sizes, base_shapes, make_base
import steps

import jaxlora

FLOATS = "float base"
# At most: a step's time, and its temporary and its argument bytes together, over the float base's.
REACH_TIME, REACH_MEMORY = 1.08, 1.00


class Format(NamedTuple):
  """A row: a format, and how its scales are kept."""

  name: str
  format: str
  block_size: int | None = 64
  double: bool = False

  def program(self, base: Base) -> Program:
    """The program of a step on the base in codes."""
    return contestants.jaxlora_split(base._replace(params=self.params(base)))

  def params(self, base: Base) -> Any:
    """The parameters with the adapted kernels in codes."""
    probe = lambda params: base.model.apply({"params": params}, base.batch.x)
    options = {"block_size": self.block_size, "double": self.double, "targets": models.TARGETS, "probe": probe}
    return jaxlora.quantize(base.params, self.format, **options)


class Qwix(NamedTuple):
  """A row: Google's qwix, tiles of 64."""

  name: str
  format: str

  def program(self, base: Base) -> Program:
    """The program of a step of its LoRA on its codes."""
    return quantized_peers.qwix_step(self.format, base)

  def params(self, base: Base) -> Any:
    """The parameters in its codes, as this library reads them."""
    return jaxlora.quant.from_qwix(quantized_peers.qwix_model(base, self.format)[1])


FORMATS = (
  Format("nf4", "nf4"),
  Format("nf4, double", "nf4", double=True),
  Format("int4", "int4"),
  Format("q4_0", "q4_0"),
  Format("int8, blocks of 64", "int8"),
  Format("int8, per output", "int8", None),
  Format("fp8, per output", "fp8", None),
)
Row = Format | Qwix
PEERS = (Qwix("qwix, nf4", "nf4"), Qwix("qwix, int8", "int8"))


def named(text: str) -> list[str]:
  """The names of the formats that begin with one of some words."""
  names = [row.name for row in (*FORMATS, *PEERS)]
  found = [name for name in names if name.startswith(tuple(text.split("|")))]
  if not found:
    raise argparse.ArgumentTypeError(f"{text!r} begins no format; expected some of {names}")
  return found


def chosen(args: argparse.Namespace) -> list[Row]:
  """The formats that were asked for; qwix' where it is installed, on one device's layers that are not stacked."""
  peers = PEERS if harness.installed("qwix") and not args.scan and args.chip is None else ()
  return [row for row in (*FORMATS, *peers) if row.name in args.formats]


def candidates(rows: Sequence[Row]) -> list[Contestant]:
  """The float base's step, then one for each format."""
  floats = Contestant(FLOATS, contestants.jaxlora_split, contestants.factor_parameters)
  codes = [Contestant(row.name, row.program, contestants.factor_parameters) for row in rows]
  return [floats, *codes]


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def errors(base: Base, row: Row) -> dict[str, float]:
  """What a format takes for each kernel's element, and what it loses."""
  codes = row.params(base)
  floats = jaxlora.dequantize(codes)
  is_codes = lambda node: isinstance(node, jaxlora.QuantizedArray)
  nodes = jax.tree.leaves(codes, is_leaf=is_codes)
  kernels = [k for k, node in enumerate(nodes) if is_codes(node)]
  bits = [sum(leaf.size * bits_of(leaf.dtype) for leaf in jax.tree.leaves(nodes[k])) / nodes[k].size for k in kernels]
  pairs = [(jax.tree.leaves(base.params)[k], jax.tree.leaves(floats)[k]) for k in kernels]
  logits = [base.model.apply({"params": params}, base.batch.x) for params in (base.params, floats)]
  return {
    "bytes_per_parameter": sum(bits) / len(bits) / 8,
    "kernel_error": max(relative_error(*pair) for pair in pairs),
    "output_error": relative_error(*logits),
  }


def bits_of(dtype: Any) -> int:
  return (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits


def relative_error(before: jax.Array, after: jax.Array) -> float:
  """`||before - after|| / ||before||`."""
  before, after = (x.astype(jnp.float32).ravel() for x in (before, after))
  return float(jnp.linalg.norm(before - after) / jnp.linalg.norm(before))


def prepare(base: Base, formats: Sequence[Row], tick: Callable[[str], Any]) -> dict[str, steps.Compiled]:
  """Compiles all candidates, and checks that each starts where the floats that its codes stand for do, and trains."""
  values = {FLOATS: base.params} | {row.name: jaxlora.dequantize(row.params(base)) for row in formats}
  entries = {}
  for one in candidates(formats):
    tick(f"compiling {one.name}")
    entries[one.name] = steps.compile_step(one.build(base), base)
    steps.check_trains(one, entries[one.name], base._replace(params=values[one.name]))
  return entries


def compare(settings: Settings, args: argparse.Namespace, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Compiled figures, times and errors of all formats."""
  base = make_base(settings)
  entries = prepare(base, chosen(args), tick)
  runs = {name: steps.runner(compiled, base.batch) for name, compiled in entries.items()}
  runs = harness.with_control(runs, FLOATS, steps.runner(entries[FLOATS], base.batch))
  seconds = harness.interleave(runs, args.rounds, harness.calls_per_turn(runs), lambda calls: tick("timing"))
  over_floats = harness.ratios(seconds, FLOATS)
  lost = {row.name: errors(base, row) for row in chosen(args)}
  rows = {}
  for name, compiled in entries.items():
    rows[name] = {
      "bytes": compiled.bytes,
      "over_floats": over_floats[name],
      "seconds": harness.summarize(seconds[name]),
      **lost.get(name, {"bytes_per_parameter": None, "kernel_error": 0.0, "output_error": 0.0}),
    }
  return {"rows": with_memory(rows), "control": over_floats[FLOATS + harness.CONTROL], "chip": None}


def compare_for(
  target: Target, settings: Settings, formats: Sequence[Row], tick: Callable[[str], Any]
) -> dict[str, Any]:
  """What a chip's compiler says of all formats; nothing is run."""
  base, rows = base_shapes(settings), {}
  for one in candidates(formats):
    tick(f"compiling {one.name}")
    compiled = compile_for(target, one, base)
    memory = compiled.memory_analysis()
    sizes = {"temp": memory.temp_size_in_bytes, "argument": memory.argument_size_in_bytes}
    rows[one.name] = {"bytes": sizes, "cycles": figures(compiled, target.chip, settings).get("cycles")}
  cycles = rows[FLOATS]["cycles"]
  for row in rows.values():
    row["cycles_over_floats"] = row["cycles"] / cycles if cycles else None
  return {"rows": with_memory(rows), "chip": {"name": target.chip.name, "platform": target.chip.platform}}


def with_memory(rows: dict[str, Any]) -> dict[str, Any]:
  """The rows with their bytes over the float base's."""
  floats = rows[FLOATS]["bytes"]
  for row in rows.values():
    row["temp_over_floats"] = row["bytes"]["temp"] / floats["temp"]
    row["memory_over_floats"] = sum(row["bytes"][k] for k in ("temp", "argument")) / (
      floats["temp"] + floats["argument"]
    )
  return rows


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  sizes = ("arguments", "temp", "temp / floats", "together / floats")
  more = ("cycles / floats",) if results["chip"] else ("step / floats", "time", "B / parameter", "kernels", "logits")
  table: list[tuple[str, ...]] = [("base", *sizes, *more)]
  for name, row in results["rows"].items():
    line = [name, *(f"{row['bytes'][k] / 1e6:,.1f} MB" for k in ("argument", "temp"))]
    line += [harness.exact_cell(row["temp_over_floats"]), harness.exact_cell(row["memory_over_floats"])]
    if results["chip"]:
      line.append(harness.exact_cell(row["cycles_over_floats"]))
    else:
      line += [harness.ratio_cell(row["over_floats"]), harness.milliseconds(row["seconds"])]
      line += [
        "-" if row[k] is None else f"{row[k]:.4f}" for k in ("bytes_per_parameter", "kernel_error", "output_error")
      ]
    table.append(tuple(line))
  return table


def remark(results: dict[str, Any]) -> str:
  """What stands below the table."""
  if results["chip"]:
    return f"Compiled for {results['chip']['name']}, not run: these are no times."
  return f"A/A control (the float base again / the float base): {harness.ratio_cell(results['control'])}"


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(results["title"], cells(results), remark(results))


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  conditions = f"{results['title']}. {harness.conditions(results, 'qwix')}."
  return harness.documented(conditions, cells(results), remark(results))


def plot(results: dict[str, Any], path: Any) -> None:
  """Memory and times over the float base's."""
  rows = results["rows"]
  memory = {name: harness.summarize([row["memory_over_floats"]]) for name, row in rows.items()}
  panels = [harness.Panel(results["title"], "arguments + temp / float base's", memory, REACH_MEMORY)]
  if not results["chip"]:
    times = {name: row["over_floats"] for name, row in rows.items()}
    panels.append(harness.Panel("", "step time / float base's", times, REACH_TIME))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what quantized.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--scan --remat")
  harness.add_layers(parser)
  add_sizes(parser)
  names = [row.name for row in (*FORMATS, *PEERS)]
  parser.add_argument("--only", dest="formats", type=named, default=names, help="formats that begin so: nf4|int8")
  parser.add_argument("--chip", choices=list(CHIPS), help="compile for this chip, and run nothing")
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  settings = Settings.parse(parser, args)
  kinds = [CHIPS[args.chip].short if args.chip else "", "scanned" * args.scan, "remat" * args.remat]
  if any(kinds):
    harness.rename(parser, args, "_".join(filter(None, ["quantized", *kinds])))
  count = len(candidates(chosen(args)))
  if args.chip is None:
    with harness.progress(steps.turns(count, args.rounds), "turn", args.quiet) as bar:
      found = compare(settings, args, harness.ticker(bar))
  else:
    stay_on_the_host()
    try:
      target = Target(CHIPS[args.chip], device_of(CHIPS[args.chip]))
    except NoCompilerError as error:
      parser.error(str(error))
    with harness.progress(count, "step", args.quiet) as bar:
      found = compare_for(target, settings, chosen(args), harness.ticker(bar))
  results = {**harness.provenance(args), "title": settings.title(), "model": settings._asdict(), **found}
  harness.publish(args, "quantized", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
