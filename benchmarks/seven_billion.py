"""A LoRA step of a 7B model on one TPU v5e: on codes of 4 or 8 bits it fits into the chip's memory with room to spare.

The model has Llama's shape: 32 blocks of width 4096, 32 heads, a gated MLP of 11008, a vocabulary of 32,000; scanned,
recomputed, in bfloat16. LoRA is on all seven kernels of a block; embedding and head are in bfloat16 in every row. Every
step is compiled for the chip from shapes alone. Nothing is run, and no array is made: whether a step fits is what the
compiler says, which refuses what does not.
"""

import argparse
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from ahead import Target, compile_for, largest, refused
from chips import CHIPS, NoCompilerError, device_of, stay_on_the_host
import contestants
from contestants import FULL, Contestant
import harness
import jax
import jax.numpy as jnp
from models_llama import Llama
from quantized import FLOATS, FORMATS, candidates
from settings import Base, Batch, Settings

GIB = 1 << 30
MEMORY = 15.75  # GiB of a v5e, of which its compiler makes use
FIELDS = ("argument", "temp", "output", "alias")


class Sizes(NamedTuple):
  """What a Llama is made of."""

  layers: int
  width: int
  heads: int
  hidden: int
  vocabulary: int
  matrices: bool


def base_of(sizes: Sizes, settings: Settings) -> Base:
  """The model with shapes in the place of its parameters and of the batch."""
  model = Llama(sizes.vocabulary, sizes.width, sizes.layers, sizes.heads, sizes.hidden, sizes.matrices)
  tokens = jax.ShapeDtypeStruct((settings.batch, settings.seq), jnp.int32)
  params = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8), jnp.int32))["params"])
  return Base(settings, model, params, Batch(tokens, tokens))


def everybody() -> list[Contestant]:
  """Full fine-tuning, LoRA on floats by qwix and by jaxlora, and jaxlora's on codes in every format."""
  peers = {one.name: one for one in contestants.contestants()}
  return [peers[FULL], peers["qwix"], *candidates(FORMATS)]


def verdict(target: Target, contestant: Contestant, base: Base) -> dict[str, Any]:
  """What the compiler says of a step: its bytes where it fits, else what it would need."""
  try:
    memory = compile_for(target, contestant, base).memory_analysis()
  except jax.errors.JaxRuntimeError as error:
    return {"fits": False, **refused(error)}
  sizes = {name: getattr(memory, f"{name}_size_in_bytes") for name in FIELDS}
  return {"fits": True, "bytes": sizes}


def total(row: dict[str, Any]) -> int:
  """Bytes that a step holds at once; a result that overwrites an argument is one array."""
  sizes = row["bytes"]
  return sizes["argument"] + sizes["temp"] + sizes["output"] - sizes["alias"]


def compare(
  target: Target, sizes: Sizes, settings: Settings, args: argparse.Namespace, tick: Callable[[str], Any]
) -> dict[str, Any]:
  """The verdicts on one step of all contestants, and with --largest the number of sequences that fit."""
  here, absent = contestants.present([one for one in everybody() if one.name.startswith(tuple(args.only))], settings)
  rows = {}
  for one in here:
    tick(f"compiling {one.name}")
    rows[one.name] = verdict(target, one, base_of(sizes, settings))
    if args.largest:

      def fits(batch: int, one: Contestant = one) -> bool:
        tick(f"{one.name}, {batch} sequences")
        return verdict(target, one, base_of(sizes, settings._replace(batch=batch)))["fits"]

      rows[one.name]["largest"] = largest(fits) if rows[one.name]["fits"] else 0
  parameters = sum(leaf.size for leaf in jax.tree.leaves(base_of(sizes, settings).params))
  return {"rows": rows, "parameters": parameters, "left_out": absent}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  more = ("largest batch",) if results["settings"]["largest"] else ()
  table: list[tuple[str, ...]] = [("base", "fits", "arguments", "temp", "in all", *more)]
  for name, row in results["rows"].items():
    if row["fits"]:
      sizes = [f"{value / GIB:.2f} G" for value in (row["bytes"]["argument"], row["bytes"]["temp"], total(row))]
    else:
      sizes = ["-", "-", f"{row['needs']:.2f} G" if row["needs"] else "too much"]
    table.append((name, "yes" if row["fits"] else "no", *sizes, *([f"{row['largest']}"] if more else [])))
  return table


def title(results: dict[str, Any]) -> str:
  """The model, the chip, and that nothing was run."""
  return f"{results['chip']}, compiled, not run: {results['parameters'] / 1e9:.2f} G parameters, {results['title']}"


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(title(results), cells(results), *results["left_out"])


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  versions = ", ".join(f"{name} {results['versions'][name]}" for name in ("jax", "flax", "qwix", "libtpu"))
  return harness.documented(f"{title(results)}. {versions}. G: 2^30 bytes.", cells(results))


def plot(results: dict[str, Any], path: Any) -> None:
  """What each step needs, beside what the chip has."""
  needs = {name: total(row) / GIB if row["fits"] else row["needs"] for name, row in results["rows"].items()}
  sizes = {name: harness.summarize([size]) for name, size in needs.items() if size is not None}
  harness.plot_bars([harness.Panel(title(results), "GiB that a step needs", sizes, MEMORY)], path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Compiles the steps; returns what seven_billion.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--chip v5e:2x2 --largest")
  count = harness.positive(int)
  for name, value in (("layers", 32), ("d", 4096), ("heads", 32), ("hidden", 11008), ("vocabulary", 32000)):
    parser.add_argument(f"--{name}", type=count, default=value, help="of the model")
  for name, value in (("batch", 1), ("seq", 2048), ("rank", 16)):
    parser.add_argument(f"--{name}", type=count, default=value, help="of the step")
  parser.add_argument("--chip", choices=list(CHIPS), default="v5e:2x2", help="the chip to compile for")
  parser.add_argument("--heads-apart", action="store_true", help="attention's kernels have an axis of heads, as flax's")
  parser.add_argument("--largest", action="store_true", help="find how many sequences fit, too")
  words = lambda text: text.split("|")
  parser.add_argument("--only", type=words, default=[""], help=f"rows that begin so: '{FLOATS}|nf4'")
  args = harness.parse(parser, argv, layers=2, d=256, heads=2, hidden=512, vocabulary=512, seq=1024)
  if args.d % args.heads:
    parser.error(f"--d {args.d} is no multiple of --heads {args.heads}")
  chip = CHIPS[args.chip]
  stay_on_the_host()
  try:
    target = Target(chip, device_of(chip))
  except NoCompilerError as error:
    parser.error(str(error))
  sizes = Sizes(args.layers, args.d, args.heads, args.hidden, args.vocabulary, not args.heads_apart)
  settings = Settings(
    args.d, args.layers, args.batch, args.seq, args.rank, vocabulary=args.vocabulary, scan=True, remat=True, bf16=True
  )
  with harness.progress(None, "step", args.quiet) as bar:
    found = compare(target, sizes, settings, args, harness.ticker(bar))
  results = {**harness.provenance(args), "title": settings.title(), "chip": chip.name, **found}
  results["versions"] |= chip.versions()
  harness.publish(args, "seven_billion", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
