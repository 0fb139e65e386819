"""What the variants of LoRA cost over plain LoRA, and whether they train better.

Cost: each variant takes the same training step of the language model of `train_step.py`; times are compared within
interleaved rounds, temporary bytes and FLOPs are XLA's. Quality: a small ViT, pretrained on the digits 0-4, is
adapted to 5-9 by each, at the learning rate that is best for it on the validation split.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from pathlib import Path
import time
from typing import Any, NamedTuple

import adapt_digits
from adapt_digits import Setup
import contestants
from contestants import FLOOR
import digits
from digits import ViT
import harness
from matplotlib.figure import Figure
import methods
from methods import Method, Program
import numpy as np
import optax
from settings import Settings, add_sizes, make_base
import steps

import jaxlora

LORA = "lora"
VARIANTS = (LORA, "lora_fa", "dora", "dora_exact", "vera", "adalora", "loha", "lokr")
REACH_DORA = 1.15
RATES = (1e-3, 4e-3, 1.6e-2, 6.4e-2)
PLUS_RATIO = 16


# ----------------------------------------------------------------------------------------------------------------------
# What a step costs.


def compare_cost(settings: Settings, args: argparse.Namespace, tick: Callable[[str], Any]) -> dict[str, Any]:
  """Every variant's step over plain LoRA's."""
  base = make_base(settings)
  floor = next(one for one in contestants.contestants() if one.name == FLOOR)
  entries = steps.prepare(base, [floor, *contestants.variant_contestants(args.variants)], tick)
  seconds = steps.time_steps(base, entries, args.rounds, lambda _: tick("timing"))
  over_lora = harness.ratios(seconds, LORA)
  lora = entries[LORA].compiled
  rows = {
    name: {
      "over_lora": over_lora[name],
      "seconds": harness.summarize(seconds[name]),
      "temp_over_lora": entries[name].compiled.bytes["temp"] / lora.bytes["temp"],
      "temp": entries[name].compiled.bytes["temp"],
      "flops_over_lora": lora.flops and entries[name].compiled.flops / lora.flops,
      "check": entries[name].check,
    }
    for name in (FLOOR, *args.variants)
  }
  control = harness.ratios(seconds, FLOOR)[FLOOR + harness.CONTROL]
  return {"title": settings.title(), "rows": rows, "control": control}


# ----------------------------------------------------------------------------------------------------------------------
# How well they train.


class Way(NamedTuple):
  """A way to train: a variant and an optimizer, ahead of the choice of a learning rate."""

  name: str
  variant: str
  make: Callable[[float, int], optax.GradientTransformation]

  def method(self, model: ViT, rank: int) -> Method:
    config = jaxlora.LoraConfig(
      rank=rank, alpha=2 * rank, exclude="embed/kernel", train="head/.*", variant=self.variant
    )
    made = methods.lora(config, 1.0, lambda params: model.apply({"params": params}, np.zeros((1, 8, 8), np.float32)))
    return made._replace(name=self.name)

  def tx(self, rate: float, steps: int) -> optax.GradientTransformation:
    """Its optimizer, with the rate in its state, so that all rates share one program."""
    return optax.chain(self.make(1.0, steps), optax.inject_hyperparams(optax.scale)(step_size=rate))


def lora_plus(rate: float, steps: int) -> optax.GradientTransformation:
  """LoRA+ with the schedule of all other ways."""
  schedule = optax.warmup_cosine_decay_schedule(0.0, rate, steps // 10, steps)
  return jaxlora.lora_plus(schedule, PLUS_RATIO, optax.adam)


def ways(variants: Sequence[str]) -> list[Way]:
  """Each variant with Adam, and LoRA with LoRA+."""
  return [*(Way(name, name, digits.adam) for name in variants), Way("lora, LoRA+", LORA, lora_plus)]


def compare_quality(args: argparse.Namespace, steps_done: Callable[[int], Any]) -> dict[str, Any]:
  """Chooses each way's learning rate by its accuracy on validation images, then trains its seeds for the test."""
  model = ViT()
  old, new = digits.load_task(0), digits.load_task(5)
  pretrained, name = digits.pretrain(model, old.train, args.pretrain_steps, args.batch_size, args.cache, steps_done)
  kept = harness.Runs(args.out / "runs.json", args.fresh)
  decisive = {"steps": args.steps, "batch_size": args.batch_size, "rank": args.rank, "pretrained": name}
  sources = (__file__, *(module.__file__ for module in (adapt_digits, digits, methods)))
  decisive |= {"source": harness.source_digest(*map(Path, sources))}

  def setup(on: str) -> Setup:
    splits = new.train, getattr(new, on), getattr(old, on)
    return Setup(model, pretrained, *splits, args.steps, args.batch_size, args.out)

  @functools.cache
  def program(way: Way) -> Program:
    return adapt_digits.compile_step(way.method(model, args.rank), setup("test"), way.tx)

  def run(way: Way, rate: float, on: str, seed: int) -> dict[str, Any]:
    compiled = program(way)
    at_rate = compiled._replace(tx=way.tx(rate, args.steps))
    return adapt_digits.run(at_rate, setup(on), seed, steps_done) | {"trainable": compiled.trainable}

  def runs(way: Way, rate: float, on: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    found = []
    for seed in seeds:
      key = harness.digest({**decisive, "way": way.name, "rate": rate, "on": on, "seed": seed})
      found.append(kept.result(key, functools.partial(run, way, rate, on, seed), lambda: steps_done(args.steps)))
    return found

  rows = {}
  for way in ways(args.variants):
    # The rate is chosen with other seeds than the result's.
    others = range(args.seeds, args.seeds + args.tuning_seeds)
    tried = {rate: runs(way, rate, "validation", others) for rate in args.rates}
    rate = max(tried, key=lambda rate: np.mean([run["new"] for run in tried[rate]]))
    final = runs(way, rate, "test", range(args.seeds))
    rows[way.name] = {
      "rate": rate,
      "trainable": final[0]["trainable"],
      **{field: harness.interval([run[field] for run in final]) for field in ("new", "old", "last_loss")},
      "seeds": final,
      "validation": {str(rate): float(np.mean([run["new"] for run in found])) for rate, found in tried.items()},
    }
  for row in rows.values():
    row["less_than_lora"] = paired(row, rows[LORA])
  return rows


def paired(row: dict[str, Any], lora: dict[str, Any]) -> dict[str, Any]:
  """The interval of accuracy minus LoRA's, paired by seed: heads and batches are the same."""
  return harness.interval([mine["new"] - its["new"] for mine, its in zip(row["seeds"], lora["seeds"], strict=True)])


def distinguishable(row: dict[str, Any]) -> bool:
  """Whether the interval of the difference to LoRA excludes zero."""
  gap = row["less_than_lora"]
  return gap["half"] is not None and abs(gap["mean"]) > gap["half"]


# ----------------------------------------------------------------------------------------------------------------------
# Results.


def cost_rows(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
  head = ["variant", "step / LoRA", "temp / LoRA", "FLOPs / LoRA", "trained"]
  rows = []
  for name, row in results["cost"]["rows"].items():
    flops = "-" if row["flops_over_lora"] is None else f"{row['flops_over_lora']:.3f}"
    trained = "-" if row["check"] is None else f"{row['check']['trainable_parameters']:,}"
    rows.append((name, harness.ratio_cell(row["over_lora"]), f"{row['temp_over_lora']:.2f}", flops, trained))
  return head, rows


def quality_rows(results: dict[str, Any]) -> tuple[list[str], list[tuple[str, ...]]]:
  head = ["variant", "new digits", "than LoRA", "last loss", "old digits kept", "rate", "trained"]
  rows = []
  for name, row in results["quality"].items():
    gap = row["less_than_lora"]
    apart = f"{100 * gap['mean']:+.1f}" + ("" if gap["half"] is None else f" ± {100 * gap['half']:.1f}")
    loss = row["last_loss"]
    cells = (
      harness.percent_cell(row["new"]),
      "-" if name == LORA else apart + ("" if distinguishable(row) else " (no difference)"),
      f"{loss['mean']:.3f}" + ("" if loss["half"] is None else f" ± {loss['half']:.3f}"),
      harness.percent_cell(row["old"]),
      f"{row['rate']:g}",
      f"{row['trainable']:,}",
    )
    rows.append((name, *cells))
  return head, rows


def tables(results: dict[str, Any]) -> str:
  """The tables of benchmarks/README.md."""
  seeds = results["settings"]["seeds"]
  return "\n\n".join(
    [
      f"{results['cost']['title']}; medians (min-max) of {results['settings']['rounds']} rounds, A/A control"
      f" {harness.ratio_cell(results['cost']['control'])}:",
      harness.markdown(*cost_rows(results)),
      f"{seeds} seeds, mean and 95 % t-interval; differences are seed by seed:",
      harness.markdown(*quality_rows(results)),
      harness.conditions(results),
    ]
  )


def plot(results: dict[str, Any], path: Path) -> None:
  """Step times, and accuracies."""
  figure = Figure(figsize=(11, 4.5), layout="constrained")
  cost, quality = figure.subplots(1, 2)
  rows = {name: row for name, row in results["cost"]["rows"].items() if name != FLOOR}
  medians = [row["over_lora"]["median"] for row in rows.values()]
  whiskers = [
    [m - row["over_lora"]["min"] for m, row in zip(medians, rows.values(), strict=True)],
    [row["over_lora"]["max"] - m for m, row in zip(medians, rows.values(), strict=True)],
  ]
  cost.barh(list(rows), medians, xerr=whiskers, color="silver", ecolor="dimgray", capsize=3)
  cost.axvline(REACH_DORA, color="tab:green", linestyle="--", linewidth=1, label=f"to reach (dora): {REACH_DORA}")
  cost.set(title=results["cost"]["title"], xlabel="step time / plain LoRA")
  cost.legend(frameon=False, fontsize=8)
  cost.invert_yaxis()
  found = results["quality"]
  means = [100 * row["new"]["mean"] for row in found.values()]
  halves = [100 * (row["new"]["half"] or 0) for row in found.values()]
  quality.errorbar(means, list(found), xerr=halves, fmt="o", color="tab:blue", ecolor="silver", capsize=3)
  quality.set(title="new digits, 95 % interval over seeds", xlabel="accuracy, %")
  quality.invert_yaxis()
  path.parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=150)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def some(text: str) -> list[str]:
  """A parser of variants, separated by commas; LoRA is always first."""
  asked = text.split(",")
  if unknown := sorted(set(asked) - set(VARIANTS)):
    raise argparse.ArgumentTypeError(f"there is no variant {unknown[0]!r}; there are: {', '.join(VARIANTS)}")
  return [name for name in VARIANTS if name == LORA or name in asked]


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = harness.make_parser(__file__, __doc__, "--rank 16 --seeds 10", caches=True)
  harness.add_layers(parser)
  add_sizes(parser)
  count = harness.positive(int)
  parser.add_argument("--seeds", type=count, default=5, help="seeds of the quality table")
  parser.add_argument("--tuning-seeds", type=count, default=2, help="other seeds, to choose learning rates")
  parser.add_argument("--variants", type=some, default=list(VARIANTS), help="to compare with lora")
  rates = ",".join(map(str, RATES))
  parser.add_argument("--rates", type=harness.several(harness.positive(float)), default=rates, help="to choose from")
  parser.add_argument("--steps", type=count, default=150, help="steps of adaptation")
  parser.add_argument("--pretrain-steps", type=count, default=300, help="steps of pretraining on the old digits")
  parser.add_argument("--batch-size", type=count, default=32, help="images per step")
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Runs the comparison; returns what variants.json holds."""
  parser = make_parser()
  args = harness.parse(
    parser, argv, d=128, layers=2, rounds=3, seeds=2, tuning_seeds=1, steps=20, pretrain_steps=60, rates="0.01"
  )
  settings = Settings.parse(parser, args)
  begin = time.perf_counter()
  try:
    runs = len(ways(args.variants)) * (len(args.rates) * args.tuning_seeds + args.seeds)
    work = args.pretrain_steps + runs * args.steps
    with harness.progress(work, "step", args.quiet) as bar:
      bar.set_description("training")
      quality = compare_quality(args, bar.update)
  except KeyboardInterrupt:
    harness.say_interrupted(args.out / "runs.json")
  with harness.progress(steps.turns(1 + len(args.variants), args.rounds), "turn", args.quiet) as bar:
    cost = compare_cost(settings, args, harness.ticker(bar))
  results = {**harness.provenance(args), "cost": cost, "quality": quality, "seconds": time.perf_counter() - begin}
  harness.publish(args, "variants", results, plot)
  print(harness.table(*cost_rows(results)))
  print(harness.table(*quality_rows(results)))
  return results


if __name__ == "__main__":
  main()
