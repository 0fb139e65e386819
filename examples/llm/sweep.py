"""Many runs of the language model's example, one after the other: each is skipped if done, and resumed if half done.

The named groups of runs and what each one shows:

  quantised   LoRA rank 8 on a base of floats, of NF4 and of INT8 codes, 3 seeds each: what the codes cost in quality
  rates       three learning rates of each method, on validation: from which the groups below take the best
  methods     the base, LoRA rank 8 and full fine-tuning, 3 seeds
  ranks       LoRA at ranks 1 to 64, and rank 64 with rsLoRA's scale, 3 seeds
  scaling     of those, rank 64 with either scale, and rank 8
  placement   attention alone at as many parameters as rank 8 on every kernel, 3 seeds
  head        the tied head alone: whole, and LoRA's at as many parameters as rank 8 on every kernel, 3 seeds

One JSON file a run in the output folder, and the pairs and the baselines in OUT/evidence. The tables are printed when
all are done, and by --show at any time, without model and data: all runs and baselines; differences, with paired 95 %
bootstrap intervals over papers and seeds; aspects; perplexity of plain text; samples by a rule. The plot goes to
OUT/evidence/test.png.
"""

import argparse
from collections.abc import Sequence
import json
from pathlib import Path
import sys
from typing import Any

from lm import comparisons, evidence, memory, plots, recorded, tables
from lm.methods import HEAD, Method
from lm.runs import Run, do, fill, prepare, resumable
from lm.training import Schedule

RECORDED = Path(__file__).with_name("results") / "sweep.json"
SEEDS = (0, 1, 2)
LORA, FULL, HEAD_ALONE = Method("lora"), Method("full"), Method("head")
LARGE, LARGE_RSLORA = Method("lora", 64), Method("lora", 64, scaling="rslora")
# By the kind of a method: alpha / rank has about one best rate for all ranks, rsLoRA's scale has not.
RATES = {
  "lora": (1e-3, 3e-3, 1e-2),
  "rslora": (3e-4, 1e-3, 3e-3),
  "full": (3e-5, 1e-4, 3e-4),
  "head": (3e-5, 1e-4, 3e-4),
}
RANKS = (1, 4, 8, 16, 32, 64)
ATTENTION_RANK = 21  # on attention alone, as many parameters as rank 8 on every kernel, to 1 %
HEAD_RANK = 49  # the same of the tied head
RATE_SEED = 100  # of the runs that choose rates


def quantised(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """LoRA on three kinds of base, seed by seed, so that an early look has all of them."""
  del rates
  return [
    Run(Method("lora", base=base), Schedule(3e-3, seed=seed)) for seed in seeds for base in ("float", "nf4", "int8")
  ]


def rates(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """Three rates a method, on validation."""
  del rates, seeds
  trained = LORA, LARGE_RSLORA, FULL, HEAD_ALONE
  return [Run(method, Schedule(rate, seed=RATE_SEED), "val") for method in trained for rate in RATES[kind(method)]]


def methods(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """The article's comparison."""
  return [Run(Method("base"), Schedule(1.0)), *at_their_rates((LORA, FULL), rates, seeds)]


def ranks(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """LoRA's size."""
  return at_their_rates([*(Method("lora", rank) for rank in RANKS), LARGE_RSLORA], rates, seeds)


def scaling(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """What rsLoRA's scale does at rank 64."""
  return at_their_rates((LORA, LARGE, LARGE_RSLORA), rates, seeds)


def placement(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """Which layers."""
  attention = Method("lora", ATTENTION_RANK, targets="attention")
  return at_their_rates((LORA, attention), rates, seeds)


def head(rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """What the head alone can do."""
  small = Method("lora", HEAD_RANK, targets=HEAD)
  return at_their_rates((HEAD_ALONE, small), rates, seeds)


def kind(method: Method) -> str:
  """Which rates are tried for a method."""
  return "rslora" if method.scaling == "rslora" else method.name


def at_their_rates(trained: Sequence[Method], rates: dict[str, float], seeds: Sequence[int]) -> list[Run]:
  """Seed by seed, each method at the best rate of its kind."""
  return [Run(method, Schedule(rates[kind(method)], seed=seed)) for seed in seeds for method in trained]


GROUPS = {
  "quantised": quantised,
  "rates": rates,
  "methods": methods,
  "ranks": ranks,
  "scaling": scaling,
  "placement": placement,
  "head": head,
}


def best_rates(out: Path, known: Sequence[dict[str, Any]] = ()) -> dict[str, float]:
  """The rate of the lowest validation loss of each kind of method, among the runs of `rates` that are done."""
  found: dict[str, dict[float, float]] = {name: {} for name in RATES}
  for result in (*known, *results(out)):
    settings = result["settings"]
    if settings["split"] == "val" and settings["schedule"]["seed"] == RATE_SEED:
      found[kind(Method(**settings["method"]))][settings["schedule"]["rate"]] = result["loss"]
  return {name: min(losses, key=losses.__getitem__) if losses else RATES[name][1] for name, losses in found.items()}


def results(out: Path) -> list[dict[str, Any]]:
  """The runs that are done."""
  return [json.loads(file.read_text()) for file in sorted(out.glob("*.json"))]


def make_parser() -> argparse.ArgumentParser:
  """The options."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="example: python examples/llm/sweep.py --only quantised --out out/llm",
  )
  parser.add_argument("--only", default=",".join(GROUPS), help=f"groups, separated by commas: {', '.join(GROUPS)}")
  parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "out" / "llm", help="the results' folder")
  parser.add_argument("--seeds", type=int, default=len(SEEDS), help="seeds of each comparison (default: 3)")
  parser.add_argument("--items", type=int, default=90, help="test pairs, of 300 (default: 90)")
  parser.add_argument("--model", type=Path, help="a GGUF file of a Llama-family model (default: SmolLM2-135M-Instruct)")
  parser.add_argument("--data", type=Path, help="a folder of data in ACLSum's form (default: ACLSum)")
  parser.add_argument(
    "--fill", action="store_true", help="run nothing: add what finished results do not say yet (losses of each pair, of"
    " plain text), from the adapters that they have kept",
  )  # fmt: skip
  parser.add_argument("--show", action="store_true", help="print the tables of what is done, and run nothing")
  parser.add_argument(
    "--record",
    action="store_true",
    help=f"write the figures into {RECORDED.name}, too, from which the README's tables are made",
  )
  parser.add_argument(
    "--continue-recorded",
    action="store_true",
    help=f"count the runs in {RECORDED.name} as done: they choose rates, are not run again, and --record keeps them",
  )
  parser.add_argument("--quiet", action="store_true", help="no progress bars")
  return parser


def main(argv: Sequence[str] | None = None) -> None:
  """Runs what is not done yet."""
  parser = make_parser()
  args = parser.parse_args(argv)
  names = args.only.split(",")
  if unknown := set(names) - set(GROUPS):
    parser.error(f"--only: found {sorted(unknown)}, expected of {', '.join(GROUPS)}")
  for name in ("seeds", "items"):
    if getattr(args, name) < 1:
      parser.error(f"--{name}: found {getattr(args, name)}, expected a whole number of at least 1")
  known = recorded.read(RECORDED) if args.continue_recorded else []
  done = [result["settings"] for result in known]
  if not args.show:
    args.out.mkdir(parents=True, exist_ok=True)
    try:
      setup = prepare(args.model, args.data, args.items)
      evidence.record(args.out, setup.pairs["train"], setup.pairs["test"], "test")
      if args.fill:
        gone = [file.stem for file in sorted(args.out.glob("*.json")) if not fill(setup, file, args.quiet)]
        if gone:
          print(f"No weights are left of {', '.join(gone)}: nothing was added.", file=sys.stderr)
    except ValueError as error:
      parser.error(str(error))
    for name in () if args.fill else names:
      runs = GROUPS[name](best_rates(args.out, known), range(args.seeds))
      runs = [run for run in runs if run.settings not in done]
      for number, run in enumerate(runs, 1):
        print(f"{name}, run {number} of {len(runs)}: {run.name}", file=sys.stderr, flush=True)
        do(setup, run, args.out, args.quiet)
  print(report(args.out))
  if args.record:
    found = [*evidence.load(args.out, "test")["baselines"], *results(args.out)]
    recorded.write(RECORDED, recorded.merged(known, found))


def report(out: Path) -> str:
  """The tables of what is done; the plot is drawn beside."""
  kept, done = evidence.load(out, "test"), results(out)
  found = [*kept["baselines"], *done]
  if not found:
    return f"{out}: no run is done"
  groups = comparisons.by_seed(found, "test")
  parts = [tables.text(tables.by_label(found)), comparisons.aspects(groups), comparisons.forgetting(groups)]
  references = [label for label in (comparisons.REFERENCE, comparisons.BASE) if label in groups]
  compared = [comparisons.differences(groups, label) for label in references]
  parts += [tables.text(table) for table in compared if table[1]]
  parts += [comparisons.samples(groups, kept["pairs"], *labels) for labels in comparisons.SAMPLED]
  if groups:
    plots.plot(groups, out / evidence.FOLDER / "test.png")
  return "\n\n".join(filter(None, parts))


if __name__ == "__main__":
  memory.with_huge_pages()
  resumable(main)
