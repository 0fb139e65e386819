"""An adapted step is traced, lowered and compiled in little more time than full fine-tuning's, linearly in layers.

Measured are the seconds of tracing, lowering and compiling one training step, with caches cleared and a new function
object each time. They are compared with those of full fine-tuning and of the frozen floor, over the number of layers
(the growth must be linear), and for a scanned model (it must be flat). Then the Python overhead of a cached call: the
same program is called with an adapted tree and with the same leaves in plain dicts.
"""

import argparse
from collections.abc import Callable, Sequence
import itertools
import time
from typing import Any, NamedTuple

import contestants
from contestants import FLOOR, FULL, Contestant
import harness
import jax
from matplotlib.figure import Figure
from settings import Settings, add_sizes, make_base

import jaxlora

PHASES = ("trace", "lower", "compile")
SWEPT = (FLOOR, FULL, "jaxlora")
REACH = 1.15
BASE_CALL, TREE_CALL, DICT_CALL = "base", "adapted tree", "the same leaves in dicts"


class Entry(NamedTuple):
  """A contestant at a number of layers, and the seconds of its phases, round by round."""

  name: str
  settings: Settings
  phases: list[dict[str, float]]

  @property
  def key(self) -> str:
    """Its name in the rounds."""
    return f"{self.name}, {'scanned, ' * self.settings.scan}{self.settings.layers} layers"


def make_run(contestant: Contestant, entry: Entry) -> Callable[[], None]:
  """A function that compiles the contestant's step with nothing cached."""
  base = make_base(entry.settings)
  program = contestant.build(base)
  args = jax.eval_shape(lambda: (program.state, program.frozen, base.batch))  # shapes only
  step = program.step

  def run() -> None:
    jax.clear_caches()
    marks = [time.perf_counter()]
    traced = jax.jit(lambda *args: step(*args), donate_argnums=0).trace(*args)
    marks.append(time.perf_counter())
    lowered = traced.lower()
    marks.append(time.perf_counter())
    lowered.compile()
    marks.append(time.perf_counter())
    entry.phases.append(dict(zip(PHASES, (b - a for a, b in itertools.pairwise(marks)), strict=True)))

  return run


def make_entries(
  settings: Settings, layers: Sequence[int]
) -> tuple[dict[str, Entry], dict[str, Contestant], list[str]]:
  """All contestants at the largest number of layers; those of `SWEPT` also at fewer layers, and scanned."""
  here, absent = contestants.present(contestants.contestants(), settings)
  by_name = {one.name: one for one in here}
  most = settings._replace(layers=layers[-1])
  wanted = [(name, most) for name in by_name]
  wanted += [(name, settings._replace(layers=count)) for count in layers[:-1] for name in SWEPT]
  if not settings.scan:
    scanned = [settings._replace(layers=count, scan=True) for count in sorted({layers[0], layers[-1]})]
    wanted += [(name, one) for one in scanned for name in SWEPT]
  entries = [Entry(name, one, []) for name, one in wanted]
  return {entry.key: entry for entry in entries}, by_name, absent


def compare(settings: Settings, args: argparse.Namespace, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Compiles all entries, in interleaved rounds."""
  entries, by_name, absent = make_entries(settings, args.layers)
  runs = {key: make_run(by_name[entry.name], entry) for key, entry in entries.items()}
  top = {name: Entry(name, settings._replace(layers=args.layers[-1]), []).key for name in by_name}
  again = Entry(FULL, entries[top[FULL]].settings, [])
  runs = harness.with_control(runs, top[FULL], make_run(by_name[FULL], again))
  seconds = harness.interleave(runs, args.rounds, 1, lambda _: tick("compiling"))
  over_full, over_floor = harness.ratios(seconds, top[FULL]), harness.ratios(seconds, top[FLOOR])
  rows = {
    name: {
      "over_full": over_full[key],
      "over_floor": over_floor[key],
      "seconds": harness.summarize(seconds[key]),
      # the first round warms up
      "phases": {phase: harness.summarize([one[phase] for one in entries[key].phases[1:]]) for phase in PHASES},
    }
    for name, key in top.items()
  }
  return {
    "title": settings._replace(layers=args.layers[-1]).title(),
    "model": settings._asdict(),
    "control": over_full[top[FULL] + harness.CONTROL],
    "rows": rows,
    "layers": sweep(seconds, entries, scan=settings.scan),
    "scanned": None if settings.scan else sweep(seconds, entries, scan=True),
    "left_out": absent,
  }


def sweep(seconds: dict[str, list[float]], entries: dict[str, Entry], scan: bool) -> dict[str, dict[str, Any]]:
  """Seconds by the number of layers, and the ratio of a late layer's to an early one's."""
  found: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in SWEPT}
  for key, entry in entries.items():
    if entry.name in SWEPT and entry.settings.scan == scan:
      found[entry.name][entry.settings.layers] = harness.summarize(seconds[key])
  return {
    name: {
      "seconds": {str(count): by_count[count] for count in sorted(by_count)},
      "late_over_early": late_over_early(by_count),
      "most_over_fewest": by_count[max(by_count)]["median"] / by_count[min(by_count)]["median"],
    }
    for name, by_count in found.items()
  }


def late_over_early(by_count: dict[int, dict[str, Any]]) -> float | None:
  """Seconds per layer at the largest numbers over those at the smallest: 1 if the cost is linear."""
  counts = sorted(by_count)
  if len(counts) < 3:
    return None
  early, late = ((by_count[b]["median"] - by_count[a]["median"]) / (b - a) for a, b in (counts[:2], counts[-2:]))
  return late / early


# ----------------------------------------------------------------------------------------------------------------------
# The cost of a call in Python.


def to_dicts(tree: Any) -> Any:
  """The tree with plain dicts in place of its `LoraWeight` nodes."""
  is_node = lambda leaf: isinstance(leaf, jaxlora.LoraWeight)
  fields = lambda w: {"base": w.base, "a": w.a, "b": w.b} if is_node(w) else w
  return jax.tree.map(fields, tree, is_leaf=is_node)


def compare_calls(rounds: int, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Times cached calls of a tiny model under `jit`: nearly all of it is the overhead of Python and of the leaves."""
  base = make_base(Settings(width=64, layers=2, batch=1, seq=1, vocabulary=8))
  tree, x = contestants.adapt(base), base.batch.x
  structure = jax.tree.structure(tree)
  wrapped = contestants.wrap(base.model.apply)
  of_tree = jax.jit(lambda tree, x: wrapped({"params": tree}, x))
  of_dicts = jax.jit(lambda dicts, x: of_tree(jax.tree.unflatten(structure, jax.tree.leaves(dicts)), x))
  of_base = jax.jit(lambda params, x: base.model.apply({"params": params}, x))
  dicts = to_dicts(tree)
  # the order of leaves is that of the fields here and of the keys there
  ordered = jax.tree.unflatten(jax.tree.structure(dicts), jax.tree.leaves(tree))
  runs = {
    BASE_CALL: lambda: of_base(base.params, x),
    TREE_CALL: lambda: of_tree(tree, x),
    DICT_CALL: lambda: of_dicts(ordered, x),
  }
  runs = harness.with_control(runs, TREE_CALL, runs[TREE_CALL])
  seconds = harness.interleave(runs, rounds, harness.calls_per_turn(runs), lambda _: tick("calling"))
  over = harness.ratios(seconds, DICT_CALL)
  return {
    "leaves": len(jax.tree.leaves(tree)),
    "base_leaves": len(jax.tree.leaves(base.params)),
    "control": harness.ratios(seconds, TREE_CALL)[TREE_CALL + harness.CONTROL],
    "rows": {
      name: {"over_dicts": over[name], "seconds": harness.summarize(seconds[name])}
      for name in (BASE_CALL, TREE_CALL, DICT_CALL)
    },
  }


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cells(results: dict[str, Any]) -> list[tuple[str, ...]]:
  """The head of the first table, then its rows."""
  rows: list[tuple[str, ...]] = [("one step", "/ full", "/ floor", *PHASES, "all")]
  for name, row in results["rows"].items():
    phases = (f"{row['phases'][phase]['median']:.2f} s" for phase in PHASES)
    ratios = (harness.ratio_cell(row[field]) for field in ("over_full", "over_floor"))
    rows.append((name, *ratios, *phases, f"{row['seconds']['median']:.2f} s"))
  return rows


def describe(results: dict[str, Any]) -> str:
  """The tables, for a terminal."""
  head, *rows = cells(results)
  lines = [
    results["title"],
    harness.table(head, rows),
    f"A/A control (full fine-tuning again): {harness.ratio_cell(results['control'])}",
    *results["left_out"],
    "",
    describe_layers(results["layers"]),
  ]
  if results["scanned"]:
    lines += ["", "scanned", describe_layers(results["scanned"])]
  calls = results["calls"]
  calls_rows = [
    (name, harness.ratio_cell(row["over_dicts"]), f"{1e6 * row['seconds']['median']:.0f} us")
    for name, row in calls["rows"].items()
  ]
  head = (f"a cached call ({calls['base_leaves']} leaves, adapted {calls['leaves']})", "/ dicts", "time")
  control = f"A/A control (the adapted tree again): {harness.ratio_cell(calls['control'])}"
  return "\n".join([*lines, "", harness.table(head, calls_rows), control])


def describe_layers(layers: dict[str, dict[str, Any]]) -> str:
  """The table of seconds by the number of layers."""
  head, *rows = layer_cells(layers)
  return harness.table(head, rows)


def layer_cells(layers: dict[str, dict[str, Any]], kind: str = "layers") -> list[tuple[str, ...]]:
  """The head of the table of seconds by the number of layers, then its rows."""
  counts = list(next(iter(layers.values()))["seconds"])
  rows = [
    (
      name,
      *(f"{value['median']:.2f} s" for value in row["seconds"].values()),
      "-" if row["late_over_early"] is None else f"{row['late_over_early']:.2f}",
      f"{row['most_over_fewest']:.2f}",
    )
    for name, row in layers.items()
  ]
  return [(kind, *counts, "late / early layer", "most / fewest"), *rows]


def tables(results: dict[str, Any]) -> str:
  """The tables of benchmarks/README.md."""
  calls, rounds = results["calls"]["rows"][TREE_CALL]["over_dicts"], results["settings"]["rounds"]
  lines = (
    f"{results['title']}; {rounds} rounds, medians (min-max); the A/A control is"
    f" {harness.ratio_cell(results['control'])}. {harness.conditions(results)}.",
    f"A cached call with an adapted tree takes {harness.ratio_cell(calls)} of one with the same leaves in plain dicts.",
  )
  parts = ["\n".join(lines)]
  sweeps = [layer_cells(results["layers"], "seconds over layers")]
  if results["scanned"]:
    sweeps.append(layer_cells(results["scanned"], "scanned layers"))
  for head, *rows in (cells(results), *sweeps):
    parts.append(harness.markdown(head, rows))
  return "\n\n".join(parts)


def plot(results: dict[str, Any], path: Any) -> None:
  """The phases of each contestant, and seconds over the number of layers."""
  figure = Figure(figsize=(11, 4.2), layout="constrained")
  left, right = figure.subplots(1, 2)
  names = list(results["rows"])
  offset = [0.0] * len(names)
  for phase in PHASES:
    values = [results["rows"][name]["phases"][phase]["median"] for name in names]
    left.barh(names, values, left=offset, label=phase)
    offset = [a + b for a, b in zip(offset, values, strict=True)]
  left.invert_yaxis()
  left.set(title=results["title"], xlabel="seconds")
  left.legend(frameon=False)
  for layers, style, suffix in ((results["layers"], "-", ""), (results["scanned"] or {}, ":", ", scanned")):
    for (name, row), color in zip(layers.items(), ("gray", "tab:red", "tab:blue"), strict=False):
      counts = [int(count) for count in row["seconds"]]
      medians = [value["median"] for value in row["seconds"].values()]
      right.plot(counts, medians, style, marker="o", color=color, label=name + suffix)
  right.set(title="trace + lower + compile", xlabel="layers", ylabel="seconds", ylim=(0, None))
  right.legend(frameon=False, fontsize=8)
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options; a round compiles everything, so the default is few rounds."""
  parser = harness.make_parser(__file__, __doc__, "--layers 2,4,8", rounds=5)
  add_sizes(parser)
  counts = harness.several(harness.positive(int))
  parser.add_argument("--layers", type=counts, default="2,4,8,12", help="numbers of blocks, separated by commas")
  parser.add_argument("--llama", action="store_true", help="blocks of Llama's shape: seven kernels, and no biases")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what compile_time.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, d=64, layers="1,2", rounds=2)
  settings = Settings.parse(parser, args, layers=args.layers[-1])
  if args.llama:
    harness.rename(parser, args, "compile_time_llama")
  count = len(contestants.present(contestants.contestants(), settings)[0])
  swept = len(SWEPT) * (len(args.layers) - 1 + (0 if settings.scan else len({args.layers[0], args.layers[-1]})))
  with harness.progress((count + swept + 1 + 4) * (args.rounds + 1), "turn", args.quiet) as bar:
    comparison = compare(settings, args, harness.ticker(bar))
    calls = compare_calls(args.rounds, harness.ticker(bar))
  results = {**harness.provenance(args), **comparison, "calls": calls}
  harness.publish(args, "compile_time", results, plot)
  print(describe(results))
  return results


if __name__ == "__main__":
  main()
