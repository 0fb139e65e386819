"""Models of 8B, 70B and 400B parameters on slices of TPUs: whether a step fits, and what it costs at least.

LoRA on bfloat16, LoRA on nf4 codes with double quantisation (QLoRA) and full fine-tuning, with AdamW. Parameters are
fully sharded over all chips, experts along an axis of their own; blocks are scanned and recomputed. Every step is
compiled by the TPU's own compiler for the whole slice, from shapes and shardings alone: nothing is run, no array made.

Tokens per second are a bound and no measurement: a step takes at least its FLOPs at the chip's peak, and at least what
a chip receives in collectives over all its links in one direction. The compiler's own estimate of its cycles knows of
no collective; it is shown as seconds where the chip's clock is public.

Compiling takes minutes for each step, at any depth. Finished steps are kept, and an interrupted run goes on. At level
O1 the compiler fuses and searches little, and is done in a minute or two: its cycles are many times too high there, and
its bytes may be, against its own level (UNKNOWN), which takes many times as long.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
import contextlib
from pathlib import Path
from typing import Any

from ahead import refused
from chips import CHIPS, Chip, NoCompilerError, devices_of, slice_of, stay_on_the_host
import harness
import hlo
import jax
from models_large import Shape
import scaling_steps
from scaling_steps import METHODS, MODELS

GIB = 1 << 30
HOST = "cpu"  # the host's own devices in the place of a slice: a try of the script
TOPOLOGIES = ("v5e:4x4", "v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:8x8x16")
SIZES = ("argument", "temp", "output", "alias")
LARGE = [name for name in MODELS if not name.startswith("tiny")]


def chip_of(topology: str) -> Chip:
  """The chip of a topology; the host counts as one that says nothing."""
  if topology == HOST:
    return Chip(HOST, "cpu", "cpu", {}, (), "bench", 1e12, 1e11, links=1e9)
  generation, _, shape = topology.partition(":")
  (chip,) = (chip for chip in CHIPS.values() if chip.short == generation)
  return slice_of(chip, shape)


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def measure(chip: Chip, devices: Sequence[Any], shape: Shape, method: str, args: argparse.Namespace) -> dict[str, Any]:
  """What the compiler says of one step, for each chip: its figures, or by how much it does not fit."""
  mesh = scaling_steps.mesh_of(devices, shape)
  step = scaling_steps.step_of(shape, method, mesh, args.seq, args.sequences, args.rank)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(scaling_steps.parameters(shape, mesh)))
  facts = {"chips": mesh.size, "parameters": parameters, "tokens": mesh.size * args.sequences * args.seq}
  try:
    compiled = scaling_steps.compiled(step, chip.lowered_for)
  except jax.errors.JaxRuntimeError as error:
    return {**facts, "fits": False, **refused(error)}
  text, memory = compiled.as_text(), compiled.memory_analysis()
  return {
    **facts,
    "fits": True,
    "bytes": {name: getattr(memory, f"{name}_size_in_bytes") for name in SIZES},
    "flops": hlo.product_flops(text, shape.steps),
    "cycles": hlo.cycles(text, shape.steps),
    "sent": dict(hlo.communicated(text, shape.steps)),
  }


def seconds(row: dict[str, Any], chip: Chip) -> dict[str, float]:
  """The least time of a step by what it computes and by what it receives, and by the cycles where they say one."""
  assert chip.links is not None
  least = {"FLOPs": row["flops"] / chip.flops, "links": sum(row["sent"].values()) / chip.links}
  return least | ({"cycles": row["cycles"] / chip.clock} if chip.clock and row["cycles"] else {})


def compare(args: argparse.Namespace, tick: Callable[[str], Any]) -> list[dict[str, Any]]:
  """A row for each topology, model and method; finished ones are read again."""
  runs, rows = harness.Runs(args.out / "runs.json", args.fresh), []
  folder = Path(__file__).parent
  source = harness.source_digest(*(folder / f"{name}.py" for name in ("scaling_steps", "models_large", "hlo")))
  for topology in args.topology:
    chip, devices = chip_of(topology), None
    for model in args.model:
      for method in args.method:
        what = f"{topology}, {model}, {method}"
        shape = MODELS[model]._replace(**({"layers": args.layers} if args.layers else {}))
        options = [what, shape, args.seq, args.sequences, args.rank, args.level]
        key = harness.digest([options, harness.versions(), chip.versions(), source])
        if args.finished and key not in runs.found:
          continue
        tick(what)
        devices = devices or ([] if key in runs.found else jax.devices() if topology == HOST else devices_of(chip))
        run = lambda chip=chip, devices=devices, shape=shape, method=method: measure(chip, devices, shape, method, args)
        found = runs.result(key, run, lambda: None)
        row = {"topology": topology, "model": model, "method": method, **found}
        rows.append(row | ({"seconds": seconds(row, chip)} if row["fits"] else {}))
  return rows


# ----------------------------------------------------------------------------------------------------------------------
# Results.

HEAD = ("slice", "model", "trained by", "in all", "arguments", "TFLOPs", "received", "FLOPs / peak", "received / links")
HEAD = (*HEAD, "cycles / clock", "tokens/s at most", "a chip")


def total(row: dict[str, Any]) -> int:
  """Bytes that a chip holds at once; a result that overwrites an argument is one array."""
  sizes = row["bytes"]
  return sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]


def at_most(row: dict[str, Any]) -> float:
  """Tokens per second of the slice, if nothing took longer than it must."""
  return row["tokens"] / max(row["seconds"][name] for name in ("FLOPs", "links"))


def line(row: dict[str, Any]) -> tuple[str, ...]:
  """A row of the table."""
  names = (row["topology"], row["model"], row["method"])
  if not row["fits"]:
    needs = f"needs {row['needs']:.2f} G" if row["needs"] else "does not fit"
    return (*names, needs, *["-"] * (len(HEAD) - 4))
  figures = (f"{total(row) / GIB:.2f} G", f"{row['bytes']['argument'] / GIB:.2f} G", f"{row['flops'] / 1e12:,.1f}")
  times = [f"{row['seconds'][name]:.2f} s" if name in row["seconds"] else "-" for name in ("FLOPs", "links", "cycles")]
  rates = (f"{at_most(row):,.0f}", f"{at_most(row) / row['chips']:,.0f}")
  return (*names, *figures, f"{sum(row['sent'].values()) / 1e9:,.1f} GB", *times, *rates)


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  return [HEAD, *map(line, results["rows"])]


def title(results: dict[str, Any]) -> str:
  """What was compiled, and that nothing was run."""
  options = results["settings"]
  sizes = {row["model"]: row["parameters"] for row in results["rows"]}
  models = ", ".join(f"{name} {size / 1e9:.1f} G" for name, size in sizes.items())
  return (
    f"Compiled, not run, for each chip; {options['sequences']} x {options['seq']} tokens a chip, rank"
    f" {options['rank']}, scanned, remat, bf16; parameters: {models}; the compiler's level {options['level']}"
  )


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(title(results), cells(results))


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("jax", "flax", "libtpu"))
  return harness.documented(f"{title(results)}. {versions}. G: 2^30 bytes.", cells(results))


def plot(results: dict[str, Any], path: Path) -> None:
  """What a chip holds in each step, a panel for each slice."""
  panels = []
  for topology in dict.fromkeys(row["topology"] for row in results["rows"]):
    rows = [row for row in results["rows"] if row["topology"] == topology]
    needs = {f"{row['model']}, {row['method']}": total(row) / GIB if row["fits"] else row["needs"] for row in rows}
    sizes = {name: harness.summarize([size]) for name, size in needs.items() if size}
    if sizes:
      panels.append(harness.Panel(topology, "GiB that a chip needs", sizes, results["memory"].get(topology)))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.

MEMORY = {"v5e": 15.75, "v6e": 31.25, "v5p": 95.74}  # GiB of which the compiler makes use
LEVELS = ("UNKNOWN", "O0", "O1", "O2", "O3")


def parse(argv: Sequence[str] | None) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
  """The command line."""
  parser = harness.make_parser(__file__, __doc__, "--topology v5e:16x16 --model 70B --method LoRA")
  several = lambda name, known, text: parser.add_argument(
    f"--{name}", action="append", choices=known, help=f"{text}; several by several options, all unless given"
  )
  several("topology", [*TOPOLOGIES, "v5e:2x2", HOST], "the slice to compile for")
  several("model", list(MODELS), "the model")
  several("method", list(METHODS), "how it is trained")
  count = harness.positive(int)
  parser.add_argument("--layers", type=count, help="blocks, in the place of the model's own number")
  for name, value in (("seq", 2048), ("sequences", 1), ("rank", 16)):
    parser.add_argument(f"--{name}", type=count, default=value, help=f"{name} of the step, for each chip")
  parser.add_argument("--level", choices=LEVELS, default="O1", help="how hard the compiler tries; UNKNOWN is its own")
  parser.add_argument("--fresh", action="store_true", help="compile finished steps again")
  parser.add_argument("--finished", action="store_true", help="compile nothing: a table of the steps that are finished")
  args = harness.parse(parser, argv, topology=["v5e:2x2"], model=["tiny"], method=["LoRA"], seq=128)
  args.topology, args.model = args.topology or list(TOPOLOGIES), args.model or LARGE
  args.method = args.method or list(METHODS)
  return parser, args


@contextlib.contextmanager
def at_level(level: str) -> Iterator[None]:
  """Programs are compiled at one of XLA's levels."""
  before = jax.config.jax_optimization_level
  jax.config.update("jax_optimization_level", level)
  try:
    yield
  finally:
    jax.config.update("jax_optimization_level", before)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Compiles the steps; returns what scaling.json holds."""
  parser, args = parse(argv)
  stay_on_the_host()
  count = len(args.topology) * len(args.model) * len(args.method)
  try:
    with harness.progress(count, "step", args.quiet) as bar, at_level(args.level):
      rows = compare(args, harness.ticker(bar))
  except NoCompilerError as error:
    parser.error(str(error))
  except KeyboardInterrupt:
    harness.say_interrupted(args.out / "runs.json")
  memory = {name: MEMORY[short] for name in args.topology if (short := name.partition(":")[0]) in MEMORY}
  results = {**harness.provenance(args), "rows": rows, "memory": memory}
  for topology in args.topology:
    results["versions"] |= chip_of(topology).versions()
  harness.publish(args, "scaling", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
