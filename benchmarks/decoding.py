"""Ways to turn codes of four bits into NF4's values: of each, what it costs a training step and a lone token.

The ways are functions of codes and of a book of 16 values, which a policy chooses for its platform. On this host a
token meets one weight: times are measured in interleaved rounds, over the same product with a weight in floats. With
--chip the training step is compiled instead, and nothing is run: cycles and temporary bytes, over the float base's.
"""

from collections.abc import Callable, Sequence
import dataclasses
import functools
from typing import Any

from ahead import Target, compile_for, figures
from chips import CHIPS, NoCompilerError, device_of, stay_on_the_host
import contestants
from contestants import Contestant
import harness
import jax
import jax.numpy as jnp
import numpy as np
from quantized import FLOATS, Format
from settings import Settings, add_sizes, base_shapes

import jaxlora
from jaxlora._platform import policy
from jaxlora._platform.codes import LookUp, by_index, by_selects
from jaxlora._quant.books import NF4

Book = Sequence[float]
CODES = Format("nf4", "nf4")


# ----------------------------------------------------------------------------------------------------------------------
# The ways.


def by_thresholds(codes: jax.Array, book: Book) -> jax.Array:
  """By a chain: each value from its code on."""
  wide = codes.astype(jnp.uint8)
  values = jnp.full(codes.shape, book[0], jnp.float32)
  for k, value in enumerate(book[1:], 1):
    values = jnp.where(wide >= k, jnp.float32(value), values)
  return values


def by_polynomial(codes: jax.Array, book: Book) -> jax.Array:
  """By the polynomial through all values, in Newton's form: exact up to rounding."""
  differences = np.asarray(book, np.float64)
  coefficients = [differences[0]]
  for order in range(1, len(book)):
    differences = np.diff(differences) / order
    coefficients.append(differences[0])
  x = codes.astype(jnp.float32)
  value = jnp.full(codes.shape, coefficients[-1], jnp.float32)
  for k in reversed(range(len(book) - 1)):
    value = value * (x - k) + jnp.float32(coefficients[k])
  return value


def by_one_hot(codes: jax.Array, book: Book) -> jax.Array:
  """By a product of one-hot codes and the book."""
  hot = jax.nn.one_hot(codes.astype(jnp.uint8), len(book), dtype=jnp.float32)
  return jnp.einsum("...k,k->...", hot, jnp.asarray(book, jnp.float32), precision="highest")


def widened(way: LookUp) -> LookUp:
  """The same of codes that are bytes first: not native ones of four bits."""
  return lambda codes, book: way(jax.lax.optimization_barrier(codes.astype(jnp.uint8)), book)


WAYS: dict[str, LookUp] = {
  "tree of selects": by_selects,
  "chain of thresholds": by_thresholds,
  "polynomial": by_polynomial,
  "one-hot": by_one_hot,
  "index": by_index,
  "bytes, tree of selects": widened(by_selects),
  "bytes, index": widened(by_index),
}


def with_way(way: LookUp, build: Callable[[], Any]) -> Any:
  """What is built while every platform's policy decodes so."""
  before = dict(policy.PLATFORMS)
  policy.PLATFORMS.update({name: dataclasses.replace(one, look_up=way) for name, one in before.items()})
  jax.clear_caches()  # layers that are alike are traced once
  try:
    return build()
  finally:
    policy.PLATFORMS.update(before)


def largest_error(way: LookUp) -> float:
  """How far this way's values are from the book's, at most."""
  values = jax.jit(lambda codes: way(codes, NF4))(jnp.arange(len(NF4), dtype=jnp.uint4))
  return float(np.max(np.abs(np.asarray(values, np.float64) - np.asarray(NF4, np.float32))))


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def compare_for(target: Target, settings: Settings, tick: Callable[[str], Any]) -> dict[str, Any]:
  """What a chip's compiler says of the training step on codes, by way; and of that on floats."""
  base = base_shapes(settings)

  def compiled(name: str, build: Callable[..., Any], way: LookUp) -> dict[str, Any]:
    tick(f"compiling {name}")
    one = Contestant(name, build, contestants.factor_parameters)
    found = figures(with_way(way, lambda: compile_for(target, one, base)), target.chip, settings)
    return {field: found[field] for field in ("cycles", "temp") if field in found}

  floats = compiled(FLOATS, contestants.jaxlora_split, by_selects)
  rows = {name: compiled(name, CODES.program, way) for name, way in WAYS.items()}
  # a step that fits into the chip's own memory holds no temporaries in the other
  over = {name: {field: row[field] / floats[field] for field in row if floats[field]} for name, row in rows.items()}
  return {"rows": over, "floats": floats, "chip": target.chip.name}


def compare(settings: Settings, rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Times of one token that meets a weight of the MLP in codes, by way, over those of the weight in floats."""
  width = settings.width
  w = jax.random.normal(jax.random.key(0), (4 * width, width)) / width
  codes = jaxlora.quantize({"w": w}, CODES.format, axes={"w": "io"}, block_size=CODES.block_size, double=False)["w"]
  x = jax.random.normal(jax.random.key(1), (1, 4 * width))
  runs = {FLOATS: functools.partial(jax.jit(jnp.dot), x, w)}
  for name, way in WAYS.items():
    tick(f"compiling {name}")
    decoded = jax.jit(lambda x, codes, way=way: x @ codes.dequantize(way))
    runs[name] = functools.partial(decoded, x, codes)
  runs = harness.with_control(runs, FLOATS, runs[FLOATS])
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda calls: tick("timing"))
  over = harness.ratios(seconds, FLOATS)
  rows = {name: {"seconds": harness.summarize(seconds[name]), "over_floats": over[name]} for name in (FLOATS, *WAYS)}
  return {"rows": rows, "control": over[FLOATS + harness.CONTROL], "chip": None}


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the table, then its rows."""
  heads = ("cycles / floats", "temp / floats") if results["chip"] else ("time / floats", "time")
  table: list[tuple[str, ...]] = [("decoded by", *heads, "largest error")]
  for name, row in results["rows"].items():
    if results["chip"]:
      line = [harness.exact_cell(row.get(field)) for field in ("cycles", "temp")]
    else:
      line = [harness.ratio_cell(row["over_floats"]), harness.milliseconds(row["seconds"])]
    error = results["errors"].get(name)
    table.append((name, *line, "-" if error is None else f"{error:.0e}" if error else "0"))
  return table


def remark(results: dict[str, Any]) -> str:
  """What stands below the table."""
  if results["chip"]:
    return f"Compiled for {results['chip']}, not run: these are no times."
  return f"A/A control (the floats again / the floats): {harness.ratio_cell(results['control'])}"


def describe(results: dict[str, Any]) -> str:
  """The table, for a terminal."""
  return harness.described(results["title"], cells(results), remark(results))


def tables(results: dict[str, Any]) -> str:
  """The table of benchmarks/README.md."""
  conditions = f"{results['title']}. {harness.conditions(results)}."
  return harness.documented(conditions, cells(results), remark(results))


def plot(results: dict[str, Any], path: Any) -> None:
  """Cycles or times over those of floats."""
  field = "cycles" if results["chip"] else "over_floats"
  rows = {name: row[field] for name, row in results["rows"].items() if name != FLOATS}
  values = {name: harness.summarize([value]) if results["chip"] else value for name, value in rows.items()}
  label = "step's cycles / float base's" if results["chip"] else "time / floats'"
  harness.plot_bars([harness.Panel(results["title"], label, values, None)], path)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what decoding.json holds."""
  parser = harness.make_parser(__file__, __doc__, "--chip v5e:2x2 --bf16 --d 1024 --seq 512 --layers 4 --scan")
  harness.add_layers(parser)
  add_sizes(parser)
  parser.add_argument("--chip", choices=list(CHIPS), help="compile the training step for this chip, and run nothing")
  args = harness.parse(parser, argv, d=128, layers=1, rounds=3)
  settings = Settings.parse(parser, args)
  title = f"NF4, one token and a weight of {4 * settings.width:,} x {settings.width:,} in float32"
  if args.chip is None:
    turns = (args.rounds + 1) * (len(WAYS) + 2) + len(WAYS)
    with harness.progress(turns, "turn", args.quiet) as bar:
      found = compare(settings, args.rounds, harness.ticker(bar))
  else:
    harness.rename(parser, args, f"decoding_{CHIPS[args.chip].short}")
    stay_on_the_host()
    title = f"A training step on NF4: {settings.title()}"
    try:
      target = Target(CHIPS[args.chip], device_of(CHIPS[args.chip]))
    except NoCompilerError as error:
      parser.error(str(error))
    with harness.progress(1 + len(WAYS), "step", args.quiet) as bar:
      found = compare_for(target, settings, harness.ticker(bar))
  found["errors"] = {name: largest_error(way) for name, way in WAYS.items()}
  results = {**harness.provenance(args), "title": title, **found}
  harness.publish(args, "decoding", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
