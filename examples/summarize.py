"""Summarises docstrings by LoRA and by full fine-tuning: ROUGE, ranks, placements, learning rates, forgetting.

A small decoder is pretrained on the bodies of docstrings and on the language reference, and adapted to write the
summary line of a docstring from its body. Each package belongs to one split: the test packages are unseen.
"""

import argparse
from collections.abc import Sequence
import json
from typing import Any

import jax
from studies import harness
from studies.summaries import plots, questions, scores, tokens
from studies.summaries.figures import differences
from studies.summaries.tables import tables
from studies.summaries.tokens import Data
from studies.summaries.tuning import Method


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults take about half an hour on two CPU cores."""
  parser = harness.make_parser(__file__, __doc__, "--seeds 3 --ranks 1,8,64", caches=True)
  count, rate = harness.positive(int), harness.positive(float)
  counts, rates = harness.several(count), harness.several(rate)
  parser.add_argument("--rank", type=count, default=8, help="LoRA's rank in the main table")
  parser.add_argument("--ranks", type=counts, default="1,4,8,16,32,64", help="ranks to compare")
  parser.add_argument("--sweep-ranks", type=counts, default="1,8,64", help="ranks whose learning rates are swept")
  parser.add_argument("--rates-lora", type=rates, default="3e-4,1e-3,3e-3,1e-2,3e-2", help="peak rates of LoRA")
  parser.add_argument("--rates-full", type=rates, default="1e-4,3e-4,1e-3,3e-3,1e-2", help="peak rates of full")
  parser.add_argument("--seeds", type=count, default=5, help="seeds of the main table and of the placements")
  parser.add_argument("--rank-seeds", type=count, default=5, help="seeds of each other rank")
  parser.add_argument("--sweep-seeds", type=count, default=1, help="seeds of each learning rate")
  parser.add_argument("--steps", type=count, default=160, help="steps of adaptation, for every method")
  parser.add_argument("--batch-size", type=count, default=8, help="pairs per step of adaptation")
  parser.add_argument("--pretrain-steps", type=count, default=1500, help="steps of pretraining")
  parser.add_argument("--pretrain-batch", type=count, default=16, help="windows of text per step of pretraining")
  parser.add_argument("--pretrain-rate", type=rate, default=3e-3, help="peak learning rate of pretraining")
  parser.add_argument("--vocabulary", type=count, default=2048, help="size of the vocabulary")
  parser.add_argument("--width", type=count, default=128, help="the model's width")
  parser.add_argument("--depth", type=count, default=4, help="transformer blocks")
  parser.add_argument("--heads", type=count, default=4, help="attention heads")
  parser.add_argument("--validation", type=count, default=250, help="validation pairs")
  parser.add_argument("--test", type=count, default=300, help="test pairs")
  parser.add_argument("--beam", type=count, default=4, help="width of the beam")
  parser.add_argument(
    "--packages", type=lambda text: text.split(","), help="take docstrings only from these, separated by commas"
  )
  parser.add_argument("--no-cache", action="store_true", help="pretrain anew and keep nothing")
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


QUICK = {
  **{"ranks": "2,4", "sweep_ranks": "4", "rank": 4, "rates_lora": "1e-2,3e-2", "rates_full": "1e-3,3e-3"},
  **{"seeds": 2, "rank_seeds": 1, "sweep_seeds": 1, "steps": 20, "pretrain_steps": 60, "rounds": 2},
  **{"vocabulary": 512, "width": 32, "depth": 1, "validation": 50, "test": 50, "packages": "numpy,chex,flax,optax"},
}


def check(args: argparse.Namespace) -> None:
  """Checks options ahead of any work.

  Raises:
    ValueError: if there is no such model, it cannot be adapted so, or a folder cannot be written to.
  """
  if args.width % args.heads:
    raise ValueError(f"--width {args.width} is no multiple of --heads {args.heads}; each head has an equal part")
  if args.vocabulary < len(tokens.SPECIAL) + 256:
    raise ValueError(f"--vocabulary {args.vocabulary} has no room for every byte; expected at least 258")
  for one in [*args.ranks, *args.sweep_ranks, args.rank]:
    if one > args.width:
      raise ValueError(f"rank {one} is larger than the weights' smaller side, --width {args.width}")
  if 2 * args.rank > args.width:
    raise ValueError(f"--rank {args.rank}: the placements have twice that rank, more than --width {args.width}")
  harness.check_folders(args)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs everything; returns what summarize.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, **QUICK)
  try:
    check(args)
    cache = None if args.no_cache else args.cache
    data = tokens.load(args.packages, args.vocabulary, args.validation, args.test, cache)
  except ValueError as error:
    parser.error(str(error))
  try:
    return run_all(args, data)
  except KeyboardInterrupt:
    harness.say_interrupted(args.out / "runs")


def count_steps(args: argparse.Namespace) -> int:
  """The length of the progress bar."""
  sweeps = args.sweep_seeds * (len(args.sweep_ranks) * len(args.rates_lora) + len(args.rates_full))
  rows = args.seeds * 4 + args.rank_seeds * len([rank for rank in args.ranks if rank != args.rank])
  timed = (len(questions.all_methods(args)) + 1) * (args.rounds + 1) * questions.STEPS_PER_ROUND
  return args.pretrain_steps + (sweeps + rows) * args.steps + timed


def run_all(args: argparse.Namespace, data: Data) -> dict[str, Any]:
  """Pretrains, sweeps, compares and times, and writes the results."""
  with harness.progress(count_steps(args), "step", args.quiet) as bar:
    bar.set_description("pretraining")
    bench = questions.Bench(args, data, bar.update)
    base = bench.kept("base", lambda: scores.evaluate(bench.model, data, bench.base, [1, args.beam], 8), 0)
    bar.set_description("learning rates")
    rates = questions.compare_rates(bench)
    bar.set_description("LoRA and full")
    main_rows = questions.compare(bench, questions.main_methods(args), rates["chosen"], args.seeds)
    bar.set_description("placements")
    lora = main_rows[0]
    placements = [lora, *questions.compare(bench, questions.placement_methods(args)[1:], rates["chosen"], args.seeds)]
    bar.set_description("ranks")
    others = [Method(rank) for rank in args.ranks if rank != args.rank]
    ranks = questions.compare(bench, others, rates["chosen"], args.rank_seeds)
    bar.set_description("timing")
    timing = questions.time_steps(bench, bar.update)
    bar.set_description("done")

  results = {
    "settings": harness.settings(args),
    "versions": questions.versions(),
    "hardware": harness.hardware(),
    "data": data.report,
    "model": bench.model.settings(),
    "pretrained": {
      "name": bench.decisive["pretrained"],
      "parameters": sum(leaf.size for leaf in jax.tree.leaves(bench.base)),
    },
    "lead": scores.rouge(data, scores.lead(data)),
    "base": base,
    "rates": rates,
    "main": main_rows,
    "difference": differences(*main_rows),
    "placements": placements,
    "ranks": sorted([lora, *ranks], key=lambda row: row["rank"]),
    "timing": timing,
  }
  results = json.loads(json.dumps(results))
  harness.publish(args, "summarize", results, lambda results, path: plots.plot(results, path.parent))
  print(tables(results))
  return results


if __name__ == "__main__":
  main()
