"""What the compilers of TPUs and GPUs make of forward passes with adapters, without the chip: compiled, not run.

Three pieces of work: whole sequences, one token of every sequence beside a cache of keys and values, and the same with
an adapter per row out of a bank. Every way to do one is compiled ahead of time, from shapes alone, and its figures are
shown over the base's, as in compiled.py. At decode little is computed: the operands, which have to be read at least
once, take longer than the products, and a TPU's estimate leaves out what is fetched ahead of its use.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from pathlib import Path
from typing import Any, NamedTuple

from ahead import Target, compile_shapes, figures
from chips import CHIPS, NoCompilerError, device_of, stay_on_the_host
from compiled import NOT_RUN, over, quantity
import contestants
import harness
import jax
import jax.numpy as jnp
import models_nnx
import serving_work
from settings import Base, Settings, add_sizes, base_shapes

import jaxlora

BASE, UNMERGED, PLAIN, EVERY_CALL, QWIX, NNX = (
  "base", "jaxlora, unmerged", "jaxlora, tuning none", "merged in every call", "qwix", "nnx.LoRA"
)  # fmt: skip
ROUTED = {
  "jaxlora, mixed batch": "auto",
  **{f"jaxlora, mixed batch, {via}": via for via in ("wide", "gathered", "row by row")},
}
TREES = "a tree per row, by vmap"
REACH = {"forward": 1.05, "decode": 1.15, "bank": 1.25}
# Figures of a table: title, unit, and how much that is.
SHOWN = {
  "tpu": {"cycles": ("cycles", "k", 1e3)},
  "gpu": {"bytes_outside": ("bytes outside of GEMMs", "MB", 1e6), "gemms": ("GEMMs", "", 1)},
}


class Way(NamedTuple):
  """One way to do a piece of work.

  Attributes:
    name: of its row.
    build: `build(base, work)` gives a function, and its operands ahead of the work's own state and arguments.
    package: the package that it needs.
  """

  name: str
  build: Callable[[Base, Any], tuple[Callable[..., Any], tuple[Any, ...]]]
  package: str | None = None


# ----------------------------------------------------------------------------------------------------------------------
# The ways.


def unmerged(base: Base, work: Any, **options: Any) -> tuple[Any, tuple[Any, ...]]:
  """The adapted tree under `wrap`."""
  return jaxlora.wrap(work(base).fn, on_materialize="error", **options), (contestants.adapt(base),)


def every_call(base: Base, work: Any) -> tuple[Any, tuple[Any, ...]]:
  """Merging is part of the call."""
  fn = work(base).fn
  return lambda tree, *rest: fn(jaxlora.merge(tree), *rest), (contestants.adapt(base),)


def with_qwix(base: Base, work: Any) -> tuple[Any, tuple[Any, ...]]:
  """Google's qwix."""
  model, factors = contestants.qwix_model(base)
  fn = work(base._replace(model=model)).fn
  return lambda params, factors, *rest: fn(contestants.with_factors(params, factors), *rest), (base.params, factors)


def with_nnx(base: Base, work: Any) -> tuple[Any, tuple[Any, ...]]:
  """Flax's `nnx.LoRA`, on the model's twin, which has no cache."""
  from flax import nnx

  del work
  definition, factors, rest = models_nnx.split_twin(base.model, base.params, base.settings.rank)
  return lambda factors, rest, state, x: (nnx.merge(definition, factors, rest)(x), state), (factors, rest)


def routed(base: Base, work: Any, adapters: int, via: str = "auto") -> tuple[Any, tuple[Any, ...]]:
  """A mixed batch by `jaxlora.route`."""
  with jax.ensure_compile_time_eval():  # a bank is made of arrays
    one = jaxlora.stack({"0": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), _half(base))})
  bank = _stacked(one, adapters)
  return jaxlora.route(work(base).fn, via=via, on_materialize="error"), (base.params, bank, _ids(base))


def tree_per_row(base: Base, work: Any, adapters: int) -> tuple[Any, tuple[Any, ...]]:
  """What JAX alone does: every row's own tree is picked, and `vmap` runs over trees and rows."""
  fn = jaxlora.wrap(work(base).fn, tuning="none")

  def mixed(frozen: Any, halves: Any, ids: jax.Array, state: Any, x: jax.Array) -> Any:
    def row(half: Any, state: Any, x: jax.Array) -> Any:
      alone = jax.tree.map(lambda leaf: leaf[None] if leaf.ndim else leaf, state)
      return fn(jaxlora.join(frozen, half), alone, x[None])

    axes = jax.tree.map(lambda leaf: 0 if leaf.ndim else None, state)
    return jax.vmap(row, in_axes=(0, axes, 0))(jax.tree.map(lambda leaf: leaf[ids], halves), state, x)

  return mixed, (jaxlora.split(contestants.adapt(base))[0], _stacked(_half(base), adapters), _ids(base))


def _half(base: Base) -> Any:
  """The shapes of an adapter."""
  of = lambda params, batch: jaxlora.split(contestants.adapt(base._replace(params=params, batch=batch)))[1]
  return jax.eval_shape(of, base.params, base.batch)


def _stacked(tree: Any, adapters: int) -> Any:
  """Arrays for many adapters, of which nothing is computed."""
  sized = lambda leaf: (adapters, *(leaf.shape[1:] if isinstance(tree, jaxlora.Bank) else leaf.shape))
  return jax.tree.map(lambda leaf: jnp.zeros(sized(leaf), leaf.dtype), tree)


def _ids(base: Base) -> jax.Array:
  return jnp.zeros(base.settings.batch, jnp.int32)


def ways_of(what: str, adapters: int) -> list[Way]:
  """The ways to do a piece of work, the base first."""
  if what == "bank":
    mixed = [Way(name, functools.partial(routed, adapters=adapters, via=via)) for name, via in ROUTED.items()]
    return [plain_base(), *mixed, Way(TREES, functools.partial(tree_per_row, adapters=adapters))]
  peers = [Way(QWIX, with_qwix, "qwix"), *([Way(NNX, with_nnx)] if what == "forward" else [])]
  return [
    plain_base(),
    Way(UNMERGED, unmerged),
    Way(PLAIN, functools.partial(unmerged, tuning="none")),
    Way(EVERY_CALL, every_call),
    *peers,
  ]


def plain_base() -> Way:
  """The base alone, which merged parameters are, too."""
  return Way(BASE, lambda base, work: (work(base).fn, (base.params,)))


# ----------------------------------------------------------------------------------------------------------------------
# Figures.


def compile_way(target: Target, way: Way, base: Base, work: Callable[[Base], Any]) -> Any:
  """A way, compiled for a chip from the shapes in `base`."""
  built: Any = None

  def arrays(params: Any, batch: Any) -> Any:
    nonlocal built
    of = base._replace(params=params, batch=batch)
    built, before = way.build(of, work)
    return before, work(of).state, work(of).args

  before, state, args = jax.eval_shape(arrays, base.params, base.batch)
  return compile_shapes(target, built, (*before, state, *args), donated=len(before))


def compare(target: Target, settings: Settings, what: str, adapters: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """The figures of every way to do a piece of work."""
  base, rows, absent = base_shapes(settings), {}, []
  work = serving_work.whole_batch if what == "forward" else serving_work.one_token
  for way in ways_of(what, adapters):
    if way.package and not harness.installed(way.package):
      absent.append(f"{way.name} is left out: {way.package} is not installed; the extra `peers` brings it.")
      continue
    tick(f"compiling {what}, {way.name}")
    compiled = compile_way(target, way, base, work)
    rows[way.name] = figures(compiled, target.chip, settings)
    rows[way.name]["operands"] = compiled.memory_analysis().argument_size_in_bytes
  first = dict(rows[BASE])
  for row in rows.values():
    row["over_base"] = over(row, first)
  title = f"bank of {adapters}, {_title(settings)}" if what == "bank" else _title(settings, what == "forward")
  return {"what": what, "title": title, "reach": REACH[what], "rows": rows, "left_out": absent}


def _title(settings: Settings, whole: bool = False) -> str:
  tokens = f"{settings.seq} tokens" if whole else f"1 token, cache of {settings.seq}"
  return f"{'forward' if whole else 'decode'}, {settings.batch} x {tokens}"


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(one: dict[str, Any], chip: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of a piece of work's table, then its rows."""
  shown = {**SHOWN[chip["platform"]], "operands": ("operands", "MB", 1e6)}
  heads = [head for title, *_ in shown.values() for head in (title, "/ base")]
  table = [(one["title"], *heads, "operands / bandwidth")]
  for name, row in one["rows"].items():
    line = [name]
    for field, (_, unit, scale) in shown.items():
      line += [quantity(row[field], unit, scale).strip(), harness.exact_cell(row["over_base"][field])]
    table.append((*line, quantity(1e6 * row["operands"] / chip["bandwidth"], "us", 1)))
  return table


def describe(results: dict[str, Any]) -> str:
  """The tables, for a terminal."""
  parts = [results["title"]]
  for one in results["comparisons"]:
    head, *rows = cells(one, results["chip"])
    parts += ["", harness.table(head, rows), f"To reach: {one['reach']:.2f} of the base's.", *one["left_out"]]
  return "\n".join(parts)


def tables(results: dict[str, Any]) -> str:
  """The tables of benchmarks/README.md."""
  versions = ", ".join(
    f"{name} {results['versions'][name]}" for name in results["compiler"] if name in results["versions"]
  )
  parts = [f"{results['title']}. jax {results['versions']['jax']}, {versions}."]
  for one in results["comparisons"]:
    head, *rows = cells(one, results["chip"])
    parts += [
      harness.markdown(head, rows),
      "\n".join([f"To reach: {one['reach']:.2f} of the base's.", *one["left_out"]]),
    ]
  return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Path) -> None:
  """A panel for each piece of work."""
  field, (label, *_) = next(iter(SHOWN[results["chip"]["platform"]].items()))
  panels = []
  for one in results["comparisons"]:
    ratios = {name: row["over_base"][field] for name, row in one["rows"].items()}
    known = {name: harness.summarize([ratio]) for name, ratio in ratios.items() if ratio is not None}
    panels.append(harness.Panel(one["title"], f"{label} / base's", known, one["reach"]))
  harness.plot_bars(panels, path)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = harness.make_parser(__file__, __doc__, "--chip v5e:2x2 --bf16 --d 1024 --seq 512 --layers 4")
  harness.add_layers(parser)
  add_sizes(parser)
  count = harness.positive(int)
  parser.add_argument("--rows", type=count, default=32, help="sequences that are decoded at once")
  parser.add_argument("--bank", type=count, default=64, help="adapters in the bank")
  parser.add_argument("--chip", choices=list(CHIPS), default="v5e:2x2", help="the chip to compile for")
  parser.add_argument("--what", choices=list(REACH), action="append", help="one piece of work; all unless given")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what compiled_forward.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, d=128, layers=2, rounds=3)
  harness.rename(parser, args, f"compiled_forward_{CHIPS[args.chip].short}")
  settings, chip = Settings.parse(parser, args), CHIPS[args.chip]
  stay_on_the_host()
  try:
    target = Target(chip, device_of(chip))
  except NoCompilerError as error:
    parser.error(str(error))
  pieces = args.what or list(REACH)
  with harness.progress(sum(len(ways_of(what, args.bank)) for what in pieces), "way", args.quiet) as bar:
    sized = lambda what: settings if what == "forward" else settings._replace(batch=args.rows)
    found = [compare(target, sized(what), what, args.bank, harness.ticker(bar)) for what in pieces]
  results = {
    **harness.provenance(args),
    "title": f"{chip.name}, {NOT_RUN}: {settings.title()}",
    "chip": {field: getattr(chip, field) for field in ("name", "platform", "bandwidth")},
    "compiler": list(chip.packages),
    "comparisons": found,
  }
  results["versions"] |= chip.versions()
  harness.publish(args, "compiled_forward", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
