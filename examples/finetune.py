"""Adapts a small ViT, or a convolutional network, to new digits: its head alone, LoRA and full fine-tuning compared.

Each method trains the same number of steps from the same pretrained model. Compared are the accuracy on the new and on
the old digits, the trained parameters, the optimizer's state, the file of what was trained, step time and FLOPs.
"""

import argparse
from collections.abc import Callable, Sequence
import functools
from pathlib import Path
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from studies import adapt_digits, digits, finetuning, harness, learning_rates, methods

import jaxlora

SOURCES = (__file__, adapt_digits.__file__, digits.__file__, methods.__file__)  # they decide a run, beside jaxlora
STEPS_PER_ROUND = 5  # timed in a row before the next method has its turn


# ----------------------------------------------------------------------------------------------------------------------
# The methods.

MODELS: dict[str, Callable[[], digits.Model]] = {"vit": lambda: digits.ViT(), "conv": lambda: digits.ConvNet()}


def lora(model: digits.Model, rank: int, lr: float, targets: str) -> methods.Method:
  """Trains the factors of the targets and the new head. The first layer has 4 inputs or 1: too few for a rank."""
  config = jaxlora.LoraConfig(rank=rank, alpha=2 * rank, targets=targets, exclude="embed/kernel", train="head/.*")
  return methods.lora(config, lr, lambda params: model.apply({"params": params}, np.zeros((1, 8, 8), np.float32)))


def make_methods(model: digits.Model, args: argparse.Namespace) -> list[methods.Method]:
  """Every method of the comparison.

  Raises:
    ValueError: if the model cannot be adapted by these options; nothing has been computed by then.
  """
  rates = {name: getattr(args, f"lr_{name}") or rate for name, rate in learning_rates.DIGITS[args.model].items()}
  loras = [lora(model, rank, rates["lora"], args.targets) for rank in args.rank]
  params, key = jax.eval_shape(lambda: (digits.init(model, 0), jax.random.key(0)))
  for method in loras:
    tree = jax.eval_shape(lambda *args, method=method: method.join(*method.split(*args)), params, key)
    jax.eval_shape(jaxlora.wrap(model.apply, on_materialize="error"), {"params": tree}, jnp.zeros((1, 8, 8)))
  head = methods.whole("head alone", rates["head"], lambda module: module == "head")
  return [head, *loras, methods.whole("full fine-tuning", rates["full"], lambda module: True)]


def step_ratios(
  programs: Sequence[methods.Program], setup: adapt_digits.Setup, rounds: int, tick: Callable[[int], Any]
) -> dict[str, dict[str, Any]]:
  """Step times over full fine-tuning's of the same round."""
  batch = next(digits.batches(setup.train, setup.batch_size, setup.steps, seed=0))
  runs = {}
  for program in programs:
    frozen, trainable = adapt_digits.start(program.method, setup.pretrained, seed=0)
    runs[program.method.name] = functools.partial(program.step, trainable, program.tx.init(trainable), frozen, batch)
  return harness.ratios(harness.interleave(runs, rounds, STEPS_PER_ROUND, tick), over=programs[-1].method.name)


# ----------------------------------------------------------------------------------------------------------------------
# The command.


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults finish in well under 3 minutes on two CPU cores."""
  parser = harness.make_parser(__file__, __doc__, "--rank 4,8,16,32 --targets attention", rounds=21, caches=True)
  count, rate = harness.positive(int), harness.positive(float)
  parser.add_argument("--model", choices=tuple(MODELS), default="vit", help="a transformer, or a convolutional network")
  parser.add_argument("--rank", type=harness.several(count), default="8", help="LoRA ranks, separated by commas")
  parser.add_argument("--targets", default="all-linear", help="all-linear, attention, or a regex over whole paths")
  parser.add_argument("--seeds", type=count, default=3, help="number of seeds: heads, factors and batches")
  parser.add_argument("--steps", type=count, default=150, help="steps of adaptation, for every method")
  parser.add_argument("--pretrain-steps", type=count, default=300, help="steps of pretraining on the old digits")
  parser.add_argument("--batch-size", type=count, default=32, help="images per step")
  for name in ("head", "lora", "full"):
    best = ", ".join(f"{rates[name]:g} for {model}" for model, rates in learning_rates.DIGITS.items())
    parser.add_argument(
      f"--lr-{name}", type=rate, help=f"peak learning rate; unless given the best on the validation split, {best}"
    )
  parser.add_argument(
    "--evaluate-on", choices=("test", "validation"), default="test", help="use validation to choose settings"
  )
  parser.add_argument("--no-cache", action="store_true", help="pretrain anew and keep nothing")
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs the comparison; returns what finetune.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, seeds=1, steps=40, pretrain_steps=80, rounds=3)
  if args.model != "vit":
    harness.rename(parser, args, f"finetune_{args.model}")
  model = MODELS[args.model]()
  try:
    compared = make_methods(model, args)
    harness.check_folders(args)
  except ValueError as error:
    parser.error(str(error))
  try:
    return compare(model, compared, args)
  except KeyboardInterrupt:
    harness.say_interrupted(args.out / "runs.json")


def compare(model: digits.Model, compared: Sequence[methods.Method], args: argparse.Namespace) -> dict[str, Any]:
  """Pretrains, trains and times every method, and writes the results."""
  begin = time.perf_counter()
  old, new = digits.load_task(0), digits.load_task(5)
  old_eval, new_eval = getattr(old, args.evaluate_on), getattr(new, args.evaluate_on)

  steps = args.pretrain_steps + len(compared) * (args.seeds * args.steps + (args.rounds + 1) * STEPS_PER_ROUND)
  with harness.progress(steps, "step", args.quiet) as bar:
    bar.set_description("pretraining")
    cache = None if args.no_cache else args.cache
    pretrained, name = digits.pretrain(model, old.train, args.pretrain_steps, args.batch_size, cache, bar.update)
    setup = adapt_digits.Setup(model, pretrained, new.train, new_eval, old_eval, args.steps, args.batch_size, args.out)

    programs = []
    for method in compared:
      bar.set_description(f"compiling {method.name}")
      programs.append(adapt_digits.compile_step(method, setup))
    runs = train_all(programs, setup, name, args, bar)
    bar.set_description("timing")
    ratios = step_ratios(programs, setup, args.rounds, bar.update)
    bar.set_description("done")

  total = sum(leaf.size for leaf in jax.tree.leaves(pretrained))
  results = {
    "settings": harness.settings(args),
    "versions": harness.versions(),
    "hardware": harness.hardware(),
    "model": model.settings(),
    "pretrained": {"name": name, "parameters": total, "old": digits.accuracy(model, pretrained, old_eval)},
    "methods": [finetuning.summarize(p, runs[p.method.name], ratios[p.method.name], total) for p in programs],
    "seconds": time.perf_counter() - begin,
  }
  harness.publish(args, "finetune", results, finetuning.plot)
  print(finetuning.table(results))
  return results


def train_all(
  programs: Sequence[methods.Program], setup: adapt_digits.Setup, pretrained: str, args: argparse.Namespace, bar: Any
) -> dict[str, list[dict[str, Any]]]:
  """Every method's runs, one for each seed; finished runs in --out are reused."""
  kept = harness.Runs(args.out / "runs.json", args.fresh)
  decisive = {field: getattr(args, field) for field in ("steps", "batch_size", "evaluate_on")}
  decisive |= {"pretrained": pretrained, "versions": harness.versions()}
  decisive["source"] = harness.source_digest(*map(Path, SOURCES))
  runs: dict[str, list[dict[str, Any]]] = {program.method.name: [] for program in programs}
  for program in programs:
    for seed in range(args.seeds):
      bar.set_description(f"{program.method.name}, seed {seed}")
      key = harness.digest({**decisive, **program.method.settings, "seed": seed})
      run = functools.partial(adapt_digits.run, program, setup, seed, bar.update)
      runs[program.method.name].append(kept.result(key, run, lambda: bar.update(args.steps)))
  return runs


if __name__ == "__main__":
  main()
